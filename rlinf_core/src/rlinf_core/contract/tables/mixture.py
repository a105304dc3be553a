"""`[[data.mixture]]`: several datasets in one run, and how samples are drawn from them.

An entry is a dataset's table, as in `[data]`, plus a name and a weight. Dataset classes know nothing about mixtures:
code that handles a run of one dataset handles each source as such a run (`RunConfig.sources`).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, InstanceOf, SerializeAsAny, SerializerFunctionWrapHandler, model_serializer, model_validator

from rlinf_core.contract.datasets import DatasetConfig
from rlinf_core.contract.tables.runner import Section

LOADER_KEYS = ("num_workers",)
"""Keys that stay in `[data]`: the same workers load every source."""


class MixtureShare(Section):
    """The keys of a `[[data.mixture]]` entry besides its dataset's own."""

    name: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$")
    """Name of the source in metrics, files and messages; empty: its `config_name`, numbered if that is taken."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Relative sampling weight: a training sample comes from this source with probability weight / sum of weights."""


class MixtureEntry(MixtureShare):
    """An entry of `[[data.mixture]]`."""

    data: SerializeAsAny[InstanceOf[DatasetConfig]]
    """The dataset; in TOML its keys are in the entry itself."""

    @model_serializer(mode="wrap")
    def _in_one_table(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        table: dict[str, Any] = write(self)
        data = {key: value for key, value in table.pop("data").items() if key not in LOADER_KEYS}
        return table | data


class MixtureConfig(DatasetConfig):
    """A `[data]` table that lists datasets instead of being one; its only keys are `mixture` and `LOADER_KEYS`."""

    mixture: tuple[MixtureEntry, ...] = Field(min_length=1)
    """The datasets."""

    @model_validator(mode="after")
    def _is_no_dataset(self) -> MixtureConfig:
        if foreign := sorted(self.model_fields_set - {"mixture", *LOADER_KEYS}):
            raise ValueError(f"{', '.join(foreign)}: set in the entries of data.mixture, not beside them")
        if twice := sorted({one.name for one in self.mixture if [o.name for o in self.mixture].count(one.name) > 1}):
            raise ValueError(f"two entries of data.mixture have the name {twice[0]!r}")
        return self

    @model_serializer(mode="wrap")
    def _own_keys(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        table = write(self)
        return {key: table[key] for key in (*LOADER_KEYS, "mixture") if key in table}

    @property
    def has_validation(self) -> bool:
        """Whether any source holds out episodes."""
        return any(entry.data.has_validation for entry in self.mixture)
