"""A model's image processor: its settings, with those of `policy.image_processor`, and what it makes of images.

Imports torch and transformers only where pixels are processed, or texts expanded (in a process with limits).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlinf_core import UserError
from rlinf_core.errors import did_you_mean
from rlinf_core.untrusted.text import read_json
from rlinf_plugins_text.vision.families import FAMILIES, Family

if TYPE_CHECKING:
    from torch import Tensor

IMAGES, ALL = "preprocessor_config.json", "processor_config.json"
"""The image processor's file, and the file in which transformers 5 saves it together with others."""
FILES = (IMAGES, ALL, "video_preprocessor_config.json", "chat_template.json")
"""Files of a processor beside those of its tokenizer."""
BLANK = 64
"""Height and width of a blank image."""
EDGES = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
"""Limits of an image's area -> where Qwen's processors keep them in `size`."""


@dataclass(frozen=True)
class Vision:
    """What rows, batches and the model need to know of images. Picklable, for loader workers."""

    model_type: str
    folder: Path
    """The folder with the processor's files."""
    changes: str
    """JSON of `policy.image_processor`."""
    table: str
    """JSON of the model's `config.json`."""
    token: int
    """The token whose embedding an image's features replace."""
    placeholder: str
    """The text that chat templates write for an image."""
    around: tuple[str, str] = ("", "")
    """What is before and after the placeholder outside of a chat template."""

    @property
    def family(self) -> Family:
        """The facts of the model's family."""
        return FAMILIES[self.model_type]

    @functools.cached_property
    def entry_tokens(self) -> int:
        """Tokens for an entry of `pixel_values`; 0: the grid says it."""
        return self.family.entry_tokens(json.loads(self.table))

    def tag(self) -> list[Any]:
        """What the tokens of a text with images depend on besides the tokenizer."""
        from importlib.metadata import version

        files = {name: read_json(self.folder / name) for name in FILES[:2] if (self.folder / name).is_file()}
        return [self.model_type, self.placeholder, self.changes, files, version("transformers")]

    def inputs(self, images: Sequence[NDArray[np.uint8]]) -> dict[str, Tensor]:
        """What the model gets of images; see `pixel_inputs`."""
        return pixel_inputs(str(self.folder), self.changes, images)


def has_processor(folder: Path) -> bool:
    """Whether a folder has an image processor."""
    return bool(_settings(folder))


def check_torchvision() -> None:
    """Raise `UserError` if torchvision, with which transformers processes images, is missing."""
    if not find_spec("torchvision"):
        raise UserError(
            "images need torchvision, with which transformers processes them: pip install 'rlinf-plugins-text[vision]'"
        )


def pixel_inputs(folder: str, changes: str, images: Sequence[NDArray[np.uint8]]) -> dict[str, Tensor]:
    """Process images one by one, so that none depends on the others of its batch.

    Args:
        folder: The processor's.
        changes: JSON of `policy.image_processor`.
        images: uint8 [height, width, 3], RGB.

    Returns:
        The processor's outputs, `pixel_values` and others, concatenated along their first axis; `entries`, int64
        [images], says how many entries of `pixel_values` belong to each image.

    Raises:
        UserError: The processor refuses an image.
    """
    import torch

    processor = load_image_processor(folder, changes)
    outputs = []
    for image in images:
        try:
            made = processor(images=[image], return_tensors="pt", input_data_format="channels_last")
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"the image processor refuses an image of {image.shape}: {error}") from error
        # SmolVLM's and Idefics' have an axis for the samples of a batch.
        nested = made["pixel_values"].ndim == 5
        outputs.append({k: v[0] if nested else v for k, v in made.items() if k in KEPT and isinstance(v, torch.Tensor)})
    entries = torch.tensor([len(one["pixel_values"]) for one in outputs])
    return {key: torch.cat([one[key] for one in outputs]) for key in outputs[0]} | {"entries": entries}


KEPT = ("pixel_values", "image_grid_thw", "pixel_attention_mask")
"""Outputs of image processors that models read."""


@functools.lru_cache(maxsize=4)
def load_image_processor(folder: str, changes: str) -> Any:
    """The processor of transformers. Raises `UserError` if it cannot be loaded, or has none of the changed keys."""
    from transformers import AutoImageProcessor

    check_torchvision()
    auto: Any = AutoImageProcessor
    changed: dict[str, Any] = json.loads(changes)
    try:
        processor = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **changed)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise UserError(f"{folder}: the image processor cannot be loaded: {' '.join(str(error).split())}") from error
    known = set(processor.to_dict()) - {"image_processor_type"}
    kinds: Mapping[str, Any] = getattr(getattr(processor, "valid_kwargs", None), "__annotations__", {})
    own = {name for cls in type(processor).__mro__ for name in vars(cls)}
    known |= {key for key in kinds if key in own}
    limits = {key for key, _ in EDGES}
    known = (known - limits) | (limits & set(kinds))
    if unknown := sorted(changed.keys() - known):
        raise UserError(
            f"policy.image_processor: {type(processor).__name__} has no {unknown[0]!r}{did_you_mean(unknown[0], known)}"
        )
    return processor


def expansions(folder: str, changes: str, placeholder: str, sizes: Sequence[tuple[int, int]]) -> list[tuple[str, str]]:
    """What the model's processor writes into a text for an image of each size.

    The processor expands a text with one placeholder and a blank image of that size; the text that it then gives to its
    tokenizer is read. Called in a process with limits, because it loads the tokenizer.

    Returns:
        For each size the text, or why the processor refuses such an image; the other is empty.
    """
    from transformers import AutoProcessor

    check_torchvision()
    auto: Any = AutoProcessor
    processor = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    processor.image_processor = load_image_processor(folder, changes)
    recorder = processor.tokenizer = _Recorder(processor.tokenizer)
    found = []
    for height, width in sizes:
        try:
            processor(text=[f"a{placeholder}b"], images=[np.zeros((height, width, 3), np.uint8)])
        except ValueError as error:
            found.append(("", " ".join(str(error).split())))
            continue
        written = recorder.text[1 : recorder.text.rindex("b")]
        # PaliGemma's writes the beginning of the prompt after its images.
        found.append((written.removesuffix(processor.tokenizer.bos_token or "\0"), ""))
    return found


class _Recorder:
    """A tokenizer that remembers the last text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.text = tokenizer, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        self.text = text[0]
        return self._tokenizer(text, *args, **kwargs)


def exported_files(folder: Path, changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The processor's files with the changes of `policy.image_processor`: name -> contents.

    transformers 4 reads `preprocessor_config.json` alone, which transformers 5 does not write: both are there.
    """
    settings = _changed(_settings(folder), changes)
    files = {IMAGES: settings}
    for name in FILES[1:]:
        if (folder / name).is_file() and isinstance(table := read_json(folder / name), dict):
            nested = {"image_processor": _changed(table["image_processor"], changes)} if name == ALL else {}
            files[name] = table | (nested if "image_processor" in table else {})
    if "processor_class" not in settings and "processor_class" in files.get(ALL, {}):
        settings["processor_class"] = files[ALL]["processor_class"]
    return files


def _changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = {**settings, **changes}
    if isinstance(size := result.get("size"), Mapping):
        result["size"] = {**size, **{edge: changes[key] for key, edge in EDGES if key in changes and edge in size}}
    return result


def _settings(folder: Path) -> dict[str, Any]:
    """The image processor's settings; empty if there are none."""
    for name in (IMAGES, ALL):
        path = folder / name
        if not path.is_file():
            continue
        try:
            table = read_json(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        inner = table.get("image_processor") if isinstance(table, dict) and name == ALL else table
        if isinstance(inner, dict) and inner:
            return inner
    return {}
