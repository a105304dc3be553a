"""The pytest fixtures of `rlinf_core.testing`."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlinf_core.config.toml import merge, parse_override, write_toml
from rlinf_core.plugins.registry import Plugins, get_plugins
from rlinf_core.testing.lerobot import TinyDataset, write_tiny_dataset
from rlinf_core.testing.plugins import plugins_in_memory


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """A LeRobot dataset of four episodes: two cameras as images, a 3-dimensional state, a 2-dimensional action."""
    return write_tiny_dataset(tmp_path_factory.mktemp("tiny_dataset") / "data")


@pytest.fixture
def tiny_run(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Write the config of a two-step run on the CPU: `tiny_run(config_name, repo_id, "policy.width=8")`.

    It returns the path of the TOML file. `rlinf_core.train.main([str(path)])` trains and writes the run's files to the
    folder `run` beside it.
    """

    def write(config_name: str, repo_id: object, *overrides: str) -> Path:
        table: Mapping[str, Any] = {
            "runner": {"name": "run", "output_dir": str(tmp_path), "max_steps": 2},
            "data": {"config_name": config_name, "repo_id": str(repo_id), "num_workers": 0},
            "trainer": {"device": "cpu", "global_batch_size": 2, "micro_batch_size": 1},
        }
        for override in overrides:
            table = merge(table, parse_override(override))
        path = tmp_path / "run.toml"
        path.write_text(write_toml(dict(table)), encoding="utf-8")
        return path

    before = signal.getsignal(signal.SIGTERM)
    yield write
    signal.signal(signal.SIGTERM, before)  # A run in this process has replaced it.


@pytest.fixture
def installed_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Plugins]]:
    """Make this process find only core's plugin and the given ones: `installed_plugins(my_plugin, datasets={...})`.

    Arguments are those of `plugins_in_memory`; the result is the `Plugins`. Other processes do not see them.
    """

    def install(*plugins: object, **options: Any) -> Plugins:
        found = plugins_in_memory(*plugins, **options)
        monkeypatch.setattr(Plugins, "load", classmethod(lambda cls: found))
        get_plugins.cache_clear()
        return found

    yield install
    get_plugins.cache_clear()
