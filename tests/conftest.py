"""What all tests share: no network, one thread, a working directory and caches of their own, nothing of the user's
environment, and tiny datasets that lerobot writes once.
"""

import atexit
import fcntl
import gc
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # Read when torch is; the models are tiny: threads only get in each other's way.

import pytest
from distributions import ROOT, install
from ranks import Ranks

from rlinf_core.process import watchdog

pytest_plugins = ["rlinf_core.testing", "distances"]

ASKED = (
    *("RLINF_FUZZ", "RLINF_TEST_DATASETS", "RLINF_GOLDEN_DIR"),
    *("RLINF_NUMERICS_PAGE", "RLINF_PALIGEMMA_TOKENIZER", "RLINF_CHECK_DEVICE", "RLINF_TRIAGE_RUN"),
)
"""Variables with which a person asks something of the tests."""
USERS = re.compile(
    r"(RLINF|HF|HUGGING_?FACE|TRANSFORMERS|DATASETS|WANDB|TORCH\w*|PYTORCH|NCCL|GLOO|KINETO|MASTER|GROUP|ROLE)_\w+"
    r"|(LOCAL_)?(RANK|WORLD_SIZE)|LOGLEVEL|COLUMNS|LINES|NO_COLOR|FORCE_COLOR"
    r"|PYTHON(SAFEPATH|WARNINGS|OPTIMIZE|DEVMODE|INSPECT|VERBOSE|IOENCODING)"
)
"""Variables that change what the project, its libraries or Python do: a user's shell may have them, tests do not."""
if "PYTEST_XDIST_WORKER" not in os.environ:  # Workers inherit what follows.
    for name in filter(USERS.fullmatch, set(os.environ).difference(ASKED)):
        del os.environ[name]
    os.environ["HF_HUB_OFFLINE"] = "1"  # Read when huggingface_hub is imported, as is HF_HOME.
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="rlinf-tests-")
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = os.path.join(
        os.environ["HF_HOME"], "hypothesis"
    )  # Not the repository.
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

MOST_PROCESSES = 4
"""A process of tests takes a gigabyte, and the longest file decides when more make no difference."""
DATASETS = "RLINF_TEST_DATASETS"
"""Variable: a folder with datasets that `write_once` wrote in another environment, one with lerobot."""
LAUNCHING = ("test_kills", "test_trainer_options", "test_run", "test_stopping", "test_launch", "test_text_run")
"""Files whose tests start ranks: the longest, which begin first."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Folders of tests run in a process more than there are cores, as many wait for ranks that they have started, file
    by file; single files, and what someone watches, in this one. Any `-n` decides otherwise.
    """
    option = config.option
    if hasattr(config, "workerinput") or not config.pluginmanager.hasplugin("xdist"):
        return
    watched = option.usepdb or option.capture == "no"
    heavy = any(f"not {mark}" not in option.markexpr for mark in ("slow", "gpu"))
    if option.numprocesses is None and not watched and not heavy and any(Path(one).is_dir() for one in config.args):
        option.numprocesses = min((os.cpu_count() or 1) + 1, MOST_PROCESSES)
    if option.dist == "no":
        option.dist, option.loadscopereorder = "loadfile", False


def pytest_collection_finish():
    gc.freeze()  # Thousands of tests and torch itself need not be searched for garbage again and again.


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: [*LAUNCHING, item.path.stem].index(item.path.stem))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup():
    with _skipped_without_lerobot():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call():
    with _skipped_without_lerobot():
        return (yield)


@contextmanager
def _skipped_without_lerobot():
    """Skip what needs a dataset that only lerobot can write, where there is no lerobot."""
    try:
        yield
    except Exception as error:
        if isinstance(error.__cause__, ModuleNotFoundError) and error.__cause__.name == "lerobot":
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    os.environ["RLINF_CACHE"] = str(tmp_path_factory.mktemp("cache"))  # Workers inherit it.


@pytest.fixture(scope="session", autouse=True)
def working_directory(tmp_path_factory):
    """The working directory of all tests: the repository's examples, and nothing that a user left in the repository."""
    folder = tmp_path_factory.mktemp("working_directory")
    (folder / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(autouse=True)
def _nothing_left(working_directory):
    yield
    left = {path.name for path in working_directory.iterdir()} - {"examples"}
    assert not left, f"left in the working directory: {', '.join(sorted(left))}; write to tmp_path"


@pytest.fixture(scope="session")
def write_once(tmp_path_factory):
    """`write_once(name, **options)`: a tiny dataset that the first process to ask for it writes for all."""

    def write_once(name, **options):
        from rlinf_core.testing import write_tiny_dataset

        base = tmp_path_factory.getbasetemp()
        folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # A process of several has its own.
        folder = Path(os.environ.get(DATASETS, folder))
        known = folder / f"{name}.pickle"
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not known.exists():
                known.write_bytes(pickle.dumps(write_tiny_dataset(folder / name, **options)))
        return pickle.loads(known.read_bytes())

    return write_once


@pytest.fixture(scope="session")
def video_dataset(write_once):
    """Four episodes of two tasks, two cameras as AV1 video, two episodes a video file and one a data file."""
    return write_once("video", videos=True, data_files_size_in_mb=0.0001, video_files_size_in_mb=0.003)


@pytest.fixture(scope="session")
def image_dataset(write_once):
    """The same episodes with PNG pictures in the parquet columns, in several files."""
    return write_once("image", data_files_size_in_mb=0.0001)


@pytest.fixture(scope="session")
def toy_site(tmp_path_factory):
    """A folder for `PYTHONPATH` with the toy policy as an installed plugin, and the config `toy.toml` of its runs."""
    from toy_policy import CONFIG

    site = tmp_path_factory.mktemp("site")
    install(site, "toy", plugins={"toy": "toy_policy"}, datasets={"toy": "toy_policy:TrainableToyDataset"})
    (site / "toy.toml").write_text(CONFIG)
    return site


@pytest.fixture
def toy_plugins():
    """The repository's plugins and the toy policy."""
    import toy_policy
    from distributions import entry_point, repository_entry_points

    from rlinf_core.plugins.registry import DATASET_GROUP, PLUGIN_GROUP, Plugins

    toys = [
        entry_point(PLUGIN_GROUP, "toy", toy_policy, "toy-policy"),
        entry_point(DATASET_GROUP, "toy", toy_policy.TrainableToyDataset, "toy-policy"),
    ]
    return Plugins([*repository_entry_points(), *toys])


@pytest.fixture
def configure_toy(tmp_path, toy_plugins):
    """The config of a run of the toy policy in `tmp_path`, with the overrides that are given."""
    from toy_policy import CONFIG

    from rlinf_core.config.load import load_config

    path = tmp_path / "toy.toml"
    path.write_text(CONFIG)
    return lambda *overrides: load_config(path, [f"runner.output_dir={tmp_path}", *overrides], toy_plugins)


@pytest.fixture
def train_toy(configure_toy, toy_plugins, monkeypatch):
    """Train the toy policy as `rlinf_core.train` does, from wherever the run stands.

    Returns the trainer, None if the run is finished; `results` are what its validations measure.
    """
    from rlinf_core import Evaluation
    from rlinf_core.training.distributed.processes import processes
    from rlinf_core.training.run_folder import prepare_folder

    monkeypatch.delenv("RANK", raising=False)

    def train(*overrides, results=None):
        run = configure_toy(*overrides, *([] if results is None else ["runner.best_metric=val_loss"]))
        start = prepare_folder(run, overwrite=False)
        if start.finished:
            return None
        with processes("cpu") as group:
            trainer = run.trainer.build(run, start=start, group=group, plugins=toy_plugins)
            if results is not None:
                measured = iter(results)
                [held_out] = trainer._evaluations.running
                monkeypatch.setattr(
                    held_out.evaluator, "evaluate", lambda *_, **__: Evaluation({"val_loss": next(measured)})
                )
            trainer.train()
        return trainer

    return train


@pytest.fixture(scope="session")
def start_ranks():
    """Start the ranks of a run for a fraction of what torchrun costs: `Ranks.start`."""
    ranks = Ranks()
    yield ranks.start
    ranks.close()


@pytest.fixture(autouse=True)
def _signals_as_before(monkeypatch):
    """Handlers of signals are put back after each test: a run that ends inside this process ignores signals from then
    on, and what is started afterwards, such as a fork server, would inherit that.
    """
    monkeypatch.setattr(watchdog, "_caught", {})
    before = {number: signal.getsignal(number) for number in watchdog.STOPPING}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


@pytest.fixture
def own_signals():
    """Signals have their default handlers during the test."""
    for number in watchdog.STOPPING:
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on `sys.path`; what was imported from it is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
