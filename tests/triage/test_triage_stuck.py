"""Signals that carry nothing, sites of slower operators, spellings of prompts, and images that show another part."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_triage_mistakes import Likeness, episodes

from rlinf_core.triage.mistakes.images import gamma, zoom
from rlinf_core.triage.mistakes.rows import SIDE, shrink
from rlinf_core.triage.mistakes.stuck import still_numbers, stuck_cameras
from rlinf_core.triage.scene import Acted
from rlinf_core.triage.tests.learned import _unlearned
from rlinf_core.triage.tests.site import ActionTest, StateTest, _spelled_otherwise


@pytest.fixture(scope="module")
def training():
    rows = episodes(0, 20)
    return rows.take(np.arange(0, len(rows), 6)), rows.take(np.arange(0, 70)), rows


def stuck(training, change):
    reference, stand_in, _ = training
    site = episodes(1, 4, first=100)
    changed = replace(site, images={"front": change(site.images["front"], site)})
    return {camera: text for camera, text, _ in stuck_cameras(changed, reference, stand_in)}


STUCK = {
    "black, or have values from 0 to 1": lambda x, site: x / 255,
    "a single color": lambda x, site: 0 * x + 0.4,
    "never change": lambda x, site: x[:1] + 0 * x,
    "the same frame in 100%": lambda x, site: x[site.episodes % 4 * 14],
    "are the frame before in": lambda x, site: x[np.arange(len(x)) // 2 * 2],
    "are gray": lambda x, site: x.mean(-1, keepdims=True) + 0 * x,
}


@pytest.mark.parametrize("words", STUCK)
def test_cameras_that_show_less_than_in_training_are_named(words, training):
    assert words in stuck(training, STUCK[words])["front"]


def test_cameras_as_in_training_are_not():
    rows = episodes(0, 20)
    sites = [episodes(seed, 3, first=100) for seed in range(1, 4)]
    assert not [list(stuck_cameras(one, rows, rows)) for one in sites if list(stuck_cameras(one, rows, rows))]
    # Cameras may be gray, or still, in training as well.
    gray = [replace(one, images={"front": one.images["front"].mean(-1, keepdims=True) + np.zeros(3)}) for one in sites]
    assert not list(stuck_cameras(gray[0], gray[1], gray[2]))


def test_a_number_that_is_always_the_same_is_found_unless_training_often_has_it(training):
    *_, wide = training
    state = np.array(wide.state[:40])
    state[:, 0] = 7.0
    state[:, 6] = 0.0  # The gripper is open at the start of each episode.
    assert still_numbers(state, wide.state) == [0]


def test_a_slower_operator_is_no_other_control_rate(training):
    reference, _, wide = training
    likeness = Likeness(reference, wide)
    assert likeness.speed(episodes(1, 6, rate=1.0)) == pytest.approx(1.0, abs=0.1)
    assert likeness.speed(episodes(1, 6, rate=0.5)) == pytest.approx(0.5, abs=0.1)
    slower = episodes(1, 6)
    half = slower.state + (slower.after - slower.state) / 2
    slow = replace(slower, after=half, actions=slower.actions / 2)
    slow = slow.take(np.asarray(~np.isnan(slow.after).any(1)))
    # Half of the action causes half of the change, so that what training predicts is what happens.
    assert likeness.speed(replace(slow, actions=slow.actions)) > 0.65


def test_an_image_is_moved_and_its_unknown_part_stays_unknown():
    generator = np.random.default_rng(0)
    image = generator.integers(1, 255, (8, 8, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    corner = zoom(image, 2.0, 2.0, down=0.25, right=-0.25)  # The lower left quarter.
    assert np.abs(corner[::8, ::8].astype(float) - image[64::4, :64:4]).mean() < 12
    small = zoom(shrink(image)[None], 2.0, 2.0, down=0.25, right=-0.25)[0]
    assert np.abs(small - shrink(corner))[1:-1, 1:-1].mean() < 0.05
    outside = zoom(shrink(image)[None], 0.5, 0.5)
    twice = zoom(outside, 2.0, 1.0)
    assert np.isnan(twice[0, :, 0]).all()
    assert not np.isnan(twice[0, 1:-1, SIDE // 2]).any()


def test_gamma_undoes_gamma():
    image = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, -1)
    assert np.abs(gamma(gamma(image, 1 / 2.2), 2.2).astype(int) - image).max() <= 3


def test_another_spelling_of_a_prompt_is_recognised():
    trained = Counter(["pick up the black bowl", "open the drawer"])
    assert _spelled_otherwise("Pick_Up_The_Black_Bowl.", trained) == "pick up the black bowl"
    assert _spelled_otherwise("open the top drawer", trained) == ""


class OneRow:
    """A source of one row."""

    def __init__(self, state, actions):
        self.row = {"state": np.zeros(state), "actions": np.zeros((2, actions))}

    def __len__(self):
        return 1

    def without_images(self, indices):
        return [self.row]


def test_a_site_with_other_widths_is_a_cause():
    pipeline = SimpleNamespace(target=lambda row: row)
    scene = SimpleNamespace(pipeline=pipeline, site=OneRow(7, 7), trained=OneRow(8, 14))
    assert "the state of the site has 7 numbers, of training 8" in StateTest().run(scene).sentence
    found = ActionTest().run(scene)
    assert found.verdict == "cause"
    assert "actions of the site have 7 numbers, of training 14" in found.sentence


def test_a_number_of_the_action_that_was_not_learned_is_named():
    generator = np.random.default_rng(0)
    recorded = generator.normal(0, 1, (40, 4, 3))
    predicted = recorded + generator.normal(0, 0.2, recorded.shape)
    rows = np.arange(40)
    scene = SimpleNamespace(
        on_training=Acted(rows, rows // 4, predicted, recorded, np.ones((40, 4), np.bool_)),
        wide=SimpleNamespace(actions=recorded),
        baseline=recorded[:, 0].mean(0),
        action_spread=np.ones(3),
        names={"actions": ("x", "y", "gripper")},
    )
    assert _unlearned(scene) is None
    predicted[..., 2] = generator.normal(0, 0.3, (40, 4))
    assert "but not action [2: gripper]" in _unlearned(scene).sentence
