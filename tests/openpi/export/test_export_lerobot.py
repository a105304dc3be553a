"""`rlinf export --format lerobot`: lerobot's own loaders read it, and its policy acts as ours does."""

import json
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from saved_run import save_run
from tiny_lerobot import build, of_size, tiny_dimensions

from rlinf_core import UserError, cli
from rlinf_core.config.load import load_config
from rlinf_core.data.normalize import NormStats, load_norm_stats
from rlinf_core.data.transforms import SliceActions
from rlinf_core.inference import load_policy
from rlinf_core.publish.folder import check_folder
from rlinf_core.training.distributed.processes import processes
from rlinf_plugins_openpi.export import lerobot as lerobot_export
from rlinf_plugins_openpi.inputs.tokenizer import BOS, GEMMA_ENTRIES, SMALL_MODEL, load_processor
from rlinf_plugins_openpi.model import dimensions
from rlinf_plugins_openpi.model.parts import unpacked
from rlinf_plugins_openpi.model.pi0 import Pi0
from rlinf_plugins_openpi.weights.names import published_names
from rlinf_plugins_openpi.weights.saving import Entry

pytestmark = pytest.mark.skipif(
    not (find_spec("lerobot") and find_spec("transformers")),
    reason="needs lerobot, whose policies need transformers: uv sync --group test",
)

STATE_WIDTH, ACTION_WIDTH, HORIZON = 8, 7, 5
TOP, WRIST = "observation.images.top", "wrist"
IMAGES = f'{{ base_0_rgb = "{TOP}", left_wrist_0_rgb = "{WRIST}" }}'
RUN = """
[runner]
name = "run"
max_steps = 1
[data]
config_name = "pi05_maniskill"
repo_id = "lab/arm"
images = {images}
[policy]
weights = "random"
tokenizer = "{tokenizer}"
action_dim = 8
action_horizon = 5
max_token_len = 64
num_sampling_steps = 4
"""


def made_up_stats(width, generator):
    low = generator.normal(size=width)
    spread = np.append(generator.uniform(0.5, 2, width - 1), 0)  # The last number is a constant.
    return NormStats(mean=low + spread / 2, std=spread / 3, q01=low, q99=low + spread)


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch):
    monkeypatch.setattr(lerobot_export, "GEMMA_ENTRIES", 1)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A run of the published variant, in a tiny size; takes overrides, returns its config."""

    def saved(*overrides):
        size = tiny_dimensions(pi05="data.config_name=pi0_maniskill" not in overrides)
        monkeypatch.setitem(
            dimensions.VARIANTS,
            "base",
            dimensions.VariantSizes(size.vocab_size, size.vlm, size.expert, size.vision),
        )
        shutil.copy(SMALL_MODEL, tmp_path / "some.model")
        (tmp_path / "run.toml").write_text(RUN.format(images=IMAGES, tokenizer=tmp_path / "some.model"))
        run = load_config(tmp_path / "run.toml", [f"runner.output_dir={tmp_path / 'runs'}", *overrides])
        torch.manual_seed(0)
        module = Pi0(run.policy.dimensions)
        values = {name: 0.3 * torch.randn_like(parameter) for name, parameter in module.named_parameters()}
        generator = np.random.default_rng(0)
        stats = {"state": made_up_stats(STATE_WIDTH, generator), "actions": made_up_stats(ACTION_WIDTH, generator)}
        with processes("cpu") as group:
            save_run(run, values, stats, group)
        return run

    return saved


@pytest.fixture
def export(tmp_path, capsys):
    def export(run, *options, name="policy"):
        code = cli.main(["export", str(run.folder), "--output", str(tmp_path / name), *options])
        return code, tmp_path / name, "".join(capsys.readouterr())

    return export


class Tokenizer:
    """What lerobot downloads, with the small vocabulary. As in PaliGemma's, a newline is a token of its own."""

    def __call__(self, texts, max_length, padding_side, **options):
        assert (padding_side, options["padding"], options["truncation"]) == ("right", "max_length", True)
        ids, mask = torch.zeros(len(texts), max_length, dtype=torch.long), torch.zeros(len(texts), max_length)
        encode = load_processor(SMALL_MODEL).encode
        for row, text in enumerate(texts):
            bare = text.removesuffix("\n")
            found = [BOS, *encode(bare), *(encode("\n") if text != bare else [])][:max_length]
            ids[row, : len(found)], mask[row, : len(found)] = torch.tensor(found), 1
        return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def lerobot(monkeypatch):
    """Load a folder as lerobot does: its config, policy and pipelines."""
    from lerobot.policies import factory
    from lerobot.processor import tokenizer_processor

    class Hub:
        @staticmethod
        def from_pretrained(name):
            assert name == "google/paligemma-3b-pt-224"
            return Tokenizer()

    monkeypatch.setattr(tokenizer_processor, "AutoTokenizer", Hub)

    def load(folder, size):
        from lerobot.configs import PreTrainedConfig

        config = PreTrainedConfig.from_pretrained(folder)
        config.device = "cpu"
        with of_size(size):
            policy = factory.get_policy_class(config.type).from_pretrained(folder, config=config, strict=True)
        return policy, *factory.make_pre_post_processors(config, pretrained_path=str(folder))

    return load


def observation(seed=0):
    generator = np.random.default_rng(seed)
    return {
        TOP: generator.integers(0, 256, (224, 224, 3), np.uint8),
        WRIST: generator.integers(0, 256, (224, 224, 3), np.uint8),
        "observation.state": generator.normal(size=STATE_WIDTH).astype(np.float32),
        "task": "pick up the cube",
    }


def as_lerobot_hands_it_in(row):
    def picture(image):
        return torch.from_numpy(image).permute(2, 0, 1).float() / 255

    return {
        TOP: picture(row[TOP]),
        "observation.images.left_wrist_0_rgb": picture(row[WRIST]),
        "observation.state": torch.from_numpy(row["observation.state"]),
        "task": row["task"],
    }


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.config_name=pi0_maniskill"],
        ["policy.discrete_state_input=true"],
        ["policy.discrete_state_input=false"],
        ["data.relative=[true, false, true]"],
        ["data.raw_action_is_delta=false", "data.gripper=[1, 6]"],
    ],
    ids=["pi0", "pi05", "pi05 without state", "pi05 relative", "pi05 relative but for the gripper"],
)
def test_lerobots_policy_acts_as_ours(saved, export, lerobot, overrides):
    run = saved(*overrides)
    _, ours, _ = export(run)
    code, folder, said = export(run, "--format", "lerobot", name="lerobot")
    assert code == 0, said
    policy, before, after = lerobot(folder, run.policy.dimensions)
    noise = np.random.default_rng(1).normal(size=(HORIZON, run.policy.action_dim)).astype(np.float32)

    def act(seed):
        batch = before(as_lerobot_hands_it_in(observation(seed)))
        return after(policy.predict_action_chunk(batch, noise=torch.from_numpy(noise)[None]))[0].numpy()

    theirs = act(0)
    assert np.abs(theirs - act(1)).max() > 0.01
    np.testing.assert_allclose(theirs, load_policy(ours).infer(observation(), noise), rtol=1e-4, atol=1e-4)


def test_the_weights_are_loaded_strictly_and_to_the_bit(saved, export, lerobot):
    run = saved()
    _, folder, _ = export(run, "--format", "lerobot", "--dtype", "bf16")
    policy, _, _ = lerobot(folder, run.policy.dimensions)
    loaded = policy.state_dict()
    stored = run.policy.model_copy(update={"weights": str(folder)}).open_weights()
    stored.check({name: tuple(parameter.shape) for name, parameter in Pi0(run.policy.dimensions).named_parameters()})
    for name, published in published_names(run.policy.dimensions).items():
        theirs = loaded[f"model.{published}"]
        assert torch.equal(theirs.float(), stored.tensor(name).float()), name
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_pipelines_are_those_that_lerobot_would_write(saved, export, lerobot, tmp_path):
    from lerobot.policies.pi05.processor_pi05 import make_pi05_pre_post_processors

    run = saved("policy.discrete_state_input=true")
    _, folder, _ = export(run, "--format", "lerobot")
    weights = run.policy.model_copy(update={"weights": str(folder)})
    assert weights.contradictions(run.data, load_norm_stats(run.folder / "norm_stats.json")) == ()
    policy, *_ = lerobot(folder, run.policy.dimensions)
    statistics = {"observation.state": {"mean": torch.zeros(8)}, "action": {"mean": torch.zeros(7)}}
    for pipeline in make_pi05_pre_post_processors(policy.config, statistics):
        pipeline.save_pretrained(tmp_path / "theirs")
    for path in (tmp_path / "theirs").glob("*.json"):
        theirs, ours = json.loads(path.read_text()), json.loads((folder / path.name).read_text())
        for step in theirs["steps"] + ours["steps"]:
            step["config"].pop("eps", None)  # See lerobot_export._statistics.
            # What a step that is off would leave out: lerobot's own default names a joint.
            if step["registry_name"] == "relative_actions_processor":
                step["config"].pop("exclude_joints")
        assert ours == theirs
        states = {step["state_file"] for step in ours["steps"] if "state_file" in step}
        assert states == {file.name for file in folder.glob(f"{path.stem}*.safetensors")}


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_at_the_published_size_every_name_and_shape_is_lerobots(name):
    size = dimensions.Pi0Dimensions.of("base", pi05=name == "pi05", action_dim=32, action_horizon=50)
    with torch.device("meta"):
        ours = {
            key: Entry("F32", tuple(value.shape))
            for key, value in unpacked(dict(Pi0(size).named_parameters()), size).items()
        }
        theirs = build(size).state_dict()
    stored = lerobot_export.stored_entries(ours, size)
    assert {key: entry.shape for key, entry in stored.items()} == {
        f"model.{key}": tuple(value.shape) for key, value in theirs.items()
    }


@pytest.mark.parametrize(
    ("overrides", "complaints"),
    [
        (["policy.variant=dummy"], ["the published size only, and policy.variant is 'dummy'"]),
        (['data.state=["a", "b"]'], ["its state is one column, and data.state joins a, b"]),
        (["data.config_name=pi0_maniskill", "data.state=[]"], ["its π0 needs a state, and data.state is empty"]),
        (
            ["policy.variant=dummy", 'data.state=["a", "b"]'],
            ["the published size only, and policy.variant is 'dummy'; its state is one column"],
        ),
    ],
)
def test_what_lerobot_cannot_hold_is_said_and_nothing_is_written(saved, export, overrides, complaints):
    code, folder, said = export(saved(*overrides), "--format", "lerobot")
    assert code == 2
    assert "lerobot cannot represent this policy: " in said
    assert all(complaint in said for complaint in complaints)
    assert not folder.exists()


def test_transforms_without_a_step_are_named(saved):
    class Halve(SliceActions):
        pass

    run = saved()
    stats = load_norm_stats(run.folder / "norm_stats.json")
    data = run.data.model_copy()
    object.__setattr__(data, "transforms", lambda: (SliceActions(7), Halve(3)))
    with pytest.raises(UserError, match=r"it has no step for Halve of pi05_maniskill"):
        lerobot_export.read_features(run.policy, data, stats)


def test_a_tokenizer_other_than_paligemmas_is_refused(saved, monkeypatch):
    run = saved()
    monkeypatch.setattr(lerobot_export, "GEMMA_ENTRIES", GEMMA_ENTRIES)
    stats = load_norm_stats(run.folder / "norm_stats.json")
    with pytest.raises(UserError, match=r"tokenizer, and policy.tokenizer has 512 entries"):
        lerobot_export.read_features(run.policy, run.data, stats)


def test_what_no_file_of_lerobots_says_stands_in_the_readme(saved, export):
    run = saved("data.default_prompt=fold", "data.prompt_from_task=false", "data.stride=2")
    folder = export(run, "--format", "lerobot")[1]
    checked = check_folder(folder)
    assert (checked.problems, checked.card["library_name"]) == ([], "lerobot")
    assert {"lerobot", "robotics"} <= set(checked.card["tags"])
    page = (folder / "README.md").read_text()
    assert f"from lerobot.policies.{run.policy.type} import" in page
    assert f"`observation.images.left_wrist_0_rgb` is the training data's column `{WRIST}`" in page
    assert "`task` was always `fold`" in page
    assert "2 frames of the training data apart" in page
