"""InsightFace pair sets, files that strangers hand around: what their pickles may hold, and no numpy code on their bytes.

Python 2 and 3 wrote them, with images as bytes or numpy uint8 arrays, so that several spellings of the same few types occur."""

from __future__ import annotations

import reprlib
from typing import Any

import numpy as np

from dali_loaders.regular import open_regular
from dali_loaders.waiting import waiting
from pipeline.plain_pickle import Refused, load

PLAIN_DTYPES = ("b1", "i1", "u1", "i4", "i8")
EXPECTED = "a pickle of (list of encoded images, list of booleans) as InsightFace makes them"


def load_pairs(path: str) -> tuple[list[bytes], list[bool]]:
    """Encoded images and pair labels of a `.bin` file. Raises ValueError when it is missing or holds anything else."""
    try:
        with waiting(f"the pair set {path} to be read"), open(path, "rb", opener=open_regular) as file:
            content = load(file, path, _TYPES, EXPECTED)
    except OSError as error:
        raise ValueError(f"{path}: the pair set cannot be opened ({error.strerror}); expected {EXPECTED}.") from error
    if not (isinstance(content, tuple | list) and len(content) == 2 and all(isinstance(part, list | tuple | _Array) for part in content)):
        raise ValueError(f"{path}: the pickle holds something other than two lists; expected {EXPECTED}.")
    images, issame = content
    if isinstance(images, _Array):
        raise ValueError(f"{path}: the images are one array; expected {EXPECTED}.")
    if isinstance(issame, _Array):
        issame = issame.numbers()
    for i, image in enumerate(images):
        if not (isinstance(image, bytes) or (isinstance(image, _Array) and image.dtype in ("u1", "i1"))):
            raise ValueError(f"{path}: image {i} is a {type(image).__name__}, neither bytes nor a uint8 array; expected {EXPECTED}.")
    for i, same in enumerate(issame):
        if not (isinstance(same, bool | int) and same in (0, 1)):
            raise ValueError(f"{path}: the label of pair {i} is {reprlib.repr(same)}, neither true nor false; expected {EXPECTED}.")
    return [image.data if isinstance(image, _Array) else image for image in images], [bool(same) for same in issame]


class _Dtype:
    """Stands for numpy.dtype: its name alone. Little-endian or single bytes only."""

    def __init__(self, name: bytes | str, *_: Any) -> None:
        self.name = name.decode("ascii") if isinstance(name, bytes) else name
        if self.name not in PLAIN_DTYPES:
            raise Refused(f"it holds a numpy array of type {reprlib.repr(self.name)}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|", b"<", b"|"):
            raise Refused("it holds a big-endian numpy array")


class _Array:
    """Stands for numpy.ndarray: the type and the bytes. Its shape does not matter for an encoded image or a list of labels."""

    dtype = ""
    data = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, _, dtype, _, data = state
        self.fill(data, dtype)

    def fill(self, data: Any, dtype: Any) -> _Array:
        if not (isinstance(dtype, _Dtype) and isinstance(data, bytes)):
            raise Refused("it holds a malformed numpy array")
        self.dtype, self.data = dtype.name, data
        return self

    def numbers(self) -> list[int]:
        return np.frombuffer(self.data, dtype="<" + self.dtype).astype(np.int64).tolist()


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _frombuffer(data: Any, dtype: Any, *_: Any) -> _Array:
    return _Array().fill(data, dtype)


def _scalar(dtype: Any, data: Any) -> int:
    (number,) = _Array().fill(data, dtype).numbers()
    return number


def _bytes(data: bytes | str = b"", encoding: bytes | str = "latin1") -> bytes:
    """Stands for bytes, bytearray and codecs.encode, by which Python 3 writes bytes into pickles that Python 2 can read."""
    if isinstance(data, bytes):
        return data
    if isinstance(data, str) and encoding in ("latin1", "latin-1", b"latin1", b"latin-1"):
        return data.encode("latin1")
    raise Refused("it holds malformed bytes")


_TYPES: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _bytes,
    **{(module, name): _bytes for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}
