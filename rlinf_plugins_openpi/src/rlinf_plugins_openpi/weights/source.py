"""Pretrained weights as the trainer loads them: in any known layout, with every name and shape checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinf_plugins_openpi.model.parts import Part, parameter_parts, unpacked_shapes
from rlinf_plugins_openpi.weights.files import DTYPES, Pickle, TensorFiles, open_files
from rlinf_plugins_openpi.weights.layouts import OPENPI, Slot, find_layout
from rlinf_plugins_openpi.weights.mismatch import Mismatch
from rlinf_plugins_openpi.weights.names import EMBEDDING, EMBEDDING_IN_FILES, UNUSED_HEAD
from rlinf_plugins_openpi.weights.shapes import table_shapes

if TYPE_CHECKING:
    import torch

    from rlinf_plugins_openpi.model.dimensions import Pi0Dimensions


def check_headers(path: Path, dimensions: Pi0Dimensions) -> None:
    """Check names, shapes and dtypes in safetensors files from their headers, without torch. A pickle is not opened.

    Raises:
        UserError: There is nothing readable at `path`, or a tensor is missing, unexpected, misshapen or no float.
    """
    files = open_files(path)
    if not isinstance(files, Pickle):
        PublishedWeights(path, dimensions, files).check_headers(table_shapes(dimensions))


class PublishedWeights:
    """Weights on disk, read one tensor at a time: a `rlinf_core.contract.module.WeightSource`.

    Args:
        path: A file, or a folder written by openpi, lerobot or RLinf (see `files.open_files`).
        dimensions: The sizes of the model; they determine the expected names.
        files: The tensors, if already open; `path` is then only used in errors.

    Raises:
        UserError: There is nothing readable at `path`, or the tensors are in no known layout.
    """

    def __init__(self, path: str | Path, dimensions: Pi0Dimensions, files: TensorFiles | None = None) -> None:
        self.path = Path(path)
        self._dimensions = dimensions
        self._files = open_files(self.path) if files is None else files
        self.layout = find_layout(self._files.shapes, str(self.path))
        self._slots = self.layout.slots(dimensions)
        self._parts = parameter_parts(dimensions)
        # In openpi's layout the embedding has two names, and the expert has a head that is not in the model.
        own = self.layout.prefix if self.layout.layout is OPENPI else None
        self._embedding = None if own is None else own + EMBEDDING
        self._head = None if own is None else own + EMBEDDING_IN_FILES
        self._unused = None if own is None else own + UNUSED_HEAD

    def tensor(self, name: str) -> torch.Tensor:
        """Read the parameter `name` (the model's own name) whole, to the CPU, in the dtype of the file.

        `name` may also be that of a published tensor in the tables, i.e. of a part of a parameter.
        """
        parts = [self._part(part.name) for part in self._parts.get(name, (Part(name, 0),))]
        if len(parts) == 1:
            return parts[0]
        import torch

        return torch.cat(parts)

    def file_of(self, name: str) -> str:
        """The files that hold the parameter `name`."""
        parts = self._parts.get(name, (Part(name, 0),))
        files = {self._files.path_of(self.slot(part.name).key): None for part in parts}
        return ", ".join(map(str, files))

    def _part(self, name: str) -> torch.Tensor:
        slot = self.slot(name)
        return slot.take(self._files.read(slot.key))

    def slot(self, name: str) -> Slot:
        """Where the files have, or should have, a tensor of the tables."""
        slot, there = self._slots[name], self._files.shapes
        if slot.key == self._embedding and self._embedding not in there and self._head in there:
            return Slot(str(self._head))
        return slot

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes in the files with those of the model.

        Args:
            shapes: The model's own parameter names -> shapes, or those of the parts.

        Raises:
            UserError: Lists every stored tensor that is missing, unexpected or of another shape, and an embedding that
                is stored under both of its names with different values.
        """
        self.check_headers(unpacked_shapes(shapes, self._dimensions))
        if self._embeddings_differ():
            expected = [self.slot(name).key for name in self._slots]
            raise self._mismatch(ambiguous=(str(self._embedding), str(self._head)), expected=expected).error()

    def check_headers(self, parts: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names, shapes and dtypes in the files with those of the tables; reads no values.

        Args:
            parts: The names of the tables -> shapes.

        Raises:
            UserError: Lists every stored tensor that is missing, unexpected, or of another shape or dtype.
        """
        there = self._files.shapes
        expected = {self.slot(name).key: self.slot(name).stored_shape(shape) for name, shape in parts.items()}
        common = [key for key in expected if key in there]
        mismatch = self._mismatch(
            missing={key: shape for key, shape in expected.items() if key not in there},
            expected=expected,
            misshapen={key: (there[key], expected[key]) for key in common if there[key] != expected[key]},
            not_floats={key: dtype for key in common if (dtype := self._files.dtypes[key]) not in DTYPES.values()},
        )
        if mismatch:
            raise mismatch.error()

    def _mismatch(self, *, expected: Collection[str], **differences: Any) -> Mismatch:
        """The given differences, and all unexpected tensors in the files."""
        there, known = self._files.shapes, {*expected, self._unused, self._head}
        unexpected = {key: shape for key, shape in there.items() if key not in known}
        return Mismatch(self.path, self.layout, self._dimensions, there, unexpected=unexpected, **differences)

    def _embeddings_differ(self) -> bool:
        """Whether a published file contains different tensors under the embedding's two names, which should be one.

        A full state dict of lerobot or RLinf may have a separate head, copied from the embedding and never trained;
        there, the embedding is used.
        """
        head, embedding, there = self._head, self._embedding, self._files.shapes
        whole_state = bool(self.layout.prefix) or isinstance(self._files, Pickle)
        if head is None or embedding is None or head not in there or embedding not in there or whole_state:
            return False
        if there[head] != there[embedding]:
            return True
        import torch

        return not torch.equal(self._files.read(embedding), self._files.read(head))
