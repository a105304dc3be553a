"""Where openpi keeps a dataset's statistics: `<assets_dir>/<asset_id>/norm_stats.json`."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class Assets(BaseModel):
    """openpi's `AssetsConfig`, for folders on this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    assets_dir: str = Field(min_length=1)
    """The folder `assets` of a checkpoint."""
    asset_id: str = ""
    """The folder in it; empty: named as the dataset."""

    def file(self, repo_id: str) -> str:
        """The path of the statistics, for a dataset of this `data.repo_id`."""
        return str(Path(self.assets_dir) / (self.asset_id or asset_name(repo_id)) / "norm_stats.json")


def asset_name(repo_id: str) -> str:
    """What openpi calls the statistics of a dataset: its hub id without a revision, or the name of its local folder."""
    on_hub = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(@.+)?", repo_id)
    return on_hub[1] if on_hub and not Path(repo_id).exists() else Path(repo_id).name
