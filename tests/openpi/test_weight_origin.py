"""What lies beside weights is compared with the run: statistics, horizon, normalisation, actions, cameras, prompts."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from damaging import damaged, examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from rlinf_core.data.normalize import NormStats, save_norm_stats
from rlinf_plugins_openpi.config import Pi0Config, Pi05Config
from rlinf_plugins_openpi.datasets.metaworld import Pi05MetaworldConfig

DATA = Pi05MetaworldConfig(repo_id="me/drawers")


def stats(scale=1.0, shift=0.0, width=4):
    """Numbers with mean `shift` and standard deviation `scale`."""
    one = np.ones(width)
    return {
        key: NormStats(shift * one, scale * one, (shift - 2 * scale) * one, (shift + 2 * scale) * one) for key in KEYS
    }


KEYS = ("state", "actions")


def findings(folder, kind=Pi05Config, ours=None, data=DATA, **fields):
    policy = kind(variant="dummy", weights=str(folder), **({"action_horizon": 5, "action_dim": 4} | fields))
    return policy.contradictions(data, stats() if ours is None else ours)


def ids(*arguments, **fields):
    return [one.id for one in findings(*arguments, **fields)]


def lerobot(folder, **changes):
    """lerobot's config.json of a policy that fits the run, with changes."""
    config = {
        "type": "pi05",
        "chunk_size": 5,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"},
        "tokenizer_max_length": 200,
        "use_relative_actions": False,
        "input_features": {
            "observation.images.base_0_rgb": {"type": "VISUAL", "shape": [3, 224, 224]},
            "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 224, 224]},
            "observation.state": {"type": "STATE", "shape": [4]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [32]}},
    }
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_lerobots_config_is_compared(tmp_path):
    lerobot(tmp_path)
    assert ids(tmp_path) == []
    for change, id, said in [
        ({"chunk_size": 50}, "weights-horizon", "trained on chunks of 50 actions"),
        (
            {"normalization_mapping": {"STATE": "MEAN_STD", "ACTION": "QUANTILES"}},
            "weights-normalization",
            "normalised by STATE MEAN_STD",
        ),
        ({"use_relative_actions": True}, "weights-relative-actions", "actions relative to the state"),
        ({"tokenizer_max_length": 48}, "weights-prompt", "up to 48 tokens"),
        (
            {"input_features": {"observation.images.front": {"type": "VISUAL"}}},
            "weights-cameras",
            "observation.images.front",
        ),
        ({"output_features": {"action": {"shape": [7]}}}, "weights-width", "trained on 7 numbers"),
    ]:
        lerobot(tmp_path, **change)
        (found,) = findings(tmp_path)
        assert found.id == id
        assert said in found.message
        assert str(tmp_path / "config.json") in found.message
    assert ids(tmp_path, kind=Pi0Config, max_token_len=200) == ["weights-normalization", "weights-width"]


@pytest.mark.parametrize(
    "place", ["norm_stats.json", "assets/drawers/norm_stats.json", "assets/me/drawers/norm_stats.json"]
)
def test_statistics_beside_the_weights_are_compared(tmp_path, place):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "rlinf.json").write_text("{}")
    for change, apart in ((stats(1.05, 0.05), None), (stats(1.0, 3.0), 1.5), (stats(2.0), 0.5)):
        save_norm_stats(tmp_path / place, change)
        found = findings(tmp_path)
        assert [one.id for one in found] == ["weights-statistics"] * (0 if apart is None else 2)
        for one in found:
            assert f"differ by up to {apart:.3g} normalised units" in one.message
            assert f'data.norm_stats = "{tmp_path / place}"' in one.way_out
            assert one.dimensions == (0, 1, 2, 3)
    save_norm_stats(tmp_path / place, stats(width=7, shift=1.0))
    assert ids(tmp_path) == ["weights-width"] * 2
    padded = {key: NormStats(*(np.pad(v, (0, 28)) for v in vars(one).values())) for key, one in stats().items()}
    save_norm_stats(tmp_path / place, padded)
    assert ids(tmp_path) == []


def test_a_base_model_has_the_statistics_of_many_robots(tmp_path):
    for robot in ("droid", "trossen"):
        (tmp_path / "assets" / robot).mkdir(parents=True)
        save_norm_stats(tmp_path / "assets" / robot / "norm_stats.json", stats(9.0))
    assert ids(tmp_path) == []


def test_lerobots_processors_are_compared(tmp_path):
    steps = [{"registry_name": "normalizer_processor", "state_file": "normalizer.safetensors"}]
    steps += [{"registry_name": "relative_actions_processor", "config": {"enabled": True}}]
    (tmp_path / "policy_preprocessor.json").write_text(json.dumps({"steps": steps}))
    numbers = {
        f"{name}.{kind}": value.astype(np.float32)
        for name, one in zip(("observation.state", "action"), stats(1.0, 4.0).values(), strict=True)
        for kind, value in vars(one).items()
        if not kind.startswith("q")  # As older ones are.
    }
    save_file(numbers, tmp_path / "normalizer.safetensors")
    found = findings(tmp_path)
    assert [one.id for one in found] == ["weights-relative-actions", "weights-statistics", "weights-statistics"]
    assert "differ by up to 4 standard deviations" in found[1].message
    assert "rlinf norm-stats --import" in found[1].way_out


def test_what_export_wrote_is_compared(tmp_path):
    policy = {"action_horizon": 10, "discrete_state_input": False, "max_token_len": 200, "freeze": "vlm"}
    data = DATA.model_dump(mode="json", exclude_none=True) | {"stride": 2, "repo_id": "other"}
    data["images"] = {"base_0_rgb": "front", "left_wrist_0_rgb": "wrist"}
    for table in (data, {"mixture": [{"name": "x", "config_name": "other"}, data | {"name": "a"}]}):
        description = {"format": 1, "policy": policy, "data": table}
        (tmp_path / "rlinf.json").write_text(json.dumps(description))
        found = findings(tmp_path, discrete_state_input=True)
        assert [one.id for one in found] == ["weights-horizon", "weights-prompt", "weights-cameras", "weights-data"]
        assert "policy.action_horizon = 10 (" in found[0].message
        assert found[1].way_out == "Set policy.discrete_state_input = false"
        assert "base_0_rgb, left_wrist_0_rgb (" in found[2].message
        assert "data.stride = 2 (" in found[3].message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    lerobot(folder)
    return folder


@examples(30)
@given(st.data())
def test_files_that_cannot_be_read_are_passed_over(folder, data):
    described = {"policy": {"action_horizon": 5}, "data": DATA.model_dump(mode="json") | {"mixture": [{"name": "a"}]}}
    processor = {"steps": [{"registry_name": "normalizer_processor", "state_file": "x", "config": {"enabled": True}}]}
    config = json.loads((folder / "config.json").read_text())
    with TemporaryDirectory() as place:
        for name, document in (
            ("rlinf.json", described),
            ("policy_preprocessor.json", processor),
            ("config.json", config),
        ):
            Path(place, name).write_text(json.dumps(data.draw(damaged(document))))
        findings(place)
