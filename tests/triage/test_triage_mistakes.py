"""Each kind of mistake, made with synthetic rows, is recognised as what it is; rows without one are not."""

import numpy as np
import pytest

from rlinf_core.data.rotations import from_matrix, to_matrix
from rlinf_core.triage.mistakes.corrections import NOTHING, Correction
from rlinf_core.triage.mistakes.families import all_families
from rlinf_core.triage.mistakes.images import zoom
from rlinf_core.triage.mistakes.likeness import Likeness
from rlinf_core.triage.mistakes.rows import SIDE, Rows, choose_runs, shrink
from rlinf_core.triage.mistakes.search import Comparison, explain

NAMES = {"state": ("x", "y", "qx", "qy", "qz", "qw", "gripper"), "actions": ("dx", "dy", "dturn", "gripper")}


def quaternions(turn):
    """About an axis between z and x: x, y, z, w."""
    half = turn / 2
    return np.stack([0.4 * np.sin(half), 0 * half, np.sqrt(0.84) * np.sin(half), np.cos(half)], 1)


def images_of(place, turn):
    """[N, SIDE, SIDE, 3]: a spot and a bar on a background that no flip leaves as it is."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1)
    background = np.stack([0.2 + 0.5 * x, 0.3 + 0.2 * y + 0.3 * (x > 0.8), 0.6 - 0.4 * y + 0.2 * (y < 0.15)], -1)
    at = (place[:, None, None, :] + 1) / 2
    near = np.exp(-40 * ((x - at[..., 0]) ** 2 + (y - at[..., 1]) ** 2))[..., None]
    side = x * np.cos(turn)[:, None, None] + y * np.sin(turn)[:, None, None]
    bar = 0.25 * (np.abs(side - 0.9) < 0.08)[..., None]
    return np.clip(background * (1 - near) + near * np.array([0.9, 0.1, 0.05]) - bar, 0, 1).astype(np.float32)


def episodes(seed, count, first=0, length=14, rate=1.0):
    """Rows of episodes in which a hand moves to a goal, turns and closes a gripper."""
    generator = np.random.default_rng(seed)
    parts = []
    for number in range(count):
        place = generator.uniform(-0.8, 0.8, 2) * (1, 0.6)
        goal = generator.uniform(-0.6, 0.6, 2) + np.array([0.15, -0.1])
        turn, gripper, rows = generator.uniform(0.2, 1.6), 0.0, []
        for t in range(length + 1):
            move = np.clip(2.5 * (goal - place), -1, 1) + generator.normal(0, 0.05, 2)
            action = np.r_[move, np.clip(0.9 - turn, -1, 1) + generator.normal(0, 0.05), 1.0 if t > 8 else -1.0]
            rows.append((place, turn, gripper, action))
            place, turn = place + 0.12 * rate * action[:2], turn + 0.3 * rate * action[2]
            gripper = float(np.clip(gripper + 0.3 * rate * action[3], 0, 1))
        place, turn, gripper, action = (np.array(one) for one in zip(*rows, strict=True))
        state = np.concatenate([place, quaternions(turn), gripper[:, None]], 1)
        task = f"task {number % 2}"
        parts.append((state[:-1], state[1:], action[:-1], images_of(place[:-1], turn[:-1]), [task] * length))
    state, after, action, images, tasks = zip(*parts, strict=True)
    number = np.repeat(np.arange(count) + first, length)
    after = np.concatenate(after)
    after[length - 1 :: length] = np.nan
    return Rows(
        indices=np.arange(count * length),
        episodes=number,
        images={"front": np.concatenate(images)},
        sizes={"front": (SIDE, SIDE)},
        state=np.concatenate(state),
        after=after,
        actions=np.concatenate(action)[:, None].repeat(2, 1),
        within=np.ones((count * length, 2), np.bool_),
        prompts=tuple(task for part in tasks for task in part),
        runs=number,
    )


@pytest.fixture(scope="module")
def training():
    rows = episodes(0, 40)
    return Likeness(rows.take(np.arange(0, len(rows), 6)), rows), rows.take(np.arange(0, 70))


def explanation(training, site, *families):
    likeness, stand_in = training
    known = all_families(likeness, NAMES)
    chosen = {name: known[name] for name in families or known}
    return explain(Comparison(likeness, site, stand_in), chosen)


def on_images(change):
    return Correction(images={"front": ("front", change)})


def on_state(change):
    return Correction(state=lambda x: change(np.array(x)))


def on_actions(change):
    return Correction(actions=lambda a, s: change(np.array(a)))


def numbers(at, change):
    def whole(x):
        x[..., at] = change(x[..., at])
        return x

    return whole


def wiped(images, *view):
    return np.nan_to_num(zoom(images, *(view or (1.3333, 1.0))), nan=0.0)


def turned_by_90(quaternion):
    """As of a hand that is mounted at 90° on its flange."""
    turn = to_matrix(np.array([0, 0, np.pi / 2]), "axis_angle")
    return from_matrix(to_matrix(quaternion, "quaternion_xyzw") @ turn, "quaternion_xyzw")


MISTAKES = {
    "rotated": (on_images(lambda x: x[..., ::-1, ::-1, :]), "cameras", "rotated by 180°"),
    "bgr": (on_images(lambda x: x[..., ::-1]), "cameras", "red and blue"),
    "squashed": (on_images(wiped), "cameras", "squashed horizontally, by 1.33"),
    "dark": (on_images(lambda x: 0.3 * x), "cameras", "brightness"),
    "millimeters": (on_state(numbers([0, 1], lambda x: 1000 * x)), "state", "in millimeters where training has meters"),
    "opposite y": (on_state(numbers([1], np.negative)), "state", "state [1: y] has the opposite sign"),
    "gripper first": (on_state(lambda x: np.roll(x, 1, -1)), "state", "shifted by one"),
    "w first": (on_state(numbers([2, 3, 4, 5], lambda q: np.roll(q, 1, -1))), "state", "w first"),
    "-q": (on_state(numbers([2, 3, 4, 5], np.negative)), "state", "opposite sign in some or all rows"),
    "open closes": (on_actions(numbers([3], np.negative)), "actions", "action [3: gripper] has the opposite sign"),
    "gripper from 0": (on_actions(numbers([3], lambda x: (1 - x) / 2)), "actions", "another range and is inverted"),
    "absolute": (
        Correction(actions=lambda a, s: np.concatenate([a[..., :2] + s[:, None, :2], a[..., 2:]], -1)),
        "actions",
        "actions are absolute",
    ),
    "other origin": (on_state(numbers([0], lambda x: x + 3)), "state", "state [0: x] is off by a constant (+3"),
    "half": (on_actions(numbers([0, 1, 2], lambda x: 0.5 * x)), "actions", "are scaled by 0.5"),
    "hand at 90°": (on_state(numbers([2, 3, 4, 5], turned_by_90)), "state", "is of another frame"),
    "corner": (on_images(lambda x: wiped(x, 1.3333, 1.3333, -0.125, 0.125)), "cameras", "show another part"),
    "darker": (on_images(lambda x: x**1.7), "cameras", "darker by a gamma of"),
    "tinted": (on_images(lambda x: x * np.float32([1.0, 0.8, 0.55])), "cameras", "have a tint"),
    "late": (Correction(image_lag=-1, state_lag=-1), "timing", "observations are 1 step late"),
}


QUICK = ("rotated", "millimeters", "w first", "open closes", "absolute", "late")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MISTAKES]
)
def test_a_mistake_is_named(name, training):
    mistake, family, words = MISTAKES[name]
    found = explanation(training, mistake.apply(episodes(1, 5, first=100)), *dict.fromkeys((family, "timing")))
    first = found.steps[0]
    assert first.family == family, first.best.correction.mistake if first.family else first.tried
    assert words in first.best.correction.mistake
    assert first.best.gain > 0.5 * (first.before - found.usual)


@pytest.mark.parametrize("seed", [2])
def test_rows_of_other_episodes_have_no_mistake(seed, training):
    found = explanation(training, episodes(seed, 5, first=100 * seed))
    assert [step.family for step in found.steps] == [""]
    assert found.correction is NOTHING
    assert max(found.left.values()) < 6


@pytest.mark.slow
def test_three_mistakes_are_found_one_after_another(training):
    site = episodes(1, 5, first=100)
    for name in ("bgr", "w first", "open closes"):
        site = MISTAKES[name][0].apply(site)
    found = explanation(training, site)
    assert {step.family for step in found.steps if step.family} == {"cameras", "state", "actions"}
    assert np.allclose(found.site.actions, episodes(1, 5, first=100).actions)


@pytest.mark.slow
def test_two_mistakes_are_found_one_after_another(training):
    site = MISTAKES["open closes"][0].apply(MISTAKES["rotated"][0].apply(episodes(1, 5, first=100)))
    found = explanation(training, site)
    assert {step.family for step in found.steps if step.family} == {"cameras", "actions"}
    assert np.allclose(found.site.actions, episodes(1, 5, first=100).actions)


@pytest.mark.slow
def test_other_scenes_are_unlike_training_without_a_mistake(training):
    site = episodes(1, 5, first=100)
    noise = np.random.default_rng(0).uniform(0, 1, site.images["front"].shape[1:]).astype(np.float32)
    site.images["front"][:] = noise
    found = explanation(training, site)
    assert not found.steps[0].family
    assert found.left["image front"] > 6


def test_runs_are_consecutive_rows_of_one_episode():
    episode_of_row = np.repeat([3, 5, 9], [20, 4, 30])
    rows, runs = choose_runs(episode_of_row, 6, 6)
    for number in np.unique(runs):
        own = rows[runs == number]
        assert (np.diff(own) == 1).all()
        assert len(set(episode_of_row[own])) == 1
        assert len(own) in (4, 6)


def test_small_images_keep_the_aspect_ratio_and_are_zoomed_alike():
    generator = np.random.default_rng(0)
    image = generator.integers(1, 255, (8, 16, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    small = shrink(image)
    assert small[: SIDE // 4].max() == 0 < small[SIDE // 4 : -SIDE // 4].min()
    square = generator.integers(0, 255, (8, 8, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    later, sooner = shrink(zoom(square, 2.0, 2.0)), zoom(shrink(square)[None], 2.0, 2.0)[0]
    assert np.abs(later - sooner)[1:-1, 1:-1].mean() < 0.05
    assert np.isnan(zoom(shrink(square)[None], 0.5, 1.0)[0, 0]).all()
