"""`meta/info.json` of a LeRobot dataset: its format, columns, counts, and how its files are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from rlinf_core.data.lerobot.files import INFO, read_json
from rlinf_core.errors import UserError
from rlinf_core.untrusted import path_inside

VERSIONS = ("v2.0", "v2.1", "v3.0")
"""The formats that are read."""
LARGEST = 2**20
"""No column has more numbers along an axis."""
_DIGITS = re.compile(r"0?\d?\d?d?")
"""How wide a number is written in a path."""
NUMBERS = ("float", "int", "uint", "bool")
"""What the dtypes of columns of numbers begin with."""


def _described(feature: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(feature.get("dtype"), str):
        raise ValueError("has no dtype")
    shape = feature.get("shape")
    known = isinstance(shape, list) and all(isinstance(n, int) and 0 <= n <= LARGEST for n in shape)
    if feature["dtype"].startswith(NUMBERS) and not known:
        raise ValueError("has no shape, a list of whole numbers")
    return feature


class Info(BaseModel):
    """What is read of `meta/info.json`."""

    codebase_version: str
    fps: float = Field(ge=1e-3, le=1e6)
    features: dict[str, Annotated[dict[str, Any], AfterValidator(_described)]]
    total_episodes: int = Field(ge=0, le=2**40)
    total_frames: int = Field(ge=0, le=2**40)
    data_path: str
    video_path: str | None = None
    chunks_size: int = Field(default=1000, gt=0)

    @property
    def videos(self) -> list[str]:
        """Columns of videos."""
        return [name for name, feature in self.features.items() if feature["dtype"] == "video"]

    def file(self, root: Path, pattern: str | None, **numbers: Any) -> Path:
        """The path that `data_path` or `video_path` makes of numbers."""
        try:
            name = _filled(str(pattern), numbers)
        except (LookupError, ValueError) as error:
            raise UserError(f"{root / INFO}: the path {pattern!r} asks for more than {', '.join(numbers)}") from error
        try:
            return path_inside(root, name)
        except ValueError as error:
            raise UserError(
                f"{root / INFO}: the path {pattern!r} leads out of the dataset's folder: {error}"
            ) from error


def _filled(pattern: str, values: Mapping[str, Any]) -> str:
    """`str.format` with names and numbers of digits alone: it would also look into objects, and fill up to any width.

    Raises:
        LookupError: The pattern asks for another name.
        ValueError: It is no such pattern.
    """
    text = ""
    for literal, field, width, conversion in Formatter().parse(pattern):
        if conversion or (width and not _DIGITS.fullmatch(width)):
            raise ValueError("a number may have a width, as in {episode_index:06d}, and nothing else")
        text += literal + ("" if field is None else format(values[field], width or ""))
    return text


def load_info(name: str, root: Path) -> Info:
    """Read `meta/info.json`.

    Args:
        name: What the user calls the dataset.
        root: Its folder.

    Raises:
        UserError: The file is missing or damaged, or the format is not one of `VERSIONS`.
    """
    path = root / INFO
    try:
        content = read_json(path)
    except FileNotFoundError as e:
        raise UserError(f"{root} is not a LeRobot dataset: it has no {INFO} (data.repo_id = {name!r})") from e
    version = content.get("codebase_version") if isinstance(content, dict) else None
    if version is not None and version not in VERSIONS:
        raise UserError(_wrong_version(name, root, str(version)))
    try:
        info = Info.model_validate(content)
    except ValidationError as e:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'the whole'}: {one['msg']}" for one in e.errors())
        raise UserError(f"{path} is damaged: {wrong}. Download or write the dataset again") from e
    if info.videos and not info.video_path:
        raise UserError(f"{path} has columns of videos and no video_path: download or write the dataset again")
    return info


def _wrong_version(name: str, root: Path, version: str) -> str:
    if version.startswith("v1"):
        way_out = (
            "lerobot 0.3.3 converts it, from the hub: python -m lerobot.datasets.v2.convert_dataset_v1_to_v2 "
            f"--repo-id {name}"
        )
    else:
        way_out = "a newer rlinf-core may read it; or write it with lerobot's converter for one of these formats"
    return f"{name} ({root}) has LeRobot format {version}; {', '.join(VERSIONS)} are read. {way_out}"
