"""A corpus of bad statistics and data, each with its finding, and good ones without findings."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from distributions import repository_plugins

from rlinf_core.config.load import load_config
from rlinf_core.data.normalize import Normalize, NormStats, Origin, save_norm_stats
from rlinf_core.data.splits import open_split
from rlinf_core.data.statistics.action_kind import diagnose_actions
from rlinf_core.data.statistics.compute import summarize
from rlinf_core.data.statistics.diagnose import Finding, compare_origins, compare_with_data
from rlinf_core.data.statistics.run import diagnose
from rlinf_core.data.transforms import Concatenate, RelativeActions, RelativeUnless
from rlinf_core.errors import UserError
from rlinf_core.testing import write_tiny_dataset

ROOT = Path(__file__).parents[3]
EPISODES, LENGTH, HORIZON = 20, 50, 4
REPACK = Concatenate({}, ("state",), ("actions",))
MODES = ("mean_std", "quantile")


@dataclass
class Arrays:
    """A source over arrays [frames, D]."""

    state: np.ndarray
    actions: np.ndarray

    def __len__(self):
        return len(self.state)

    @property
    def episodes(self):
        return np.arange(len(self)) // LENGTH + 100

    def columns(self, indices):
        at = np.asarray(indices)
        steps = np.minimum(at[:, None] + np.arange(HORIZON), (at // LENGTH * LENGTH + LENGTH - 1)[:, None])
        return {
            "state": self.state[at],
            "actions": self.actions[steps],
            "actions_is_pad": steps > 10**9,
            "task": [""] * len(at),
        }

    def without_images(self, indices):
        columns = self.columns(indices)
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    __getitems__ = without_images

    def describe(self, index):
        return f"row {index}"

    def fingerprint(self):
        return "arrays"


def healthy():
    """Four joints that wander and a gripper; joints in radians, degrees and metres; the action is noise."""
    generator = np.random.default_rng(0)
    frames = EPISODES * LENGTH
    state = np.cumsum(generator.normal(size=(EPISODES, LENGTH, 4)), axis=1).reshape(frames, 4) * (0.02, 2.0, 0.001, 0.1)
    actions = generator.normal(size=(frames, 4)) * (0.1, 5.0, 0.01, 1.0)
    actions[:, 3] = np.sign(actions[:, 3])
    return Arrays(state.astype(np.float32), actions.astype(np.float32))


def own(source):
    distributions = summarize(source, [REPACK])
    return {key: one.stats for key, one in distributions.items()}, distributions


def change(stats, key, **fields):
    """Statistics with `field=(dimension, value)` changed."""
    values = {name: value.copy() for name, value in vars(stats[key]).items()}
    for name, (dimension, value) in fields.items():
        values[name][dimension] = value
    return stats | {key: NormStats(**values)}


def constant(source):
    source.state[:, 2] = 0.7


def outlier(source):
    source.actions[3 * LENGTH + 7, 1] = 4000.0


def hardly_ever(source):
    source.actions[:, 3] = 0.0
    source.actions[: LENGTH // 10, 3] = 1.0


CORPUS = [
    # name, mode, what is damaged, key, dimensions, severity, what the message holds
    ("constant", "quantile", constant, "state", (2,), "warning", "becomes -1"),
    ("constant", "mean_std", constant, "state", (2,), "warning", "never changes in the data"),
    ("beyond-5", "mean_std", outlier, "actions", (1,), "warning", "in episode 103"),
    ("beyond-5", "quantile", outlier, "actions", (1,), "warning", "in episode 103"),
    ("no-spread", "quantile", hardly_ever, "actions", (3,), "warning", "the data vary"),
    ("scale-near-zero", "quantile", {"q01": (0, 0.0), "q99": (0, 2e-4)}, "state", (0,), "warning", "of the range"),
    ("no-spread", "mean_std", {"std": (1, 0.0)}, "state", (1,), "warning", "no spread"),
    ("not-finite", "mean_std", {"mean": (0, np.nan)}, "state", (0,), "error", "mean is NaN or infinite"),
    ("not-finite", "mean_std", {"std": (1, np.inf)}, "state", (1,), "error", "std is NaN or infinite"),
    ("not-finite", "quantile", {"q99": (1, np.inf)}, "state", (1,), "error", "q99 is NaN or infinite"),
    ("no-quantiles", "quantile", {n: (slice(None), np.nan) for n in ("q01", "q99")}, "state", (), "error", "quantiles"),
    ("negative-spread", "mean_std", {"std": (1, -1.0)}, "state", (1,), "error", "std is negative"),
    ("negative-spread", "quantile", {"q99": (1, -1e3)}, "state", (1,), "error", "q99 is smaller"),
    ("disjoint", "quantile", {"q01": (0, 50.0), "q99": (0, 51.0)}, "state", (0,), "warning", "outside"),
    ("disjoint", "mean_std", {"mean": (0, 50.0)}, "state", (0,), "warning", "outside"),
    ("too-wide", "mean_std", {"std": (2, 1.0)}, "state", (2,), "warning", "times as wide"),
    ("too-tight", "mean_std", {"std": (1, 0.1)}, "state", (1,), "warning", "times as wide"),
]


@pytest.mark.parametrize(
    ("name", "mode", "damage", "key", "dimensions", "severity", "text"),
    CORPUS,
    ids=[f"{row[0]}-{i}" for i, row in enumerate(CORPUS)],
)
def test_each_damage_is_found_by_name(name, mode, damage, key, dimensions, severity, text):
    source = healthy()
    if callable(damage):
        damage(source)
    stats, distributions = own(source)
    if not callable(damage):
        stats = change(stats, key, **damage)
    (found,) = [finding for finding in compare_with_data(stats, distributions, mode) if finding.id == name]
    assert (found.key, found.dimensions, found.severity) == (key, dimensions, severity)
    assert text in found.message
    assert found.way_out


def test_the_way_out_depends_on_how_many_episodes_are_far_out():
    source = healthy()
    outlier(source)
    stats, distributions = own(source)
    (one,) = [finding for finding in compare_with_data(stats, distributions, "quantile") if finding.id == "beyond-5"]
    assert "data.exclude_episodes" in one.way_out
    stats, distributions = own(healthy())
    tight = change(stats, "actions", std=(0, 0.015))
    (all_,) = [finding for finding in compare_with_data(tight, distributions, "mean_std") if finding.dimensions == (0,)]
    assert (all_.id, "leave data.norm_stats empty" in all_.way_out) == ("beyond-5", True)


def test_statistics_that_miss_a_vector_or_numbers_of_it_are_errors():
    stats, distributions = own(healthy())
    (found,) = compare_with_data({"actions": stats["actions"]}, distributions, "mean_std")
    assert (found.id, found.severity, found.key) == ("missing", "error", "state")
    narrow = {"state": NormStats(*(value[:3] for value in vars(stats["state"]).values())), "actions": stats["actions"]}
    (found,) = compare_with_data(narrow, distributions, "mean_std")
    assert (found.id, found.severity) == ("too-narrow", "error")
    assert "have 3 numbers, the data have 4" in found.message


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_found_in_good_data(mode):
    source = healthy()
    stats, distributions = own(source)
    assert compare_with_data(stats, distributions, mode) == []
    assert diagnose_actions(source, [REPACK]) == []
    wider = {key: NormStats(*(np.pad(v, (0, 3)) for v in vars(one).values())) for key, one in stats.items()}
    assert compare_with_data(wider, distributions, mode) == []  # openpi's files are filled up to 32 numbers.


@pytest.mark.parametrize("name", ["pi0_metaworld", "pi05_metaworld"])
def test_nothing_is_found_in_the_examples(name):
    plugins = repository_plugins()
    data = [f"data.repo_id={ROOT}/examples/data/metaworld_3tasks", f"data.config_name={name}"]
    run = load_config(ROOT / "examples/quickstart.toml", data, plugins)
    assert diagnose(run, open_split(run, plugins, "train")).findings == ()


def test_nothing_is_found_in_a_tiny_dataset(tmp_path):
    write_tiny_dataset(tmp_path / "tiny", cameras=["observation.image"], vectors={"observation.state": 4, "action": 4})
    plugins = repository_plugins()
    run = load_config(ROOT / "examples/quickstart.toml", [f"data.repo_id={tmp_path}/tiny"], plugins)
    assert diagnose(run, open_split(run, plugins, "train")).findings == ()


@pytest.mark.parametrize("mode", MODES)
def test_the_floor_that_is_offered_keeps_its_word(mode):
    source = healthy()
    source.actions[:, 3] = 0.0
    source.actions[5, 3] = 0.004
    stats, distributions = own(source)
    if mode == "mean_std":
        stats = change(stats, "actions", std=(3, 0.0))
    (found,) = [finding for finding in compare_with_data(stats, distributions, mode) if finding.id == "no-spread"]
    assert found.way_out.startswith("data.norm_floor = 0.001 would widen actions [3]; ")
    floored = {key: one.floored(0.001) for key, one in stats.items()}
    assert not [finding for finding in compare_with_data(floored, distributions, mode) if finding.id == "no-spread"]
    largest = np.abs(Normalize(floored, mode).normalized("actions", np.array([0.0, 0.0, 0.0, 0.004])))[3]
    assert f"number is then {largest:.2g}" in found.way_out


def test_the_origin_of_a_file_says_how_it_differs():
    here = Origin("a", dataset="me/new", rows=100, episodes=10, horizon=50)
    assert compare_origins(Origin(), here) == compare_origins(here, here) == []
    others = {
        "other-dataset": replace(here, fingerprint="b", dataset="me/old"),
        "stale": replace(here, fingerprint="b", rows=90),
        "other-horizon": replace(here, fingerprint="b", horizon=10),
        "other-transforms": replace(here, fingerprint="b"),
    }
    for name, origin in others.items():
        (found,) = compare_origins(origin, here)
        assert (found.id, found.severity) == (name, "warning")


def moving(kind):
    """A robot that does what it is told: positions, or displacements in units of its own."""
    source = healthy()
    following = np.concatenate([source.state[1:], source.state[-1:]])
    starts = np.arange(len(source)) % LENGTH == LENGTH - 1
    following[starts] = source.state[starts]
    noise = np.random.default_rng(1).normal(size=source.state.shape) * source.state.std(axis=0)
    if kind == "positions":
        source.actions = (following + 0.02 * noise).astype(np.float32)
    else:
        source.actions = ((following - source.state) * 30 + 0.02 * noise).astype(np.float32)
    source.actions[:, 3] = np.sign(noise[:, 3])
    return source


RELATIVE = RelativeActions((True, True, True))


@pytest.mark.parametrize(
    ("kind", "transforms", "expected"),
    [
        ("positions", [REPACK], [("actions-look-absolute", (0, 1, 2))]),
        ("positions", [REPACK, RELATIVE], []),
        ("positions", [REPACK, RelativeUnless((3,))], []),
        ("displacements", [REPACK], []),
        ("displacements", [REPACK, RelativeUnless((3,))], [("actions-look-relative", (0, 1, 2))]),
        ("displacements", [REPACK, RELATIVE], [("actions-look-relative", (0, 1, 2))]),
    ],
)
def test_positions_and_displacements_are_told_apart(kind, transforms, expected):
    found = diagnose_actions(moving(kind), transforms)
    assert [(finding.id, finding.dimensions) for finding in found] == expected
    assert all("data.raw_action_is_delta" in str(finding) for finding in found if "absolute" in finding.id)


def test_statistics_that_would_spoil_a_run_refuse_it(tmp_path):
    plugins = repository_plugins()
    run = load_config(
        ROOT / "examples/quickstart.toml", [f"data.repo_id={ROOT}/examples/data/metaworld_3tasks"], plugins
    )
    source = open_split(run, plugins, "train")
    sound = diagnose(run, source)
    sound.refuse()
    save_norm_stats(tmp_path / "s.json", change(sound.stats, "actions", q01=(1, np.inf)), sound.origin)
    given = run.data.model_copy(update={"norm_stats": str(tmp_path / "s.json")})
    broken = diagnose(run.model_copy(update={"data": given}), source)
    assert [finding.id for finding in broken.findings] == ["not-finite"]
    with pytest.raises(
        UserError, match=r"not-finite: actions \[1: dy\]: q01 is NaN or infinite\. Leave data\.norm_stats"
    ):
        broken.refuse()


@pytest.fixture
def quickstart(tmp_path):
    """Metaworld, whose dataset calls the numbers of the state x, y, z and gripper_opening."""

    def quickstart(**changed):
        run = load_config(ROOT / "examples" / "quickstart.toml", [], repository_plugins())
        source = open_split(run, repository_plugins(), "train")
        stats = change(diagnose(run, source).stats, "state", **changed)
        save_norm_stats(tmp_path / "norm_stats.json", stats)
        data = run.data.model_copy(update={"norm_stats": str(tmp_path / "norm_stats.json")})
        return run.model_copy(update={"data": data}), source

    return quickstart


def test_findings_call_dimensions_by_the_names_of_the_dataset(quickstart):
    (finding,) = diagnose(*quickstart(q01=(1, 0.6), q99=(1, 0.6))).findings
    assert str(finding).startswith("no-spread: state [1: y]: the statistics have no spread")
    assert "would widen state [1: y]; " in finding.way_out
    findings = diagnose(*quickstart(q01=(3, 5.0), q99=(3, 6.0))).findings
    finding = next(one for one in findings if one.id == "disjoint")
    assert str(finding).startswith("disjoint: state [3: gripper_opening]: the data are outside")
    assert "(dimension 3: gripper_opening)" in finding.message


def test_names_are_left_out_where_the_dataset_or_the_transforms_do_not_keep_them(quickstart):
    run, source = quickstart(q01=(1, 0.6), q99=(1, 0.6))
    feature = source.metadata.features["observation.state"]
    for names in (None, ["x"], ["x", "y", "z", ""], 7, {"x": 1}):
        feature["names"] = names
        assert "no-spread: state [1]: " in str(diagnose(run, source).findings[0])
    for names in ({"axes": ["x", "y", "z", "w"]}, {"x": 0, "y": 1, "z": 2, "w": 3}, [["x", "y"], ["z", "w"]]):
        feature["names"] = names
        assert "no-spread: state [1: y]: " in str(diagnose(run, source).findings[0])


def test_of_many_names_a_message_has_the_first_and_the_last():
    names = tuple("abcdefgh")
    assert str(Finding("id", "warning", "state", (0, 2, 3), "m", "w", names)) == "id: state [0, 2-3: a, c, d]: m. w"
    assert str(Finding("id", "warning", "state", tuple(range(8)), "m", "w", names)).startswith(
        "id: state [0-7: a ... h]"
    )
