"""Find the weight files at a path, list their names and shapes, and read one tensor at a time.

Supported are safetensors, in one file or in shards with an index, and the pickles that RLinf's trainer writes, from
which only plain tensors are read. Importing this, or listing safetensors, loads no torch.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from safetensors import SafetensorError, safe_open

from rlinf_core import UserError
from rlinf_core.untrusted.pickles import check_pickle
from rlinf_core.untrusted.text import path_inside, read_json
from rlinf_plugins_openpi.weights.hints import hint_for_folder

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FULL_WEIGHTS = tuple(
    f"{folder}{name}"
    # RLinf saves `<run>/checkpoints/global_step_N/actor/model_state_dict/full_weights.pt`; early versions misspelt it.
    for name in ("full_weights.pt", "full_weigths.pt")
    for folder in ("", "model_state_dict/", "actor/model_state_dict/")
)
DTYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
"""Dtypes that weights may have: torch's name -> safetensors' name."""
PICKLES = (".pt", ".pth", ".bin")


class TensorFiles(Protocol):
    """Named tensors on disk."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of all tensors, read without their values."""
        ...

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Names and dtypes of all tensors, in safetensors' terms: F32, BF16."""
        ...

    def read(self, key: str) -> torch.Tensor:
        """Read a whole tensor to the CPU, in the dtype of the file."""
        ...

    def path_of(self, key: str) -> Path:
        """The file or folder that holds a tensor."""
        ...


class Safetensors:
    """One safetensors file, or several shards."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in paths:
            try:
                with safe_open(path, framework="np") as file:
                    for key in file.keys():  # noqa: SIM118  # not a mapping
                        stored = file.get_slice(key)
                        self.shapes[key], self.dtypes[key] = tuple(stored.get_shape()), stored.get_dtype()
                        self._paths[key] = path
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is not a readable safetensors file: {error}") from error

    def path_of(self, key: str) -> Path:
        """See `TensorFiles`."""
        return self._paths[key]

    def read(self, key: str) -> torch.Tensor:
        """See `TensorFiles`. Maps the file for this tensor only, so that pages read earlier can be freed."""
        try:
            with safe_open(self._paths[key], framework="pt", device="cpu") as file:
                tensor: torch.Tensor = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._paths[key]}: {key} cannot be read: {error}") from error
        return tensor


class Pickle:
    """A state dict written by `torch.save`; opened on first use, because that needs torch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _tensors(self) -> Mapping[str, torch.Tensor]:
        import torch

        try:
            _check_archive(self.path)
            # Mapped, so that a tensor is read when it is used. Only tensors and plain containers are unpickled.
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # A damaged pickle may fail at any step, with any exception.
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{self.path} is no file of plain tensors written by torch.save (nothing else is unpickled): {reason}"
            ) from error
        if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            what = ", ".join(map(str, list(state)[:5])) if isinstance(state, Mapping) else type(state).__name__
            inner = _nested(state)
            unpack = f'torch.save(torch.load("{self.path}")["{inner}"], "weights.pt")'
            raise UserError(
                f"{self.path} is no state dict, a mapping of names to tensors; it holds: {what}"
                + (f". The weights are under {inner!r}: run {unpack} in Python, and name weights.pt" if inner else "")
            )
        return state

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `TensorFiles`."""
        return {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """See `TensorFiles`."""
        return {key: DTYPES.get(str(tensor.dtype), str(tensor.dtype)) for key, tensor in self._tensors.items()}

    def path_of(self, key: str) -> Path:
        """See `TensorFiles`."""
        return self.path

    def read(self, key: str) -> torch.Tensor:
        """See `TensorFiles`."""
        return self._tensors[key]


def _check_archive(path: Path) -> None:
    """Check the pickle in a file of `torch.save` before torch reads it.

    Other formats pass: torch refuses them, as they cannot be mapped. Raises an exception if unpickling could take any
    time or memory, or if torch could read another pickle than the one that was checked.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) != len(names) or archive.comment:
            raise pickle.UnpicklingError("its archive is not one of torch.save: names occur twice, or it has a comment")
        for entry in archive.infolist():
            if entry.filename.rpartition("/")[2].lower() == "data.pkl":
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise pickle.UnpicklingError("its archive is compressed")
                data = archive.read(entry)
                check_pickle(data)
                if b"bytearray" in data or b"_codecs" in data:
                    # torch allows them, and a bytearray has as many bytes as one number says.
                    raise pickle.UnpicklingError("it holds bytes")


def _nested(state: object) -> str:
    """The key under which a training checkpoint holds the model's state dict; empty if there is none."""
    inside = [key for key, value in state.items() if isinstance(value, Mapping)] if isinstance(state, Mapping) else []
    usual = ("model", "state_dict", "model_state_dict", "module", "policy", "ema", "params")
    return next((key for key in usual if key in inside), "")


def open_files(path: Path) -> TensorFiles:
    """Open the weights at a path: a file, or a folder as openpi, lerobot or RLinf leave it.

    Raises:
        UserError: There is nothing readable, or more than one candidate.
    """
    files = weight_files(path)
    return Pickle(files[0]) if files[0].suffix in PICKLES else Safetensors(files)


def weight_files(path: Path) -> list[Path]:
    """The existing files that contain the weights at a path; raises `UserError` as `open_files` does."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"there is no file or folder {path}")
    pickles = [path / name for name in FULL_WEIGHTS if (path / name).is_file()]
    tensors = [path / name for name in (SINGLE, INDEX) if (path / name).is_file()]
    if len(pickles) > 1 or (pickles and tensors):
        names = ", ".join(str(file.relative_to(path)) for file in (*tensors, *pickles))
        raise UserError(f"{path} holds more than one set of weights ({names}): name one of these files")
    if pickles:
        return pickles
    if not tensors:
        raise UserError(
            f"{path} holds neither {SINGLE} nor {INDEX}, nor {FULL_WEIGHTS[0]} of RLinf{hint_for_folder(path)}"
        )
    return tensors[:1] if tensors[0].name == SINGLE else shards(tensors[0])


def orbax_folder(path: Path) -> Path | None:
    """The folder with JAX parameters, `path` or its `params/`; None if there are none."""
    return next((folder for folder in (path, path / "params") if (folder / "manifest.ocdbt").is_file()), None)


def shards(index: Path) -> list[Path]:
    """The shards listed in an index.

    Raises:
        UserError: Not an index, or shards are missing.
    """
    names = shard_names(index)
    if absent := [name for name in names if not (index.parent / name).is_file()]:
        raise UserError(f"{index} names shards that are not there: {', '.join(absent)}")
    return [index.parent / name for name in names]


def shard_names(index: Path) -> list[str]:
    """The file names in an index, sorted; raises `UserError` if it is not an index."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        for name in names:
            path_inside(index.parent, name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} is not an index of safetensors shards: {error}") from error
    if not names:
        raise UserError(f"{index} is not an index of safetensors shards: it names none")
    return names
