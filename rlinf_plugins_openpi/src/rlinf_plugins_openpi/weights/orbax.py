"""Read openpi's JAX parameters from an orbax checkpoint, one array at a time, without JAX or orbax.

Orbax stores arrays in tensorstore's OCDBT database. An array's name is its path in the parameter tree joined by dots
(`params.PaliGemma.llm.embedder.input_embedding`); training checkpoints append `value`. Reading arrays directly needs
only tensorstore and, unlike orbax's own restore, no second copy of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlinf_core import UserError
from rlinf_plugins_openpi.weights.files import DTYPES

if TYPE_CHECKING:
    import torch

ARRAYS = {"/.zarray": "zarr", "/zarr.json": "zarr3"}
"""File that describes an array -> tensorstore's driver for it."""


class OrbaxParameters:
    """The arrays of a `params/` folder, with `/` in names instead of dots (a `files.TensorFiles`).

    The last array read is kept, because stacked layers are taken from it one after another.

    Args:
        folder: The folder with `manifest.ocdbt`.

    Raises:
        UserError: tensorstore is not installed, or the folder cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._tensorstore = _tensorstore()
        self._folder = folder
        self._stores: dict[str, Any] = {}
        self._last: tuple[str, torch.Tensor] | None = None
        for stored, driver in self._list():
            name = stored.removesuffix(".value").replace(".", "/")
            self._stores[name] = self._open(stored, driver)
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(store.shape) for name, store in self._stores.items()}
        self.dtypes: dict[str, str] = {
            name: DTYPES.get(f"torch.{store.dtype.name}", store.dtype.name) for name, store in self._stores.items()
        }

    def path_of(self, key: str) -> Path:
        """See `files.TensorFiles`."""
        return self._folder

    def read(self, key: str) -> torch.Tensor:
        """See `files.TensorFiles`."""
        if self._last is None or self._last[0] != key:
            self._last = None  # Free it first: memory may not hold two.
            self._last = (key, _tensor(self._stores[key].read().result()))
        return self._last[1]

    def _list(self) -> list[tuple[str, str]]:
        """The stored names of all arrays and their drivers."""
        database = {"driver": "ocdbt", "base": self._folder.resolve().as_uri() + "/"}
        try:
            keys = [key.decode() for key in self._tensorstore.KvStore.open(database).result().list().result()]
        except ValueError as error:
            raise UserError(f"{self._folder} is not a readable orbax checkpoint: {error}") from error
        return [(key.removesuffix(end), driver) for key in keys for end, driver in ARRAYS.items() if key.endswith(end)]

    def _open(self, stored: str, driver: str) -> Any:
        base = self._folder.resolve().as_uri() + "/"
        spec = {"driver": driver, "kvstore": {"driver": "ocdbt", "base": base, "path": stored + "/"}}
        try:
            return self._tensorstore.open(spec, read=True, open=True).result()
        except ValueError as error:
            raise UserError(f"{self._folder}: the array {stored} cannot be opened: {error}") from error


def _tensorstore() -> Any:
    try:
        import tensorstore
    except ImportError as error:
        raise UserError(
            "openpi's JAX parameters are read with tensorstore, which is not installed: "
            "pip install 'rlinf-plugins-openpi[jax]' (JAX itself is not needed)"
        ) from error
    return tensorstore


def _tensor(array: Any) -> torch.Tensor:
    """A NumPy array as a tensor. NumPy has no bfloat16: tensorstore returns an extension dtype."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
    return torch.from_numpy(array)
