"""One safetensors file under published names: what a policy saves and reads unless it has a layout of its own.

Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinf_core.contract.policy_options import Published
from rlinf_core.contract.weights.folder import hint_for_folder
from rlinf_core.errors import UserError

if TYPE_CHECKING:
    import torch

FILE = "model.safetensors"
"""Name of the file in a folder of weights."""
LISTED = 8
"""An error lists at most this many names of each kind."""


def write_weights(names: Published, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write whole tensors, keyed by the module's own names, to the file of a folder; parts become separate tensors."""
    import torch
    from safetensors.torch import save_file

    published: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        parts = names.published_parts(name)
        if parts:  # Cloned, because safetensors refuses tensors that share memory.
            pieces = (piece.clone() for piece in torch.split(tensor, [*parts.values()]))
            published |= dict(zip(parts, pieces, strict=True))
        else:
            published[names.published_name(name)] = tensor.contiguous()
    save_file(published, folder / FILE)


class WeightFile:
    """The tensors of a file; a `contract.module.WeightSource`, which reads one at a time.

    Args:
        weights: The file, or a folder that has it under the name `FILE`.
        names: What the parameters are called there.

    Raises:
        UserError: There is no such file, or it is not a safetensors file.
    """

    def __init__(self, weights: str, names: Published) -> None:
        from safetensors import SafetensorError, safe_open

        path = Path(weights).expanduser()
        self._path, self._names = path / FILE if path.is_dir() else path, names
        if not self._path.is_file():
            hint = hint_for_folder(path, (FILE,), takes_files=False) if path.is_dir() else ""
            raise UserError(f"policy.weights: there is no file {self._path}{hint}")
        try:
            self._file: Any = safe_open(self._path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"policy.weights: {self._path} cannot be read as safetensors: {error}") from error

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter's whole tensor, on the CPU, in the file's dtype."""
        import torch

        parts = self._names.published_parts(name) or (self._names.published_name(name),)
        pieces: list[torch.Tensor] = [self._file.get_tensor(part) for part in parts]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def file_of(self, name: str) -> str:
        """The file."""
        return str(self._path)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `UserError` naming missing and unexpected tensors and those of another shape."""
        wanted: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            parts = {part: (rows, *shape[1:]) for part, rows in self._names.published_parts(name).items()}
            wanted |= parts or {self._names.published_name(name): shape}
        there = self._file.keys()
        found = {name: tuple(self._file.get_slice(name).get_shape()) for name in there}
        problems = {
            "it lacks": sorted(wanted.keys() - found.keys()),
            "it has unexpected": sorted(found.keys() - wanted.keys()),
            "of another shape:": [
                f"{name} is {list(found[name])} instead of {list(shape)}"
                for name, shape in sorted(wanted.items())
                if name in found and found[name] != shape
            ],
        }
        if texts := [f"{kind} {_listed(names)}" for kind, names in problems.items() if names]:
            raise UserError(f"policy.weights: {self._path} does not match the model: {'; '.join(texts)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
