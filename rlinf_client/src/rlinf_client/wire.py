"""Messages between robots and policy servers: msgpack with NumPy arrays, as openpi and vla-eval write them.

Both sides use this module, so it distrusts what it reads: only arrays of numbers and texts are built, their size must
be that of their bytes, and a message holds a limited number of containers, so that it cannot unpack to many times its
size. Nothing is ever unpickled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgpack
import numpy as np
from numpy.typing import NDArray

Dialect = Literal["openpi", "vla-eval"]
ImageDecoder = Callable[[bytes], NDArray[np.uint8]]

DTYPE = re.compile(r"[<>|=]?(?:[biuf][1248]|f16|U\d{1,4})")
"""Dtypes of arrays: booleans, integers, floats and short texts. Never objects, structures or dates."""
MOST_CONTAINERS = 4096
"""Lists and maps in a message: an observation has dozens."""
MOST_ENTRIES = 65_536
"""Entries of one list or map: states and action chunks that are lists of numbers have hundreds."""
MOST_DIMENSIONS = 8


class WireError(ValueError):
    """A message is not one of this format. The text says why, without the message's content."""


def pack(value: Any, dialect: Dialect = "openpi") -> bytes:
    """Pack a value of maps, lists, texts, numbers and NumPy arrays.

    Args:
        value: What to send. Arrays may contain booleans, integers, floats or texts.
        dialect: Keys of arrays as bytes and NumPy scalars with their dtype (openpi), or keys as texts and plain numbers
            (vla-eval).

    Raises:
        WireError: The value contains something else, such as an array of objects.
    """
    try:
        packed: bytes = msgpack.packb(value, default=_openpi if dialect == "openpi" else _vla_eval)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"this cannot be sent: {error}") from error
    return packed


def unpack(data: bytes, image: ImageDecoder | None = None) -> Any:
    """Unpack a message of either dialect; arrays share its memory and are read-only.

    Args:
        data: The message.
        image: Decodes compressed images, which vla-eval sends; None: a message with one is an error.

    Raises:
        WireError: It is malformed, or holds what is never sent: objects, extension types, too many containers.
    """
    reader = _Reader(image)
    try:
        return msgpack.unpackb(
            data,
            object_hook=reader.map,
            list_hook=reader.list,
            ext_hook=_no_extension,
            max_array_len=MOST_ENTRIES,
            max_map_len=MOST_ENTRIES,
        )
    except WireError:
        raise
    except Exception as error:  # msgpack raises many kinds, some of them plain `ValueError`s with the data in them.
        raise WireError(f"the message is not valid msgpack ({type(error).__name__})") from error


class _Reader:
    """Hooks that build arrays, and count containers."""

    def __init__(self, image: ImageDecoder | None) -> None:
        self.image = image
        self.containers = 0

    def count(self) -> None:
        self.containers += 1
        if self.containers > MOST_CONTAINERS:
            raise WireError(f"the message has more than {MOST_CONTAINERS} lists and maps")

    def list(self, values: list[Any]) -> list[Any]:
        self.count()
        return values

    def map(self, values: dict[Any, Any]) -> Any:
        self.count()
        marked = {key if isinstance(key, str) else _text(key): key for key in values}
        if "__ndarray__" in marked:
            return _array(*(values.get(marked.get(name)) for name in ("data", "dtype", "shape")))
        if "__npgeneric__" in marked:
            return _scalar(*(values.get(marked.get(name)) for name in ("data", "dtype")))
        if "__image__" in marked:
            return self._image(values, marked)
        return values

    def _image(self, values: dict[Any, Any], marked: Mapping[str, Any]) -> Any:
        data, kind = values.get(marked.get("data")), values.get(marked.get("format"))
        if kind == "raw":
            return _array(data, *(values.get(marked.get(name)) for name in ("dtype", "shape")))
        if not isinstance(data, bytes):
            raise WireError("an image has no bytes")
        if self.image is None:
            raise WireError("compressed images are not taken here: send arrays")
        return self.image(data)


def _text(key: Any) -> str:
    return key.decode("ascii", "replace") if isinstance(key, bytes) else str(key)


def _dtype(given: Any) -> np.dtype[Any]:
    name = _text(given) if isinstance(given, (str, bytes)) else ""
    if not DTYPE.fullmatch(name):
        raise WireError(f"arrays of dtype {str(given)[:40]!r} are not taken: send numbers, booleans or texts")
    return np.dtype(name)


def _array(data: Any, dtype: Any, shape: Any) -> NDArray[Any]:
    known = _dtype(dtype)
    sizes = list(shape) if isinstance(shape, (list, tuple)) else None
    if sizes is None or len(sizes) > MOST_DIMENSIONS or any(type(n) is not int or n < 0 for n in sizes):
        raise WireError(f"an array has no valid shape: up to {MOST_DIMENSIONS} sizes from 0")
    if not isinstance(data, bytes) or len(data) != math.prod(sizes) * known.itemsize:
        has = f"{len(data)} bytes" if isinstance(data, bytes) else "no bytes"
        raise WireError(f"an array of shape {sizes} and dtype {known} has {has}")
    try:
        return np.frombuffer(data, known).reshape(sizes) if data else np.zeros(sizes, known)
    except ValueError as error:
        raise WireError(f"an array of shape {sizes} and dtype {known} is too large") from error


def _scalar(data: Any, dtype: Any) -> Any:
    known = _dtype(dtype)
    fits: Any = {"U": str, "b": bool, "i": int, "u": int, "f": (int, float)}[known.kind]
    if not isinstance(data, fits):
        raise WireError(f"a scalar of dtype {known} is {type(data).__name__}")
    try:
        return known.type(data)
    except OverflowError as error:
        raise WireError(f"a scalar does not fit into dtype {known}") from error


def _no_extension(code: int, data: bytes) -> Any:
    raise WireError(f"msgpack's extension type {code} is not taken")


def _sent(array: NDArray[Any] | np.generic) -> None:
    if array.dtype.kind not in "biufU":
        raise WireError(f"dtype {array.dtype} is neither numbers, booleans nor texts")


def _openpi(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        _sent(value)
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        _sent(value)
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return _plain(value)


def _vla_eval(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        _sent(value)
        return {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, np.generic):
        _sent(value)
        return value.item()
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise WireError(f"it contains a {type(value).__name__}")
