"""`rlinf import-rlinf`: recipes of every kind that RLinf has, what is said of them, and what is refused."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from distributions import repository_plugins
from format_rows import write_format_dataset
from rlinf_recipes import ADAM, ALL, write_folder, write_recipe

from rlinf_core import LoggerConfig, UserError, cli
from rlinf_core.config.load import dump_config, load_config
from rlinf_core.config.toml import write_toml
from rlinf_core.preflight import check_run
from rlinf_plugins_openpi.recipes.formats import FORMATS
from rlinf_plugins_openpi.recipes.hydra_files import read_recipe
from rlinf_plugins_openpi.recipes.import_rlinf import render
from rlinf_plugins_openpi.recipes.keys import MAPPED, NOT_HERE, NOT_NEEDED, reason
from rlinf_plugins_openpi.recipes.translate import translate

IMPORTED = ("libero", "custom", "realworld", "robotwin", "robotwin_pi05", "robotwin_port")
DUAL = ("dual_franka", "dual_franka_port")
COMPOSED = ("libero", "custom", "robotwin_port")
REFUSED = {"behavior": "BEHAVIOR-1K", "maniskill_rlt": "use_rlt=False", "realworld_rlt": "use_rlt=False"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("sft"))


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("DUAL_FRANKA_DATA_ROOT", "/data/dual")
    monkeypatch.setenv("PI05_BASE_CKPT", "/models/pi05")


def imported(path, *overrides, loggers=None, **options):
    return translate(read_recipe(path, overrides), loggers or {}, **options)


def refused(path, *overrides):
    with pytest.raises(UserError) as error:
        imported(path, *overrides)
    return str(error.value)


@pytest.mark.parametrize("kind", [*IMPORTED, *DUAL])
def test_recipes_become_configs_that_are_valid(config, kind, tmp_path):
    path = write_recipe(config, kind)
    recipe = read_recipe(path)
    found = translate(recipe, {})
    text = render(recipe, found)
    assert tomllib.loads(text) == found.tables
    (file := tmp_path / "run.toml").write_text(text)
    run = load_config(file, plugins=repository_plugins())
    assert run.data.config_name in FORMATS
    assert run.policy.type == run.data.config_name.partition("_")[0]
    assert run.optim.ema_decay == 0
    assert load_config(file, plugins=repository_plugins()) == run
    assert dump_config(run)


@pytest.mark.parametrize("kind", REFUSED)
def test_recipes_that_cannot_be_imported_say_why(config, kind):
    assert REFUSED[kind] in refused(write_recipe(config, kind))


def test_a_recipe_of_rlt_without_its_loss_is_one_of_pi05(config):
    found = imported(write_recipe(config, "maniskill_rlt"), "actor.model.openpi.use_rlt=False")
    assert found.tables["data"]["config_name"] == "pi05_rlt_maniskill_joint"
    assert found.tables["data"]["default_prompt"] == "insert the peg in the hole"
    assert found.tables["data"]["repo_id"] == "/data/peg"
    assert found.tables["policy"]["action_horizon"] == 10
    assert "adds a loss of its own" in found.unused["actor.model.openpi.rlt_alpha"]


def test_every_value_of_a_recipe_has_its_place(config):
    tables = imported(write_recipe(config, "robotwin_port")).tables
    assert tables == {
        "seed": 0,
        "cluster": {"num_nodes": 1, "component_placement": {"actor": "0-0"}},
        "runner": {
            "name": "sft_robotwin_port",
            "output_dir": "../results",
            "max_steps": 30000,
            "save_interval": 500,
        },
        "data": {
            "config_name": "pi0_aloha_robotwin",
            "repo_id": "/data/robotwin",
            "num_workers": 4,
            "norm_stats": "/models/pi0/cup/norm_stats.json",
        },
        "policy": {
            "weights": "/models/pi0",
            "tokenizer": "google/paligemma-3b-pt-224",
            "action_horizon": 50,
            "action_dim": 32,
            "num_sampling_steps": 5,
        },
        "optim": {
            "lr": 2.5e-5,
            "schedule": "cosine",
            "warmup_steps": 1000,
            "min_lr": 2.5e-6,
            "decay_steps": 30000,
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 1e-10,
            "clip_grad": 1.0,
            "ema_decay": 0.0,
        },
        "trainer": {
            "global_batch_size": 128,
            "micro_batch_size": 4,
            "param_dtype": "bf16",
            "reshard_after_forward": True,
            "activation_checkpointing": "full",
            "cpu_offload": False,
            "reduce_every_micro_batch": False,
        },
    }


def test_a_style_that_rlinf_reads_nowhere_is_said_and_only_written_as_intended(config):
    path = write_recipe(config, "libero")
    faithful, intended = imported(path), imported(path, as_intended=True)
    assert faithful.tables["optim"]["schedule"] == "constant"
    assert any("warmup_style = cosine is read nowhere" in warning for warning in faithful.warnings)
    assert (
        intended.tables["optim"] | {"schedule": "hf_cosine", "min_lr": 0.0, "decay_steps": 30000}
        == (intended.tables["optim"])
    )


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        ("libero", {"checkpointing": "True"}, "gradient_checkpointing = true has no effect"),
        ("robotwin_pi05", {}, "no_shard: weights, gradients and optimizer states are sharded"),
        ("robotwin_pi05", {}, "ends at step 20000 of a schedule of 30000"),
        ("custom", {"optim": ADAM + "lr: 1e-5"}, "no actor.optim.weight_decay, for which RLinf takes 0.01"),
        ("custom", {}, "names no schedule: RLinf's default is constant, lr = 7.91e-06 from the first step"),
        ("libero", {}, "in bfloat16 for this recipe"),
        ("libero", {}, "no moving average"),
        ("libero", {}, "all 32 padded numbers"),
        ("libero", {"recipe": "openpi: {config_name: pi05_libero}"}, "names statistics of π0 for pi05_libero"),
        ("libero", {"steps": -1}, "limits neither steps nor epochs"),
    ],
)
def test_what_changes_the_mathematics_is_said(config, kind, changes, text):
    assert any(text in warning for warning in imported(write_recipe(config, "said", kind, **changes)).warnings)


def test_ten_to_the_minus_five_is_a_number(config):
    found = imported(write_recipe(config, "number", "custom", optim=ADAM + "lr: 1e-5\nweight_decay: 1e-10"))
    assert found.tables["optim"]["lr"] == 1e-5
    assert found.tables["optim"]["weight_decay"] == 1e-10


LIMITS = [
    ((-1, 5), {"max_epochs": 5}),
    ((700, -1), {"max_steps": 700}),
    ((700, 5), {"max_steps": 700, "max_epochs": 5}),
    ((-1, -1), {"max_epochs": 1}),
]


@pytest.mark.parametrize(("given", "ours"), LIMITS)
def test_limits_of_steps_and_epochs(config, given, ours):
    found = imported(write_recipe(config, "limits", "custom", steps=given[0], epochs=given[1])).tables["runner"]
    assert {key: found[key] for key in ("max_steps", "max_epochs") if key in found} == ours


def test_several_datasets_are_a_mixture(config, tmp_path):
    paths = "train_data_paths:\n  - {dataset_path: /data/sim, weight: 3}\n  - {dataset_path: /data/real}"
    recipe = "openpi: {config_name: pi05_maniskill_sim_real_co_training}"
    found = imported(write_recipe(config, "several", "custom", data=paths + "\nnum_workers: 8", recipe=recipe))
    assert found.tables["data"]["num_workers"] == 8
    assert [(one["repo_id"], one["weight"]) for one in found.tables["data"]["mixture"]] == [
        ("/data/sim", 3.0),
        ("/data/real", 1.0),
    ]
    assert any("trains on the first alone" in warning for warning in found.warnings)
    file = tmp_path / "run.toml"
    file.write_text(render(read_recipe(config / "several.yaml"), found))
    run = load_config(file, plugins=repository_plugins())
    assert [source.share for source in run.sources] == [0.75, 0.25]


DELTAS = [
    ("pi0_libero", "False", {"raw_action_is_delta": True}),
    ("pi0_libero", "True", {"relative": [True] * 6}),
    ("pi05_libero", "True", {"relative": [True] * 6}),
    ("pi0_aloha_robotwin", "False", {"raw_action_is_delta": True}),
    ("pi0_custom", "True", {"raw_action_is_delta": True}),
    ("pi0_custom", "False", {"relative": [True] * 9 + [False]}),
    ("pi05_dualfranka_tcp_rot6d", "False", {"raw_action_is_delta": True, "relative_poses": False}),
]


@pytest.mark.parametrize(("name", "flag", "fields"), DELTAS)
def test_relative_actions_are_those_of_rlinfs_format(config, name, flag, fields, tmp_path):
    recipe = f"openpi: {{config_name: {name}}}\nopenpi_data: {{extra_delta_transform: {flag}}}"
    path = write_recipe(config, "delta", "custom", recipe=recipe)
    found = imported(path)
    assert fields.items() <= found.tables["data"].items()
    (file := tmp_path / "run.toml").write_text(render(read_recipe(path), found))
    assert load_config(file, plugins=repository_plugins()).data.transforms()


def test_settings_of_trackers_go_to_loggers_that_are_installed(config):
    path = write_recipe(config, "tracked", "dual_franka")
    overrides = ("runner.logger.logger_backends=[wandb,swanlab]", "+runner.logger.wandb_entity=lab")
    fields = (*LoggerConfig.model_fields, "project", "entity")
    found = imported(path, *overrides, loggers={"wandb": fields, "swanlab": ("type", "project", "mode")})
    assert found.tables["runner"]["loggers"] == ["wandb", "swanlab"]
    assert found.tables["loggers"] == {
        "wandb": {"project": "rlinf", "entity": "lab"},
        "swanlab": {"project": "rlinf"},
    }
    assert any('runner.loggers = ["wandb"' in one for one in imported(path, *overrides).warnings)


WRONG = [
    ("actor.optim.lr=fast", "actor.optim.lr: 'fast' must be a number"),
    ("actor.micro_batch_size=2.5", "actor.micro_batch_size: 2.5 must be a whole number"),
    ("actor.micro_batch_size=0", "actor.micro_batch_size: 0 must be at least 1"),
    ("actor.global_batch_size=10", "10 is no multiple of actor.micro_batch_size x 1 ranks = 4"),
    ("actor.fsdp_config.cpu_offload=maybe", "cpu_offload: 'maybe' must be true or false"),
    ("+actor.optim.lr_schedule=cosine", "actor.optim.lr_schedule: unknown key; did you mean 'lr_scheduler'?"),
    ("+actor.optim.bananas=1", "actor.optim.bananas: unknown key. If RLinf ignores it, leave it out: ~actor.optim.ban"),
    ("+data.image_keys=[a]", "for vision-language models on questions with images"),
    ("actor.optim.lr=null", "actor.optim.lr is missing, and RLinf needs it"),
    (
        "actor.model.openpi.config_name=pi05_custom",
        "the config's data: how are actions trained? Set raw_action_is_delta",
    ),
    ("actor.optim=null", "actor.optim.clip_grad is missing"),
    ("actor.optim.lr=0", "actor.optim.lr: 0 must be more than 0"),
    ("actor.optim.weight_decay=-1", "actor.optim.weight_decay: -1 must be at least 0"),
    ("actor.optim.adam_beta1=1.0", "must be at least 0 and less than 1"),
    ("+actor.optim.lr_scheduler=polynomial", "no schedule 'polynomial'; RLinf has constant, cosine"),
    ("+actor.model.openpi.model_action_dim=wide", "'wide' must be a whole number"),
    ("actor.model.openpi.config_name=pi0_liberoo", "no format 'pi0_liberoo'; did you mean 'pi0_libero'"),
    ("actor.model.openpi.config_name=pi0_fast_libero", "predicts actions as tokens"),
    ("actor.model.is_lora=True", "where RLinf puts adapters is not translated"),
    ("actor.training_backend=megatron", "'megatron': only fsdp is imported"),
    ("runner.task_type=embodied", "only supervised fine-tuning"),
    ("+runner.resume_dir=/x/global_step_5", "/x/global_step_5/actor/model_state_dict"),
    ("+data.val_data_paths=/x", "held out with data.validation_fraction"),
    ("data.train_data_paths=[{path: /x}]", "must be a path, or dataset_path with a weight"),
    ("data.train_data_paths=null", "data.train_data_paths: is missing"),
    ("actor.fsdp_config.mixed_precision.param_dtype=fp16", "fp16 is not here, use bf16"),
    ("+actor.model.openpi_data.default_promt=x", "has no such field"),
    ("cluster.component_placement={actor: 3-1}", "invalid placement '3-1'"),
    ("cluster.component_placement={actor: 0-3:0-7}", "assigns process ranks"),
    ("~cluster.component_placement", "it places no actor"),
    ("runner.max_steps=0", "RLinf trains no step"),
]


@pytest.fixture(scope="module")
def composed(config):
    """Three recipes, composed once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PI05_BASE_CKPT", "/models/pi05")
        return {kind: read_recipe(write_recipe(config, f"composed_{kind}", kind)) for kind in COMPOSED}


def overridden(recipe, override):
    """A composed recipe with one of Hydra's overrides; Hydra takes a quarter of a second for it."""
    key, _, text = override.lstrip("+~").partition("=")
    place, value = tuple(key.split(".")), yaml.safe_load(text)
    leaves = {path: one for path, one in recipe.leaves.items() if path[: len(place)] != place}
    if isinstance(value, dict):
        leaves |= {(*place, *inner): one for inner, one in (((key,), one) for key, one in value.items())}
    elif not override.startswith("~"):
        leaves[place] = value
    return replace(recipe, leaves=leaves)


@pytest.mark.parametrize(("override", "message"), WRONG, ids=[override for override, _ in WRONG])
def test_wrong_recipes_are_refused_with_key_and_way_out(composed, override, message):
    kind = "custom" if "lr_schedule" in override else "libero"
    with pytest.raises(UserError) as error:
        translate(overridden(composed[kind], override), {})
    assert message in str(error.value)


def test_all_mistakes_are_reported_together(config):
    said = refused(
        write_recipe(config, "many", "libero"),
        *[one for one, _ in WRONG[:2]],
        "+data.image_keys=[a]",
        "+actor.optim.bananas=1",
    )
    assert said.count("\n  ") == 4


def test_a_recipe_of_another_model_names_the_keys_without_counterpart(config):
    path = write_recipe(config, "vlm", "custom")
    said = refused(path, "actor.model.model_type=qwen3_vl_moe", "+data.image_keys=[image]", "+actor.mcore_gpt=True")
    assert "is a recipe for qwen3_vl_moe; only those for π0 and π0.5" in said
    assert "data.image_keys: for vision-language models" in said
    assert "actor.mcore_gpt: for Megatron-LM" in said


def keys_of(name):
    return Path(__file__).with_name(name).read_text().split()


@pytest.mark.parametrize("key", sorted({*keys_of("rlinf_keys.txt"), *keys_of("rlinf_vlm_keys.txt")}))
def test_every_key_of_rlinfs_recipes_is_mapped_or_named_with_a_reason(key):
    assert reason(key, MAPPED) or reason(key, NOT_NEEDED) or reason(key, NOT_HERE)


def test_only_keys_that_are_mapped_are_read(composed, monkeypatch):
    read = set()
    from rlinf_plugins_openpi.recipes.values import Values

    taken = Values._take
    monkeypatch.setattr(Values, "_take", lambda self, key: read.add(key) or taken(self, key))
    for recipe in composed.values():
        translate(recipe, {})
    assert {key for key in read if not reason(key, MAPPED)} == set()


def test_every_key_without_effect_is_in_the_configs_comments(composed):
    recipe = composed["libero"]
    text = render(recipe, translate(recipe, {}))
    for path in recipe.leaves:
        key = ".".join(path)
        assert reason(key, MAPPED) or key in text


@pytest.fixture
def rlinf(monkeypatch, capsys):
    monkeypatch.setattr("rlinf_core.plugins.registry.get_plugins", repository_plugins)

    def rlinf(*arguments):
        code = cli.main(["import-rlinf", *map(str, arguments)])
        return code, *capsys.readouterr()

    return rlinf


def test_the_command_writes_toml_to_standard_output_or_a_file(rlinf, config, tmp_path):
    path = write_recipe(config, "libero")
    code, out, err = rlinf(path, "actor.optim.lr=1e-4")
    assert code == 0
    assert tomllib.loads(out)["optim"]["lr"] == 1e-4
    assert "warning: warmup_style = cosine" in err
    target = tmp_path / "run.toml"
    assert rlinf(path, "-o", target)[:2] == (0, "")
    assert tomllib.loads(target.read_text())["data"]["config_name"] == "pi0_libero"
    code, _, err = rlinf(path, "-o", target)
    assert (code, "exists already" in err) == (2, True)
    document = json.loads(rlinf(path, "--json", "--as-intended")[1])
    assert document["config"]["optim"]["schedule"] == "hf_cosine"
    assert tomllib.loads(document["toml"]) == document["config"]
    assert {"warnings", "unused", "variables"} < document.keys()


def test_controls_of_a_recipe_end_no_comment(config):
    recipe = read_recipe(
        write_recipe(config, "controls", "custom", data='train_data_paths: "/x\\n[data]\\"y"'),
        ['runner.logger.experiment_name="a\x1b[31m"', '+actor.model.lora_path="x\x1b[31m"'],
    )
    found = translate(recipe, {})
    assert tomllib.loads(render(recipe, found)) == found.tables
    assert found.tables["data"]["repo_id"] == '/x\n[data]"y'
    assert "\x1b" not in render(recipe, found)


def test_all_kinds_are_covered():
    assert {*ALL} == {*IMPORTED, *DUAL, *REFUSED}
    assert len(ALL) == 11


def test_one_dataset_may_be_a_mapping_and_tables_may_be_empty(composed):
    recipe = overridden(composed["custom"], "~data.train_data_paths")
    leaves = {
        **recipe.leaves,
        ("data", "train_data_paths", "dataset_path"): "/data/one",
        ("data", "train_data_paths", "weight"): 2,
        ("actor", "model", "openpi_data"): None,
        ("runner", "early_stop"): None,
    }
    assert translate(replace(recipe, leaves=leaves), {}).tables["data"]["repo_id"] == "/data/one"


def test_what_the_configs_classes_refuse_is_refused_at_once(composed):
    recipe = overridden(composed["libero"], "actor.model.openpi.config_name=pi0_metaworld")
    leaves = {**recipe.leaves, ("actor", "model", "openpi_data", "extra_delta_transform"): True}
    with pytest.raises(UserError, match="the config's data: relative has 6 entries, an action has 4 numbers"):
        translate(replace(recipe, leaves=leaves), {})


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*IMPORTED, *DUAL])
def test_validate_accepts_an_imported_recipe_on_made_up_data(config, kind, tmp_path):
    recipe = read_recipe(write_recipe(config, kind))
    (file := tmp_path / "run.toml").write_text(render(recipe, translate(recipe, {})))
    tables = tomllib.loads(file.read_text())
    for key in ("assets", "norm_stats"):  # They are below the weights.
        tables["data"].pop(key, None)
    file.write_text(write_toml(tables))
    plugins = repository_plugins()
    made = write_format_dataset(tmp_path / "data", load_config(file, plugins=plugins).data)
    small = ["policy.variant=dummy", "policy.weights=random", "policy.tokenizer=", f"data.repo_id={made.root}"]
    small += ["trainer.device=cpu", "trainer.global_batch_size=4", "trainer.micro_batch_size=1"]
    run = load_config(file, [*small, f"runner.output_dir={tmp_path}"], plugins)
    assert check_run(run, plugins, len(run.cluster.ranks or (0,))).findings == []
