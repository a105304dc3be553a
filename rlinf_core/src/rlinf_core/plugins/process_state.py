"""What the code of plugins must leave as it was: settings of the whole process, on which the rest of a run relies."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from rlinf_core.terminal import warn


@dataclass(frozen=True)
class _Setting:
    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    first: Any = None
    """Its value in a new process; None if that differs."""


def _folder() -> str | None:
    with suppress(OSError):  # It may have been deleted.
        return os.getcwd()
    return None


_FOLDER = _Setting("the current folder", _folder, os.chdir)
_loaded: tuple[_Setting, ...] = ()


def _settings() -> tuple[_Setting, ...]:
    """All settings; those of torch only once it is loaded, as this module does not load it."""
    global _loaded
    torch: Any = sys.modules.get("torch")
    if not hasattr(torch, "get_default_device"):  # Not loaded, or not yet completely.
        return (_FOLDER,)
    _loaded = _loaded or (
        _FOLDER,
        _Setting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        _Setting("torch's default device", torch.get_default_device, _set_device, torch.device("cpu")),
        _Setting("whether torch records gradients", torch.is_grad_enabled, torch.set_grad_enabled, True),
    )
    return _loaded


def _set_device(device: Any) -> None:
    import torch

    torch.set_default_device(None if device.type == "cpu" else device)


@contextmanager
def kept(what: Callable[[], str]) -> Iterator[None]:
    """Put back what the body has changed of the process, with a warning.

    Args:
        what: Names the body, for the warning.
    """
    before = {setting.name: setting.read() for setting in _settings()}
    try:
        yield
    finally:
        for setting in _settings():  # More than before if the body has loaded torch.
            value = before.get(setting.name, setting.first)
            if value is not None and (now := setting.read()) != value:
                with suppress(OSError):
                    setting.write(value)
                warn(f"{what()} changed {setting.name} from {value} to {now}; it is put back")
