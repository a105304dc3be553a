"""What rows mean, as people have it: prompts in other columns, other joints, angles that wrap, splits, rates."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from damaging import complaint
from field_datasets import (
    CAMERA,
    CHUNK,
    edit_info,
    set_columns,
    write_dataset,
    write_episodes,
    write_lines,
    write_video,
)

from rlinf_core.contract.datasets import LeRobotDatasetConfig, TimedSource
from rlinf_core.data.check.files import check_files
from rlinf_core.data.images.still import describe_still
from rlinf_core.data.lerobot.metadata import load_info, read_metadata
from rlinf_core.data.lerobot.modality import with_part_names
from rlinf_core.data.lerobot.prompts import prompts_of
from rlinf_core.data.lerobot.source import open_lerobot
from rlinf_core.data.normalize import Origin, load_norm_stats
from rlinf_core.data.statistics.compute import summarize
from rlinf_core.data.statistics.meaning import diagnose_meaning, diagnose_quantiles, listed
from rlinf_core.data.statistics.rates import compare_rates
from rlinf_core.data.statistics.relative import diagnose_relative, mismatches
from rlinf_core.data.transforms import RelativeActions
from rlinf_core.errors import UserError
from rlinf_core.inspect.views import still_among

TEXTS = ("pick the cube", "valid")


def config(root, **settings):
    return LeRobotDatasetConfig(**{"repo_id": str(root), "images": {}, "decoder": "pyav"} | settings)


def opened(root, split="train", **settings):
    return open_lerobot(config(root, **settings), 2, split)


def meaning(root, **settings):
    """Findings about prompts and splits, by their id."""
    data = config(root, **settings)
    found = diagnose_meaning(data, open_lerobot(data, 2, "train"), [data.repack()])
    assert all(one.severity == "warning" and not one.key for one in found)
    return {one.id: f"{one.message}. {one.way_out}" for one in found}


def relative(root, mask):
    """Findings about relative actions, by their id."""
    data = config(root)
    source = open_lerobot(data, 2, "train")
    transforms = [data.repack(), RelativeActions(mask)]
    names = {"state": source.names_of(data.state), "actions": source.names_of(data.actions)}
    return {one.id: one for one in diagnose_relative(source, transforms, names, summarize(source, transforms))}


def prompts(root, **settings):
    source = opened(root, **settings)
    return source.columns(range(len(source)))["task"]


# Prompts


def test_rows_without_a_text_are_counted_after_the_default_prompt(tmp_path):
    """droid-dataset/droid#3: a third of the episodes has no sentence."""
    root = write_dataset(tmp_path / "silent", (6, 5, 7, 4), tasks=[0, 1, 2, 0], texts=("fold the towel", "", "  "))
    found = meaning(root)["empty-prompts"]
    assert "12 of 22 rows, in 2 of 4 episodes, have no text" in found
    assert "data.default_prompt" in found
    assert "data.exclude_episodes = [1, 2]" in found
    assert meaning(root, default_prompt="fold it") == {}
    assert meaning(root, exclude_episodes=(1, 2)) == {}
    data = config(root, default_prompt="fold it")
    blank = open_lerobot(data, 2, "train").without_images([6, 11])
    assert [data.repack()(row)["prompt"] for row in blank] == ["fold it", "fold it"]


def test_a_prompt_column_of_numbers_indexes_the_tasks(tmp_path):
    """GR00T: several columns index tasks."""
    root = write_dataset(tmp_path / "gr00t", (6, 5, 7), tasks=[1, 1, 1], texts=(*TEXTS, "open the door"))
    same, other = [1] * 18, [0] * 6 + [2] * 12
    set_columns(root, **{"annotation_human.validity": same, "annotation_human.action.task_description": other})
    found = meaning(root)["other-prompts"]
    assert "annotation.human.action.task_description ('pick the cube')" in found
    assert "validity" not in found  # Its texts are those of task_index.
    column = "annotation.human.action.task_description"
    assert f"data.prompt_column = '{column}'" in found
    assert meaning(root, prompt_column="task_index") == meaning(root, prompt_column=column) == {}
    assert prompts(root) == ["valid"] * 18
    assert prompts(root, prompt_column=column) == ["pick the cube"] * 6 + ["open the door"] * 12
    source = opened(root, prompt_column=column, tasks=("open the door",))
    assert sorted(set(source.episodes.tolist())) == [1, 2]
    assert source.fingerprint() != opened(root, tasks=("valid",), exclude_episodes=(0,)).fingerprint()
    assert opened(root).fingerprint() == opened(root, prompt_column="task_index").fingerprint()
    assert "prompt_column" not in config(root).model_dump(exclude_none=True)  # Runs of before it existed continue.
    set_columns(root, **{"annotation_human.action.task_description": [7] * 18})
    with pytest.raises(UserError, match=r"episode 0, frame 0, has the task 7, which meta/tasks\.parquet does not list"):
        opened(root, prompt_column=column)
    assert "other-prompts" not in meaning(root)  # It indexes another table.


def test_a_prompt_column_of_texts_is_the_prompt(tmp_path):
    """DROID's and Open X-Embodiment's conversions: language_instruction, language_instruction_2, ..."""
    root = write_dataset(tmp_path / "droid", (6, 5, 7), tasks=[0, 1, 1], texts=("", "valid"))
    said = ["pour"] * 6 + ["a wipe"] * 5 + ["pour"] * 7
    set_columns(root, language_instruction=said, language_instruction_2=[""] * 18, camera_serial=["7"] * 18)
    found = meaning(root)
    assert "language_instruction ('pour')" in found["other-prompts"]
    assert "_2" not in found["other-prompts"]  # Empty, as in most of DROID.
    assert "serial" not in found["other-prompts"]
    assert prompts(root, prompt_column="language_instruction") == said
    (root / "meta/tasks.parquet").unlink()
    assert prompts(root, prompt_column="language_instruction", tasks=("a wipe",)) == ["a wipe"] * 5
    held = opened(
        root, "validation", prompt_column="language_instruction", validation_tasks=("pour",), episodes=("0-1",)
    )
    assert held.episodes.tolist() == [0] * 6
    with pytest.raises(UserError, match=r"data\.tasks names 1, but data\.prompt_column contains texts"):
        opened(root, prompt_column="language_instruction", tasks=(1,))
    with pytest.raises(UserError, match=r"data\.prompt_column names 'action', which contains float32"):
        opened(root, prompt_column="action")
    with pytest.raises(UserError, match=r"'language_instructions', .*columns are language_inst"):
        opened(root, prompt_column="language_instructions")
    with pytest.raises(ValueError, match="no effect with prompt_from_task = false"):
        config(root, prompt_column="language_instruction", prompt_from_task=False, default_prompt="go")


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (["a", None, "b", "a"], ["a", "", "b", "a"]),
        ([["a"], ["b"], None, ["a"]], ["a", "b", "", "a"]),
        ([b"a", b"b"], ["a", "b"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        ([], []),
        ([3.0, 4.0], [3, 4]),
        ([[3], [4]], [3, 4]),
        ([0.5], "contains 0.5, which is not the number of a task"),
        ([float("nan")], "contains nan, which is not the number of a task"),
        ([b"\xff"], "does not contain one text in UTF-8"),
        ([["a"], []], "does not contain one text"),
        ([{"role": "user"}], "contains struct"),
        ([None, 3], "has no value in row 0"),
    ],
)
def test_prompts_are_numbers_or_texts(column, expected):
    def read():
        numbers, texts = prompts_of(pa.chunked_array([pa.array(column, *kind)]), "it")
        return [texts[number] for number in numbers] if texts is not None else numbers.tolist()

    kind = [pa.string()] if column == [] else []
    if isinstance(expected, str):
        with pytest.raises(UserError, match=re.escape(expected)):
            read()
    else:
        assert read() == expected


def test_tasks_of_episodes_that_are_not_those_of_their_frames_are_noted(tmp_path):
    lengths = (6, 5, 7)
    root = write_dataset(tmp_path / "v3", lengths, tasks=[0, 1, 0], texts=TEXTS)
    write_episodes(root, lengths, 10, tasks=[[TEXTS[0], "more"], [TEXTS[0]], [TEXTS[0]]])
    damage = check_files(read_metadata("it", root), cameras=[], vectors=[])
    assert damage.ok
    (finding,) = (one for one in damage.listed if one.kind == "other_task")
    assert str(finding) == (
        "meta/episodes, episode 1: lists the task 'pick the cube', but frames of the episode have 'valid': prompts "
        "follow the frames"
    )
    root = write_dataset(tmp_path / "v2", lengths, version="v2.1", tasks=[0, 1, 0], texts=TEXTS)
    lines = [{"episode_index": e, "length": n, "tasks": [TEXTS[e == 1]]} for e, n in enumerate(lengths)]
    write_lines(root / "meta/episodes.jsonl", lines)
    assert not check_files(read_metadata("it", root), cameras=[], vectors=[]).counts["other_task"]


# Splits


def test_episodes_of_a_validation_split_that_are_trained_on_are_named(tmp_path):
    root = write_dataset(tmp_path / "splits", (6, 5, 7, 4))
    edit_info(root, splits={"train": "0:2", "val": "2:4"})
    found = meaning(root)["split-trained-on"]
    assert "2 of the training episodes, [2, 3], as the split 'val'" in found
    assert "data.validation_episodes = [2, 3]" in found
    assert meaning(root, validation_episodes=(2, 3)) == {}
    assert "[3]" in meaning(root, validation_episodes=(2,))["split-trained-on"]
    edit_info(root, splits={"train": "0:100", "test_unseen": "3:100", "validation": "50:60", "evil": "0:1"})
    assert "data.exclude_episodes = [3] leaves" in meaning(root)["split-trained-on"]
    edit_info(root, splits={"train": "0:100"})  # GR00T's reach beyond the data.
    assert meaning(root) == {}
    for splits in (None, [], "0:4", {"val": 3, "test": [1], "dev": "1:", "eval": "3:1"}):
        edit_info(root, splits=splits)
        assert meaning(root) == {}
    assert listed([9, 4, 5, 6, 1, 2]) == '[1, 2, "4-6", 9]'
    assert config(root, validation_episodes=(0, "2-3")).validation_episodes == (0, 2, 3)
    for wrong in ("3-2", "0-99999999999"):
        with pytest.raises(ValueError, match="is not a range of episodes"):
            config(root, validation_episodes=(wrong,))


# Relative actions

ALOHA = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper"]
SO100 = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
LEFT, RIGHT = ([f"{side}_{n}" for n in SO100] for side in ("left", "right"))
PIPER = [f"joint_{i}" for i in range(6)] + ["gripper"]
LIBERO = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]


@pytest.mark.parametrize(
    ("state", "action", "wrong"),
    [
        ([f"{n}.pos" for n in SO100], [f"{n}.pos" for n in SO100], []),
        ([f"main_{n}" for n in SO100], [f"{n}.pos" for n in SO100], []),
        (LEFT + RIGHT, LEFT + RIGHT, []),
        (ALOHA, ALOHA, []),
        ([*LIBERO, "gripper"], LIBERO, []),
        ([f"motor_{i}" for i in range(7)], SO100, []),
        (["kLeftShoulderPitch", "kLeftElbow"], ["left_shoulder_pitch", "left_elbow"], []),
        ([f"joint_{i}" for i in range(6)], [f"joint_{i}" for i in range(1, 7)], []),
        ([f"joint_{i}.pos" for i in range(7)], PIPER, []),  # The last is called otherwise, and may be the same.
        (["x", "y", "z", "rx", "ry", "rz"], LIBERO[:6], []),
        ([*PIPER[:6], "x", "y"], [*PIPER[:6], "x_target"], []),
        (["arm_x.vel", "arm_x.pos"], ["arm_x.vel", "arm_x.pos"], []),
        ([*SO100[:4], "wrist_roll", "gripper"], ["pan", "lift", "flex", "pitch", "roll", "jaw"], []),
        ([f"joint_pos_{i}" for i in range(3)] + ["joint_vel_0"], [f"action_joint_{i}" for i in range(3)], []),
        (["eef_pos_x", "eef_pos_y", "eef_pos_z", "eef_axisangle_x"], ["dx", "dy", "dz", "dax"], []),
        (["left_arm_ee_pos_x", "left_arm_ee_rot_quat_x"], ["left_arm_ee_pos_x", "left_arm_ee_rot_quat_x"], []),
        ([], SO100, []),
        (PIPER, [*PIPER[:5], "gripper"], [5]),
        (["x", "y", "z", "rx", "ry", "rz", "rw", "gripper"], LIBERO, [6]),
        (LEFT + RIGHT, RIGHT + LEFT, list(range(12))),
        (["joint_1", "joint_2", "joint_3"], ["joint_3", "joint_1", "joint_2"], [0, 1, 2]),
        (PIPER, LIBERO, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_names_show_what_is_subtracted(state, action, wrong):
    width = max(len(state), len(action), 1)
    assert mismatches(state, action, np.ones(width, np.bool_)) == wrong
    assert mismatches(state, action, np.zeros(width, np.bool_)) == []


def walk(lengths, change):
    """State and action of smooth episodes; `change` turns three numbers and the next ones into those of a row."""
    states, actions = [], []
    for episode, length in enumerate(lengths):
        path = np.cumsum(np.random.default_rng(episode).normal(0.03, 0.01, (length + 1, 3)), axis=0)
        rows = [change(position) for position in path]
        states += [row.tolist() for row in rows[:-1]]
        actions += [row.tolist() for row in rows[1:]]
    return {"observation_state": states, "action": actions}


def test_a_number_that_is_subtracted_from_another_is_named(tmp_path):
    """huggingface/lerobot#3863: state and action hold the same joints in another order."""
    names = {"observation.state": ["elbow.pos", "wrist.pos", "gripper.pos"]}
    names["action"] = ["gripper.pos", "elbow.pos", "wrist.pos"]
    root = write_dataset(tmp_path / "order", (40, 40))
    set_columns(root, names, **walk((40, 40), np.asarray))
    found = relative(root, (True, True, False))
    assert set(found) == {"relative-other-name"}
    one = found["relative-other-name"]
    assert (one.key, one.dimensions) == ("actions", (0, 1))
    assert "'gripper.pos' minus 'elbow.pos' at 0 (it is 2 in the state)" in one.message
    assert "data.relative" in one.way_out
    assert relative(root, (False, False, False)) == {}


@pytest.mark.parametrize("half", [np.pi, 180.0])
def test_angles_that_wrap_are_found(tmp_path, half):
    """huggingface/lerobot#3983: a yaw near half a turn."""
    root = write_dataset(tmp_path / "yaw", (80, 80))

    def wrapped(position):
        yaw = half - 0.4 * half + position[2] / np.pi * half
        return np.array([position[0], 2 * np.pi * position[1], (yaw + half) % (2 * half) - half])

    set_columns(root, **walk((80, 80), wrapped))
    found = relative(root, (True, True, True))
    assert set(found) == {"relative-angle-jumps"}
    assert found["relative-angle-jumps"].dimensions == (2,)
    assert "rotation_format" in found["relative-angle-jumps"].way_out
    assert relative(root, (True, True, False)) == {}


def test_quaternions_whose_sign_flips_are_found(tmp_path):
    root = write_dataset(tmp_path / "quaternion", (80, 80))

    def turned(position, sign=True):
        quaternion = np.array([np.cos(position[2]), np.sin(position[2]), 0.1, 0.0])
        quaternion /= np.linalg.norm(quaternion) * (np.sign(np.sin(9 * position[2])) or 1 if sign else 1)
        return np.array([*position[:2], *quaternion])

    set_columns(root, **walk((80, 80), turned))
    found = relative(root, (True,) * 6)
    assert set(found) == {"relative-quaternion-flips"}
    assert found["relative-quaternion-flips"].dimensions == (2, 3, 4, 5)
    set_columns(root, **walk((80, 80), lambda position: turned(position, sign=False)))
    assert relative(root, (True,) * 6) == {}


# Names of slices


def test_slices_of_modality_json_name_numbers_that_are_only_counted(tmp_path):
    root = write_dataset(tmp_path / "modality")
    generic = {name: [f"motor_{i}" for i in range(3)] for name in ("observation.state", "action")}
    set_columns(root, generic)
    parts = {"arm": {"start": 0, "end": 2}, "gripper": {"start": 2, "end": 3}}
    (root / "meta/modality.json").write_text(json.dumps({"state": parts, "action": {"arm": parts["arm"]}}))
    source = opened(root)
    assert source.names_of(["observation.state"]) == ("arm[0]", "arm[1]", "gripper")
    assert source.names_of(["action"]) == ("motor_0", "motor_1", "motor_2")  # Not all of them have a slice.
    set_columns(root, {"observation.state": ["x", "y", "z"]})
    assert opened(root).names_of(["observation.state"]) == ("x", "y", "z")
    features = load_info("it", root).features
    for damaged in ("", "[]", "{", '{"state": 3}', '{"state": {"a": {"start": -1, "end": 9e9}, "b": [0]}}'):
        (root / "meta/modality.json").write_text(damaged)
        assert complaint(lambda: with_part_names(root, features)) is None
        assert with_part_names(root, features) == features
        assert meaning(root) == {}


# Rates


def mixture(root, *rates, strides=(1, 1, 1)):
    """Sources of a mixture, whose policy predicts four actions."""
    sources = []
    for rate, stride in zip(rates, strides, strict=False):
        folder = root / str(rate)
        if not folder.exists():
            edit_info(write_dataset(folder), fps=rate)
        data = config(folder, stride=stride, match_frames="number")
        run = SimpleNamespace(data=data, policy=SimpleNamespace(chunk_length=lambda: 4))
        sources.append((SimpleNamespace(name=f"at{rate}", run=run), open_lerobot(data, 4, "train")))
    assert all(isinstance(rows, TimedSource) for _, rows in sources)
    return sources


def test_chunks_of_different_length_in_a_mixture_are_found(tmp_path):
    """TensorAuto/OpenTau#323: datasets of 10 and 30 Hz."""
    (found,) = compare_rates(mixture(tmp_path, 10, 30))
    assert "0.4 s in at10 (10 Hz), 0.133 s in at30 (30 Hz)" in found
    assert "data.mixture.1.stride = 3 evens them" in found
    assert compare_rates(mixture(tmp_path, 10, 30, strides=(1, 3))) == []
    assert compare_rates(mixture(tmp_path, 29.97, 30)) == compare_rates(mixture(tmp_path, 10)) == []
    (found,) = compare_rates(mixture(tmp_path, 10, 15))
    assert "data.mixture.0.stride = 2 and data.mixture.1.stride = 3 evens them" in found
    (found,) = compare_rates(mixture(tmp_path, 30, 30, 10, strides=(2, 1, 1)))
    assert "data.mixture.0.stride = 6 and data.mixture.1.stride = 6 and data.mixture.2.stride = 2 evens" in found


# Cameras


def test_a_camera_that_never_changes_is_found_when_videos_are_decoded(tmp_path):
    root = write_dataset(tmp_path / "camera")
    source = opened(root, images={"front": CAMERA})
    assert source.try_decoder()
    assert source.still_images() == {}
    write_video(root / f"videos/{CAMERA}/{CHUNK}/file-000.mp4", [7] * 18)
    source = opened(root, images={"front": CAMERA})
    assert source.still_images() == {}  # Nothing has been decoded.
    source.try_decoder()
    assert source.still_images() == {CAMERA: "never changes"}


def test_images_are_still_if_all_are_the_same():
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    black = np.zeros((8, 8, 3), np.uint8)
    assert describe_still([noise, noise, noise]) == "never changes"
    assert describe_still([black, black + 2, black]) == "is black"
    moved = noise.copy()
    moved[3, 3] += 20
    assert describe_still([noise, noise, moved]) == ""
    assert describe_still([noise, noise]) == ""  # Too few.


def test_the_page_warns_of_cameras_that_are_the_same_in_all_samples():
    def shown(pixels):
        return SimpleNamespace(cameras=[SimpleNamespace(name="front", pictures=(SimpleNamespace(pixels=pixels),))])

    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    assert still_among([shown(noise)] * 3) == {"front": "never changes"}
    assert still_among([shown(noise), shown(noise), shown(255 - noise)]) == {}


# Statistics


def test_lerobots_quantiles_are_recognised(tmp_path):
    ours = diagnose_quantiles(Origin(dataset="lerobot: data/meta/stats.json"), "quantile")
    assert [one.id for one in ours] == ["lerobot-quantiles"]
    assert diagnose_quantiles(Origin(dataset="lerobot: data/meta/stats.json"), "mean_std") == []
    assert diagnose_quantiles(Origin(dataset="lerobot: policy/normalizer.safetensors"), "quantile") == []
    root = write_dataset(tmp_path / "it")
    with pytest.raises(UserError, match=r"lerobot's statistics of a dataset.*--from lerobot"):
        load_norm_stats(root / "meta/stats.json")
