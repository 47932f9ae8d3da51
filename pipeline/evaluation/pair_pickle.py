"""Unpickling of InsightFace pair sets, files that strangers hand around: a closed list of types, and no numpy code on their bytes.

Python 2 and 3 wrote them, with images as bytes or numpy uint8 arrays, so that several spellings of the same few types occur."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

PLAIN_DTYPES = ("b1", "i1", "u1", "i4", "i8")
EXPECTED = "expected a pickle of (list of encoded images, list of booleans) as InsightFace makes them"


def load_pairs(path: str) -> tuple[list[bytes], list[bool]]:
    """Encoded images and pair labels of a `.bin` file. Raises ValueError when it is missing or holds anything else."""
    try:
        with open(path, "rb") as file:
            content = _PairUnpickler(file, encoding="bytes").load()
    except OSError as error:
        raise ValueError(f"{path}: the pair set cannot be opened ({error.strerror}); {EXPECTED}.") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: this is not a pair set that can be read ({reason}); {EXPECTED}.") from error
    if not (isinstance(content, tuple | list) and len(content) == 2 and all(isinstance(part, list | tuple | _Array) for part in content)):
        raise ValueError(f"{path}: the pickle holds something other than two lists; {EXPECTED}.")
    images, issame = content
    if isinstance(images, _Array):
        raise ValueError(f"{path}: the images are one array; {EXPECTED}.")
    if isinstance(issame, _Array):
        issame = issame.numbers()
    for i, image in enumerate(images):
        if not (isinstance(image, bytes | bytearray) or (isinstance(image, _Array) and image.dtype in ("u1", "i1"))):
            raise ValueError(f"{path}: image {i} is a {type(image).__name__}, neither bytes nor a uint8 array; {EXPECTED}.")
    for i, same in enumerate(issame):
        if not (isinstance(same, bool | int) and same in (0, 1)):
            raise ValueError(f"{path}: the label of pair {i} is {same!r:.40}, neither true nor false; {EXPECTED}.")
    return [image.data if isinstance(image, _Array) else bytes(image) for image in images], [bool(same) for same in issame]


class _Dtype:
    """Stands for numpy.dtype: its name alone. Little-endian or single bytes only."""

    def __init__(self, name: bytes | str, *_: Any) -> None:
        self.name = name.decode("ascii") if isinstance(name, bytes) else name
        if self.name not in PLAIN_DTYPES:
            raise pickle.UnpicklingError(f"it holds a numpy array of type {self.name!r:.40}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|", b"<", b"|"):
            raise pickle.UnpicklingError("it holds a big-endian numpy array")


class _Array:
    """Stands for numpy.ndarray: the type and the bytes. Its shape does not matter for an encoded image or a list of labels."""

    dtype = ""
    data = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, _, dtype, _, data = state
        self.fill(data, dtype)

    def fill(self, data: Any, dtype: Any) -> _Array:
        if not (isinstance(dtype, _Dtype) and isinstance(data, bytes | bytearray)):
            raise pickle.UnpicklingError("it holds a malformed numpy array")
        self.dtype, self.data = dtype.name, bytes(data)
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
    raise pickle.UnpicklingError("it holds malformed bytes")


_TYPES: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _bytes,
    **{(module, name): _bytes for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
}


class _PairUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _TYPES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no pair set needs")
        return _TYPES[module, name]
