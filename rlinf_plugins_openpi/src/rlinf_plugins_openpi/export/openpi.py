"""Write a policy for openpi's loaders: weights in its PyTorch layout, statistics under each dataset's asset id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlinf_core import UserError
from rlinf_core.data.normalize import save_norm_stats
from rlinf_plugins_openpi.datasets.config import asset_name
from rlinf_plugins_openpi.weights.saving import save_published

if TYPE_CHECKING:
    from torch import Tensor

    from rlinf_core.contract.policy import TrainedOn
    from rlinf_plugins_openpi.settings import OpenpiSettings


def export_openpi(
    policy: OpenpiSettings, tensors: Mapping[str, Tensor], folder: Path, sources: Sequence[TrainedOn]
) -> None:
    """Write what openpi's `create_trained_policy` loads: `model.safetensors` and `assets/<asset_id>/norm_stats.json`.

    Args:
        policy: The policy to export.
        tensors: Its parameters, with the whole embedding.
        folder: An empty folder.
        sources: The datasets that the policy was trained on.

    Raises:
        UserError: Two datasets have the same asset id.
    """
    # openpi looks under the asset id of its config: the dataset's id by default.
    assets = {asset_name(source.data.repo_id): source for source in sources}
    if len(assets) < len(sources):
        names = ", ".join(source.name for source in sources)
        raise UserError(f"openpi keeps statistics by dataset, and some of {names} have the same: give --source")
    save_published(tensors, folder / "model.safetensors", policy.dimensions)
    for asset, source in assets.items():
        if source.stats is not None:
            save_norm_stats(folder / "assets" / asset / "norm_stats.json", source.stats)
