"""Text SFT for rlinf_core: causal language models of transformers, and the text they are fine-tuned on.

The names in `__all__` are imported on first use: importing the package is quick and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlinf_plugins_text.config import TextPolicyConfig as TextPolicyConfig
    from rlinf_plugins_text.rows.dataset import TextDatasetConfig as TextDatasetConfig

_HOME = {"TextPolicyConfig": "config", "TextDatasetConfig": "rows.dataset"}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
