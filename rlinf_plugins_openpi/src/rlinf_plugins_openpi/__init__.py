"""The policies π0 and π0.5 for rlinf_core, and the dataset formats they are trained on.

The names in `__all__` are the public interface for other packages. They are imported on first use, so that the model's
modules can be imported where pydantic is not installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlinf_plugins_openpi.config import Pi0Config as Pi0Config
    from rlinf_plugins_openpi.config import Pi05Config as Pi05Config
    from rlinf_plugins_openpi.datasets.config import Pi0DatasetConfig as Pi0DatasetConfig
    from rlinf_plugins_openpi.datasets.config import Pi05DatasetConfig as Pi05DatasetConfig

_HOME = {
    "Pi0Config": "config",
    "Pi05Config": "config",
    "Pi0DatasetConfig": "datasets.config",
    "Pi05DatasetConfig": "datasets.config",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
