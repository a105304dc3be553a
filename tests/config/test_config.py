"""From TOML and overrides to a frozen RunConfig: layers, classes, mistakes, round trips."""

import json
import subprocess
import sys
from types import NoneType, SimpleNamespace
from typing import ClassVar, Literal, get_args

import pytest
from distributions import entry_point, entry_points_of, repository_plugins
from pydantic import BaseModel, Field

from rlinf_core import DatasetConfig, LoggerConfig, PolicyConfig, RunConfig, TrainerConfig, UserError, hookimpl
from rlinf_core.config.aliases import ALIASES
from rlinf_core.config.load import diff_tables, dump_config, load_config, read_toml
from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins


class Vision(BaseModel):
    model_config = {"extra": "forbid", "frozen": True}

    width: int = 64


class ToyPolicy(PolicyConfig):
    run_defaults: ClassVar = {
        "optim": {"lr": 1e-3, "warmup_steps": 7, "weight_decay": 0.1},
        "policy": {"horizon": 2},
    }

    type: Literal["toy"]
    horizon: int = Field(default=1, ge=1)
    vision: Vision = Vision()
    note: str | None = None


class OtherPolicy(PolicyConfig):
    type: Literal["other"] = "other"
    horizon: int = 3


class ForeignPolicy(PolicyConfig):
    type: Literal["foreign"] = "foreign"


class ToyDataset(DatasetConfig):
    run_defaults: ClassVar = {"policy": {"type": "toy", "horizon": 5}, "optim": {"lr": 2e-3, "warmup_steps": 8}}
    compatible_policies: ClassVar = ("other",)

    cameras: dict[str, str] = {"front": "image"}
    scales: tuple[float, ...] = ()


class ToyTrainer(TrainerConfig):
    type: Literal["toy_trainer"] = "toy_trainer"
    speed: float = 1.0


class ToyLogger(LoggerConfig):
    type: Literal["toy_logger"] = "toy_logger"
    project: str = "arms"
    tags: tuple[str, ...] = ()


class StrictLogger(LoggerConfig):
    type: Literal["strict_logger"]
    project: str
    address: str = ""


@hookimpl
def rlinf_register_policies():
    return [ToyPolicy, OtherPolicy, ForeignPolicy]


@hookimpl
def rlinf_register_trainers():
    return [ToyTrainer]


@hookimpl
def rlinf_register_loggers():
    return [ToyLogger, StrictLogger]


@pytest.fixture(scope="module")
def plugins():
    toy = SimpleNamespace(
        __name__="toy",
        rlinf_register_policies=rlinf_register_policies,
        rlinf_register_trainers=rlinf_register_trainers,
        rlinf_register_loggers=rlinf_register_loggers,
    )
    return Plugins(
        [
            *entry_points_of("rlinf_core"),
            entry_point(PLUGIN_GROUP, "toy", toy),
            entry_point(DATASET_GROUP, "toy_data", ToyDataset),
            entry_point(DATASET_GROUP, "bare", DatasetConfig),
        ]
    )


@pytest.fixture
def load(tmp_path, plugins):
    """Load a TOML text with overrides; the dataset is `toy_data` unless the text or an override names one."""

    def load(text="", *overrides):
        path = tmp_path / "run.toml"
        path.write_text(text)
        named = "config_name" in text or any("config_name" in override for override in overrides)
        return load_config(path, [*([] if named else ["data.config_name=toy_data"]), *overrides], plugins)

    return load


@pytest.fixture
def mistakes(load):
    """The message of a config that is refused."""

    def mistakes(*arguments):
        with pytest.raises(UserError) as caught:
            load(*arguments)
        return str(caught.value)

    return mistakes


def test_each_layer_covers_the_one_below(load):
    run = load("[optim]\nwarmup_steps = 9\nclip_grad = 2.0", "optim.clip_grad=3")
    assert run.optim.betas == (0.9, 0.95)  # core
    assert run.optim.weight_decay == 0.1  # policy
    assert run.optim.lr == 2e-3  # dataset, over the policy
    assert run.optim.warmup_steps == 9  # TOML, over both
    assert run.optim.clip_grad == 3.0  # command line, over TOML
    assert (type(run.data), type(run.policy), run.trainer.type) == (ToyDataset, ToyPolicy, "fsdp2")


def test_policy_fields_come_from_policy_dataset_toml_in_this_order(load):
    assert load().policy.horizon == 5
    assert load("[policy]\nhorizon = 6").policy.horizon == 6
    assert load('[data]\nconfig_name = "bare"\n[policy]\ntype = "toy"').policy.horizon == 2


def test_defaults_of_classes_are_left_alone(load):
    load("[policy]\nhorizon = 6", "optim.lr=1")
    assert ToyDataset.run_defaults["policy"] == {"type": "toy", "horizon": 5}
    assert load().optim.lr == 2e-3


def test_a_compatible_policy_may_replace_the_datasets_own(load):
    run = load('[policy]\ntype = "other"')
    assert type(run.policy) is OtherPolicy
    assert run.policy.horizon == 5
    assert run.optim.lr == 2e-3


def test_other_policies_are_refused(mistakes):
    message = mistakes('[policy]\ntype = "foreign"')
    assert "policy.type: 'foreign' is not compatible with dataset 'toy_data', which is for toy or other" in message
    assert "run.toml]" in message


def test_a_dataset_without_a_policy_needs_one_named(mistakes, load):
    assert "policy.type: is required" in mistakes('[data]\nconfig_name = "bare"')
    assert type(load('[data]\nconfig_name = "bare"\n[policy]\ntype = "foreign"').policy) is ForeignPolicy


def test_a_dataset_must_be_named(mistakes, tmp_path, plugins):
    for text in ("", "data = 5", "[data]\nrepo_id = 'x'"):
        (tmp_path / "run.toml").write_text(text)
        with pytest.raises(UserError, match=r"data\.config_name: is required: a name from `rlinf datasets`"):
            load_config(tmp_path / "run.toml", [], plugins)
    assert "data.config_name: is required: a name from `rlinf datasets`" in mistakes("[data]\nconfig_name = ''")
    assert "data.config_name: must be a name, not 5" in mistakes("[data]\nconfig_name = 5")


def test_datasets_may_be_named_with_their_distribution(load):
    run = load('[data]\nconfig_name = "toy:toy_data"')
    assert type(run.data) is ToyDataset
    assert run.data.config_name == "toy:toy_data"


def test_trainers_and_loggers_of_plugins_are_used(load):
    run = load('[trainer]\ntype = "toy_trainer"\nspeed = 2', 'runner.loggers=["toy_logger"]')
    assert run.trainer == ToyTrainer(speed=2.0)
    assert run.runner.loggers == ("toy_logger",)


@pytest.mark.parametrize("override", ["seed", "=3", "a b=3", "runner..name=x", "runner.loggers=[x]", "runner.name='x"])
def test_malformed_overrides_are_named(override, mistakes):
    message = mistakes("", override)
    assert repr(override) in message
    assert "[command line]" in message


def test_later_overrides_win(load):
    assert load("", "seed=1", "seed=2").seed == 2


def test_dictionaries_in_toml_replace_the_class_default(load):
    assert load('[data.cameras]\nside = "image.side"').data.cameras == {"side": "image.side"}


def test_all_mistakes_are_reported_together(mistakes):
    message = mistakes(
        """
        max_stpes = 3
        [runner]
        max_steps = -1
        [optim]
        lr = "fast"
        learning_rat = 1
        [data]
        camera = {}
        [policy]
        horizn = 2
        [policy.vision]
        widht = 3
        [algorithm]
        num_nodes = 1
        [plugins.toy]
        x = 1
        """,
        "trainer.param_dtyp=fp32",
        "runner.loggers=['nobody']",
    )
    lines = message.splitlines()
    file = lines[0].partition(": ")[0]
    assert lines[0] == f"{file}: 11 mistakes in the config:"
    expected = [
        "  runner.loggers: unknown logger 'nobody' [command line]",
        f"  max_stpes: unknown key; did you mean 'runner.max_steps'? [{file}]",
        f"  runner.max_steps: Input should be greater than or equal to 0 (got -1); 0 means no limit [{file}]",
        f"  optim.learning_rat: unknown key [{file}]",
        f"  data.camera: unknown key; did you mean 'cameras'? [{file}]",
        f"  policy.horizn: unknown key; did you mean 'horizon'? [{file}]",
        f"  policy.vision.widht: unknown key; did you mean 'width'? [{file}]",
        "  trainer.param_dtyp: unknown key; did you mean 'param_dtype'? [command line]",
        f"  algorithm: unknown key [{file}]",
        f"  plugins.toy: unknown plugin table 'toy' [{file}]",
    ]
    assert [line for line in expected if line not in lines] == []
    assert "optim.lr: Input should be a valid number" in message


@pytest.mark.parametrize(
    ("text", "override", "complaint"),
    [
        ("[runer]\nname = 'x'", "seed=1", "runer: unknown key; did you mean 'runner' or 'trainer'?"),
        ("runner = 5", "seed=1", "runner: Input should be a valid dictionary"),
        ("[policy]\nnote = 1", "seed=1", "policy.note: Input should be a valid string (got 1)"),
        ("", "runner.name=42", """write runner.name='"42"'"""),
        ("", "optim.betas=[0.9]", "optim.betas[1]: is required [command line]"),
        ("", "runner.loggers=[1]", "runner.loggers[0]: Input should be a valid string (got 1) [command line]"),
        ("trainer = 5", "seed=1", "trainer.type: is required"),
        ("", "trainer.type=fsdp", "unknown trainer 'fsdp'; did you mean 'fsdp2'?"),
        ("", "policy.type=to", "policy.type: 'to' is not compatible with dataset"),
        ("", "data.config_name=toydata", "unknown dataset 'toydata'; did you mean 'toy_data'?"),
        ("", "data.cameras.x=1", "data.cameras.x: Input should be a valid string"),
        ("[runner]\nval_check_interval = 3", "seed=1", "runner.val_check_interval is set but no episode is held out"),
    ],
)
def test_single_mistakes(text, override, complaint, mistakes):
    assert complaint in mistakes(text, override)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("trainer.precision=fp32", "trainer.precision: unknown key; here it is 'trainer.param_dtype' ["),
        ("optim.learning_rate=1", "optim.learning_rate: unknown key; here it is 'optim.lr' ["),
        ("learning_rate=1", "learning_rate: unknown key; here it is 'optim.lr' ["),
        ("optim.adam_eps=1", "here it is 'optim.eps'"),
        ("optim.adam_beta1=0.9", "here it is 'optim.betas'"),
        ("optim.lr_warmup_steps=1", "here it is 'optim.warmup_steps'"),
        ("trainer.ema_decay=0.9", "trainer.ema_decay: unknown key; did you mean 'optim.ema_decay'? ["),
        ("batch_size=4", "here it is 'trainer.global_batch_size'"),
        ("trainer.per_device_train_batch_size=4", "here it is 'trainer.micro_batch_size'"),
        ("runner.micro_batch_size=4", "runner.micro_batch_size: unknown key; did you mean 'trainer.micro_batch_size'?"),
        ("trainer.gradient_accumulation_steps=4", "unknown key; it follows from the batch: trainer.global_batch_size"),
        ("num_train_steps=4", "here it is 'runner.max_steps'"),
        ("runner.wandb_project=arms", "settings of a tracker are keys of its logger's table, e.g. [loggers.wandb]"),
        ("runner.wandb=true", "here it is 'runner.loggers'"),
        ("actor.micro_batch_size=4", "actor: unknown key; its keys are in [policy]"),
        ("policy.model_path=x", "here it is 'policy.weights'"),
        ("model.x=1", "model: unknown key; here it is [policy] ["),
        ("policy.chunk_size=4", "policy.chunk_size: unknown key ["),  # The toy policy has no action_horizon.
        ("trainer.recision=1", "trainer.recision: unknown key ["),
        ("optim.type=adam", "unknown optimizer 'adam': optim.type = \"adamw\" with weight_decay = 0 is Adam ["),
        ("optim.type=moun", "optim.type: unknown optimizer 'moun'; did you mean 'muon'? ["),
        ("optim.schedule=linear", "unknown schedule 'linear': it is optim.schedule = \"wsd\" with stable_steps = 0"),
        ("optim.schedule=openpi_cosine", "unknown schedule 'openpi_cosine': RLinf's openpi_cosine is optim.schedule"),
        ("optimizer=adamw", "optimizer: unknown key; here it is 'optim.type' ["),
        ("optim.optimizer_type=adamw", "here it is 'optim.type' ["),
        ("optim.lr_scheduler=cosine", "here it is 'optim.schedule' ["),
        ("optim.lr_scheduler_type=cosine", "here it is 'optim.schedule' ["),
        ("optimizer.name=muon", "optimizer: unknown key; here it is [optim]"),
        ("optim.warmup_style=cosine", "optim.warmup_style: unknown key; RLinf reads it nowhere"),
        ("policy.target_modules=q_proj", "LoRA is the table [policy.lora] here"),
        ("optim=3", "optim: must be a table, [optim] (got 3) ["),
    ],
)
def test_hints_are_right_or_absent(override, hint, mistakes):
    assert hint in mistakes("", override)


def test_every_alias_leads_to_a_key(load, plugins):
    """Or to a table; keys of one policy, optimizer or schedule are only suggested where it is chosen."""
    run = load()
    choices = [one.item.model_fields for kind in ("optimizer", "schedule") for one in plugins.registered_as(kind)]
    for theirs, ours in ALIASES.items():
        table, _, key = ours.strip("[]").partition(".")
        fields = set(type(getattr(run, table)).model_fields).union(*choices if table == "optim" else ())
        assert not key or key in fields or ours in ("policy.action_horizon", "policy.augmentations"), theirs
        assert theirs not in fields, f"{theirs} is a key of [{table}]"


def test_messages_speak_of_lists_and_of_what_0_means(mistakes):
    message = mistakes("", "optim.betas=0.9", "runner.max_epochs=-1", "runner.loggers=wandb")
    assert "optim.betas: Input should be a valid list (got 0.9) [" in message
    assert "runner.loggers: Input should be a valid list (got 'wandb'); a list of one is [\"wandb\"] [" in message
    assert "runner.max_epochs: Input should be greater than or equal to 0 (got -1); 0 means no limit [" in message
    assert "(got -1); 0 means no limit [" in mistakes("", "runner.max_steps=-1")
    assert "; 0 means" not in mistakes("", "seed=-1", "optim.warmup_steps=-1", "runner.max_epochs=-2")


def test_a_mistake_between_keys_says_who_set_which_and_the_way_out(mistakes):
    message = mistakes("[optim]\nmin_lr = 0.5", "optim.lr=0.1")
    assert (
        "min_lr (0.5) must not be larger than lr (0.1): set optim.min_lr, too, for example to a tenth (0.01)" in message
    )
    assert "(lr is from command line, min_lr is from " in message
    assert "run.toml)" in message
    message = mistakes("", "optim.lr=1e-6")
    assert "lr is from command line, min_lr is from its default" in message


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_files_from_windows_are_read(start, end, tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(f'{start}seed = 1{end}[runner]{end}name = "π"{end}'.encode())
    assert read_toml(path) == {"seed": 1, "runner": {"name": "π"}}


@pytest.mark.parametrize("text", ["optim:\n  lr: 1e-4", "# mine\n\n---\nseed: 1", "- name: x", "---\n"])
def test_yaml_is_recognised(text, tmp_path, plugins):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"run.yaml: it is YAML, and a config is TOML: `\[optim\]` for `optim:`"):
        load_config(path, [], plugins)


def test_a_runs_folder_is_not_its_config(tmp_path, plugins):
    with pytest.raises(UserError, match=r"cannot be read: it is a folder; name the TOML file in it$"):
        load_config(tmp_path, [], plugins)
    (tmp_path / "config.toml").touch()
    with pytest.raises(UserError, match=rf"name the TOML file in it, as {tmp_path}/config.toml$"):
        load_config(tmp_path, [], plugins)


def test_a_mistake_between_keys_names_everyone_who_wrote_them(mistakes):
    message = mistakes("[optim]\nmin_lr = 0.5")
    assert "optim: min_lr (0.5) must not be larger than lr (0.002)" in message
    assert "[defaults of policy 'toy', defaults of dataset 'toy_data', " in message


def test_mistakes_that_only_follow_from_an_unknown_dataset_are_not_reported(mistakes):
    message = mistakes("[optim]\nmin_lr = 0.001", "data.config_name=toydata", "seed=-1")
    assert "min_lr" not in message
    assert "seed: Input should be greater than or equal to 0 (got -1) [command line]" in message


def test_syntax_errors_name_file_line_and_column(mistakes, tmp_path):
    message = mistakes("seed = 1\nrunner = = 2")
    assert str(tmp_path / "run.toml") in message
    assert "line 2, column 10" in message


@pytest.mark.parametrize("name", ["nowhere.toml", "."])
def test_files_that_cannot_be_read_are_named(name, tmp_path, plugins):
    with pytest.raises(UserError, match=r": no such file|cannot be read") as caught:
        load_config(tmp_path / name, [], plugins)
    assert str(tmp_path / name) in str(caught.value)


def test_text_that_is_not_utf8_is_refused(tmp_path, plugins):
    (tmp_path / "run.toml").write_bytes(b'x = "\xff"')
    with pytest.raises(UserError, match="UTF-8"):
        load_config(tmp_path / "run.toml", [], plugins)


def test_a_config_survives_being_written_and_read(load, tmp_path, plugins):
    run = load(
        "seed = 9223372036854775807",
        r'data.cameras={"my.cam" = "a \"quoted\" \\ path\n", "" = "ü"}',
        "data.scales=[0.1, 1e-30, 3, inf]",
        "optim.lr=0.30000000000000004",
        "optim.min_lr=1e-300",
        "trainer.type=toy_trainer",
        "trainer.speed=0.1",
        "policy.vision.width=3",
        'runner.loggers=["toy_logger", "strict_logger"]',
        "loggers.strict_logger.project=drawers",
    )
    (tmp_path / "again.toml").write_text(dump_config(run), encoding="utf-8")
    again = load_config(tmp_path / "again.toml", [], plugins)
    assert again == run
    assert (type(again), type(again.trainer), again.policy.note) == (RunConfig, ToyTrainer, None)
    assert "note" not in dump_config(run)


def test_a_loggers_table_is_that_of_its_class(load, mistakes):
    on = 'runner.loggers=["toy_logger", "strict_logger"]'
    tables = "[loggers.strict_logger]\nproject = 'a'\n[loggers.toy_logger]\ntags = ['x']\n[loggers.console]\n"
    run = load(tables, on, "loggers.strict_logger.project=drawers")
    assert run.loggers.keys() == {"strict_logger", "toy_logger", "console"}
    assert (type(run.loggers["toy_logger"]), run.loggers["toy_logger"].tags) == (ToyLogger, ("x",))
    assert (run.loggers["strict_logger"].type, run.loggers["strict_logger"].project) == ("strict_logger", "drawers")
    assert load("", 'runner.loggers=["toy_logger"]').loggers == {}
    said = mistakes("[loggers.toy_logger]\nprojct = 'a'\n[loggers.toy_loger]\n", on)
    file, _, said = said.partition(": ")
    assert said.replace(file, "run.toml") == (
        "3 mistakes in the config:\n"
        "  loggers.toy_loger: unknown logger 'toy_loger'; did you mean 'toy_logger' or 'strict_logger'? [run.toml]\n"
        "    available: console, jsonl, strict_logger, toy_logger\n"
        "  loggers.strict_logger.project: is required [table of toy 1.0]\n"
        "  loggers.toy_logger.projct: unknown key; did you mean 'project'? [run.toml; table of toy 1.0]"
    )
    assert (
        "loggers.toy_logger: does nothing: the logger 'toy_logger' does not run. Add it to runner.loggers, or remove "
        "the table [command line]"
    ) in mistakes("", "loggers.toy_logger.project=x")
    assert "loggers.toy_logger.type: Input should be 'toy_logger' (got 'wandb')" in mistakes(
        "[loggers.toy_logger]\ntype = 'wandb'", on
    )
    assert "loggers.jsonl.path: unknown key" in mistakes("", "loggers.jsonl.path=x")
    assert "loggers: must have one table per logger, [loggers.<type>] (got 'wandb')" in mistakes("", "loggers=wandb")
    secret = "loggers.strict_logger.address=https://me:secret@wandb.example"
    assert "loggers.strict_logger.address: contains a password" in mistakes(tables, on, secret)


@pytest.mark.parametrize("setting", ["norm_stats=stats.json", "norm_floor=0.1", "stats_need_images=true"])
def test_statistics_of_a_policy_that_normalises_nothing_are_refused(mistakes, setting):
    what = f"data.{setting.partition('=')[0]} does nothing: the policy 'toy' normalises nothing; leave it out"
    assert what in mistakes("", f"data.{setting}")


DATASETS = [entry.name for entry in repository_plugins().datasets()]


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_config_survives_being_written_and_read(name, tmp_path):
    plugins = repository_plugins()
    path = tmp_path / "run.toml"
    path.write_text(f'[data]\nconfig_name = "{name}"\nvalidation_fraction = 0.1\n[policy]\nweights = "random"\n')
    if name == "text":
        said = ["policy.tokenizer=examples/data/text_plans", "policy.config.model_type=qwen3"]
    else:
        said = ["policy.variant=dummy", *(["data.raw_action_is_delta=true"] if name.endswith("custom") else [])]
    run = load_config(path, said, plugins)
    path.write_text(dump_config(run))
    assert load_config(path, [], plugins) == run


def test_no_field_hides_a_value_behind_none():
    """TOML has no null: a field that accepts None but has another default could never be set to None."""
    plugins = repository_plugins()
    assert plugins.failures == ()
    waiting = [
        RunConfig,
        *(one.item for one in plugins.registered if one.kind not in ("command", "triage")),
        *(e.load() for e in plugins.datasets()),
    ]
    seen = set()
    while waiting:
        model = waiting.pop()
        if model in seen:
            continue
        seen.add(model)
        for name, info in model.model_fields.items():
            parts = [info.annotation, *get_args(info.annotation)]
            assert NoneType not in parts or info.default is None, f"{model.__name__}.{name}"
            waiting += [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]


def test_differences_are_dotted_keys(load):
    runs = load(), load('[data.cameras]\n"my.cam" = "x"', "runner.max_steps=5", "policy.note=hi")
    old, new = (read_toml(dump_config(run)) for run in runs)
    assert diff_tables(old, new) == [
        ("runner.max_steps", 30000, 5),
        ("data.cameras.front", "image", None),
        ('data.cameras."my.cam"', None, "x"),
        ("policy.note", None, "hi"),
    ]
    assert diff_tables(old, old) == []


def test_configs_are_frozen(load):
    run = load()
    for section, name in ((run, "seed"), (run.optim, "lr"), (run.data, "repo_id"), (run.policy, "horizon")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(section, name, 1)


def test_loading_a_config_leaves_torch_and_lerobot_unloaded(tmp_path):
    (tmp_path / "run.toml").write_text('[data]\nconfig_name = "pi05_metaworld"\n[policy]\nvariant = "dummy"\n')
    code = f"""
        import json, sys
        sys.path.insert(0, {str(entry_points_of.__globals__["ROOT"] / "tests" / "support")!r})
        from distributions import repository_plugins
        from rlinf_core.config.load import dump_config, load_config
        run = load_config("run.toml", [], repository_plugins())
        dump_config(run)
        print(json.dumps([run.policy.type, sorted({{"torch", "lerobot", "transformers"}} & set(sys.modules))]))
    """
    result = subprocess.run([sys.executable, "-c", code.replace("\n        ", "\n")], cwd=tmp_path, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    assert json.loads(result.stdout) == ["pi05", []]
