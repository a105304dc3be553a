"""`rlinf new-plugin` writes a package that installs, conforms and trains; what it cannot know it marks."""

import importlib
import json
import runpy
import sys
import tomllib

import pytest
from distributions import entry_point, repository_entry_points
from fake_hub import point_to, serve
from huggingface_hub import constants

from rlinf_core import UserError, cli, train
from rlinf_core.config.load import load_config
from rlinf_core.plugins.registry import DATASET_GROUP, Plugins, get_plugins
from rlinf_core.testing import write_tiny_dataset
from rlinf_plugins_openpi.scaffold.new_plugin import package_names, write_package
from rlinf_plugins_openpi.scaffold.proposal import propose

METAWORLD = "examples/data/metaworld_3tasks"
JOINTS = [*(f"joint_{i}" for i in range(3)), "gripper"]


def image(*shape):
    return {"dtype": "video", "shape": list(shape or (48, 64, 3)), "names": ["height", "width", "channels"]}


def numbers(names, width=None, dtype="float32"):
    return {"dtype": dtype, "shape": [width or len(names)], "names": names}


ARM = {
    "observation.state": numbers(JOINTS),
    "action": numbers(JOINTS),
    "timestamp": numbers(None, 1),
    "next.reward": numbers(None, 1),
    "index": numbers(None, 1, "int64"),
}


def cameras(*columns):
    return propose("lab/arm", {column: image() for column in columns} | ARM)


@pytest.mark.parametrize(
    ("columns", "base", "left", "right"),
    [
        (["front"], "front", None, None),
        (["wrist", "front"], "front", "wrist", None),
        (["cam_right_wrist", "cam_left_wrist", "cam_high"], "cam_high", "cam_left_wrist", "cam_right_wrist"),
        (["exterior_image_1_left", "wrist_image_left"], "exterior_image_1_left", "wrist_image_left", None),
        (["top", "side"], "top", "side", None),
        (["hand_right"], None, None, "hand_right"),
        (["left", "right", "head"], "head", "left", "right"),
    ],
)
def test_cameras_are_placed_by_their_names(columns, base, left, right):
    named = {"base_0_rgb": base, "left_wrist_0_rgb": left, "right_wrist_0_rgb": right}
    assert cameras(*columns).images == {camera: column for camera, column in named.items() if column}


def test_more_than_three_cameras_and_depth_are_left_over():
    features = {name: image() for name in ("a", "b", "c", "d")} | {"e": image(48, 64, 1), "depth": image()} | ARM
    features["b"] = {"dtype": "image"}  # Without a shape, which nothing else needs.
    found = propose("lab/arm", features)
    assert list(found.images.values()) == ["a", "b", "c"]
    assert found.other_images == ("d", "e", "depth")


@pytest.mark.parametrize(
    "names", [JOINTS, [JOINTS], {"motors": JOINTS}, {name: i for i, name in enumerate(JOINTS)}], ids=str
)
def test_every_way_of_naming_numbers_is_read(names):
    found = propose("lab/arm", ARM | {"front": image(), "action": numbers(names, 4)})
    assert found.actions[0].names == tuple(JOINTS)
    assert found.gripper == (3,)


def test_columns_of_their_own_are_put_together():
    features = {
        "image": image(),
        "joint_position": numbers(["a", "b"]),
        "gripper_position": numbers(["position"]),
        "action.arm": numbers(["a", "b"]),
        "action.gripper": numbers(None, 1),
    }
    found = propose("lab/arm", features)
    assert [vector.column for vector in found.state] == ["joint_position", "gripper_position"]
    assert [vector.column for vector in found.actions] == ["action.arm", "action.gripper"]
    assert found.gripper == (2,)


@pytest.mark.parametrize(
    ("column", "names", "is_delta", "evidence"),
    [
        ("action", JOINTS, False, "have the same names as those of the state"),
        ("action", ["delta_x", "dy", "gripper"], True, "displacements or velocities (delta_x, dy)"),
        ("action.joint_velocity", ["a", "b"], True, "displacements or velocities (action.joint_velocity)"),
        ("action", ["a", "b"], True, "The names give no evidence."),
        ("action", None, True, "The names give no evidence."),
    ],
)
def test_what_actions_are_is_taken_from_names_and_said(column, names, is_delta, evidence):
    features = {key: feature for key, feature in ARM.items() if key != "action"}
    found = propose("lab/arm", features | {"front": image(), column: numbers(names, None if names else 4)})
    assert found.is_delta is is_delta
    assert evidence in found.evidence


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (ARM, "has no camera"),
        ({"front": image(), "observation.state": numbers(JOINTS)}, "looks like the action"),
        ({"front": image(), "action": numbers(JOINTS)}, "looks like the state"),
    ],
)
def test_what_cannot_be_a_format_is_refused_with_the_columns(features, message):
    with pytest.raises(UserError, match=message) as error:
        propose("lab/arm", features)
    assert all(name in str(error.value) for name in features)


@pytest.fixture(scope="module")
def absolute(tmp_path_factory):
    """A dataset whose actions look like target positions."""
    root = tmp_path_factory.mktemp("absolute") / "data"
    write_tiny_dataset(root, vectors={"observation.state": 7, "action": 7}, lengths=[12, 9])
    info = json.loads((root / "meta" / "info.json").read_text())
    for column in ("observation.state", "action"):
        info["features"][column]["names"] = [*(f"joint_{i}" for i in range(6)), "gripper"]
    (root / "meta" / "info.json").write_text(json.dumps(info))
    return root


@pytest.fixture
def installed(monkeypatch):
    """Let this process find a written package, as after `pip install -e`."""
    project = []

    def install(folder):
        table = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        monkeypatch.syspath_prepend(str(folder))
        offered = table["entry-points"][DATASET_GROUP].items()
        entries = [entry_point(DATASET_GROUP, name, value, table["name"]) for name, value in offered]
        project.extend(value.partition(":")[0] for _, value in offered)
        plugins = Plugins([*repository_entry_points(), *entries], strict=True)
        monkeypatch.setattr(Plugins, "load", classmethod(lambda cls: plugins))
        get_plugins.cache_clear()
        return plugins

    yield install
    get_plugins.cache_clear()
    for module in project:
        sys.modules.pop(module, None)


def run_its_test(folder, module):
    importlib.invalidate_caches()
    tests = runpy.run_path(str(folder / f"test_{module}.py"))
    tests["test_the_format_conforms_and_the_data_fit"]()


@pytest.mark.parametrize("policy", ["pi05", "pi0"])
def test_what_is_written_conforms_and_trains(policy, absolute, installed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new-plugin", "arm-pick", "--from", str(absolute), "--policy", policy]) == 0
    assert "2. pip install -e arm-pick" in capsys.readouterr().out
    folder = tmp_path / "arm-pick"
    plugins = installed(folder)
    run_its_test(folder, "arm_pick")
    assert "ArmPick conforms" in (report := capsys.readouterr().out)
    assert "not checked" not in report
    config = load_config(folder / "train.toml", [], plugins)
    assert (config.data.raw_action_is_delta, config.data.gripper) == (False, (6,))
    assert (config.policy.type, config.policy.action_horizon) == (policy, 10)
    if policy == "pi05":
        assert train.main([str(folder / "train.toml")]) == 0
        assert len((tmp_path / "runs" / "arm_pick_try" / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_file_says_which_number_is_which_and_what_to_check(tmp_path):
    write_package("sawyer-pick", METAWORLD, "pi05", tmp_path / "p")
    text = (tmp_path / "p" / "sawyer_pick.py").read_text()
    assert "# action: 0 dx, 1 dy, 2 dz, 3 gripper_effort\n" in text
    assert "raw_action_is_delta: bool = True" in text
    assert text.count("# CHECK") == 3
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "repo_id" not in text  # A folder of this machine is nobody else's.


def test_names_that_no_package_can_have_are_refused():
    assert package_names("Franka-Pick.v2", "pi0") == (
        "Franka-Pick.v2",
        "franka_pick_v2",
        "FrankaPickV2",
        "pi0_franka_pick_v2",
    )
    assert package_names("pi05-arm", "pi05").config_name == "pi05_arm"
    for name in ("", "2arms", "arm pick", "class", "../arm", "arm-", "ärm"):
        with pytest.raises(UserError, match="cannot be the name of a package"):
            package_names(name, "pi05")


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("libero", "pi05_libero is taken: rlinf-plugins-openpi"),
        ("numpy", "numpy is taken"),
        ("json", "Python's standard library"),
    ],
)
def test_names_that_are_taken_are_refused(name, taken, tmp_path):
    with pytest.raises(UserError, match=taken):
        write_package(name, METAWORLD, "pi05", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_nothing_is_overwritten_and_nothing_is_left_half_written(tmp_path, monkeypatch):
    (tmp_path / "p").mkdir()
    with pytest.raises(UserError, match="is already there: name another folder with --output"):
        write_package("arm-pick", METAWORLD, "pi05", tmp_path / "p")
    monkeypatch.setattr("rlinf_plugins_openpi.scaffold.new_plugin.package_files", lambda form: {"a/b": ""})
    with pytest.raises(UserError, match=r"q cannot be written: No such file or directory\. Name another folder"):
        write_package("arm-pick", METAWORLD, "pi05", tmp_path / "q")
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_of_a_dataset_on_the_hub_only_the_metadata_are_downloaded(absolute, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serve(absolute) as hub:
        point_to(monkeypatch, hub.address)
        write_package("arm-pick", "lab/arm", "pi05", tmp_path / "p")
    assert {path.partition("/")[0] for path in hub.got()} == {"meta"}
    assert 'repo_id: str = "lab/arm"' in (tmp_path / "p" / "arm_pick.py").read_text()
    assert tomllib.loads((tmp_path / "p" / "train.toml").read_text())["data"]["repo_id"] == "lab/arm"


@pytest.mark.parametrize("dataset", ["no/such/folder", "{empty}", "lab/arm"])
def test_what_is_no_dataset_is_one_message(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    dataset = dataset.format(empty=tmp_path)
    assert cli.main(["new-plugin", "arm-pick", "--from", dataset, "--output", str(tmp_path / "p")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert dataset in line
    assert "--from" in line
    assert not (tmp_path / "p").exists()
