"""Model folders of transformers: found, read and written.

`model_config` is imported on first use: the package itself imports neither torch nor transformers.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlinf_plugins_text.weights.architecture import model_config as model_config

__all__ = ["model_config"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from rlinf_plugins_text.weights import architecture

    return getattr(architecture, name)
