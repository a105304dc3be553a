"""What core's own tables of the config have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table of the config."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
