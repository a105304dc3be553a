"""Our sizes for the peers' models, through their configs of transformers. Standard library only.

lerobot and openpi write the published sizes into their code, so smaller models are built by giving their classes other
numbers; all that computes is theirs.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions

VLM, EXPERT = "gemma_2b", "gemma_300m"
"""The peers' names of the two experts' sizes."""


def gemma_sizes(dimensions: Pi0Dimensions, variant: str) -> Any:
    """What a peer's `get_gemma_config` returns."""
    return types.SimpleNamespace(**vars({VLM: dimensions.vlm, EXPERT: dimensions.expert}[variant]))


@contextlib.contextmanager
def of_size(dimensions: Pi0Dimensions, module: Any, classes: tuple[str, str]) -> Iterator[None]:
    """While the body runs, the two transformers classes that a peer's module uses build models of these sizes."""

    def shrunk(cls: Any) -> Any:
        return lambda config: cls(config=_shrink(config, dimensions))

    before = {name: getattr(module, name) for name in classes}
    try:
        vars(module).update({name: shrunk(cls) for name, cls in before.items()})
        yield
    finally:
        vars(module).update(before)


def _shrink(config: Any, dimensions: Pi0Dimensions) -> Any:
    """The config that a peer wrote published sizes into."""
    config = copy.deepcopy(config)
    if not hasattr(config, "vision_config"):
        config.vocab_size = dimensions.vocab_size
        return config
    vision, seen = dimensions.vision, config.vision_config
    seen.hidden_size, seen.num_hidden_layers, seen.intermediate_size = vision.width, vision.depth, vision.mlp_dim
    seen.num_attention_heads, seen.patch_size = vision.num_heads, vision.patch_size
    seen.projection_dim = dimensions.vlm.width
    config.text_config.vocab_size = config.image_token_id = config._vocab_size = dimensions.vocab_size
    return config
