"""Embeddings with the names of their images in a file: OUT.parquet, or OUT.npy with OUT.csv and OUT.json beside it."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dali_loaders.extras import extra
from dali_loaders.names import printable
from dali_loaders.regular import open_regular

EXTENSIONS = (".parquet", ".npy")
COLUMN = "embedding"
_ABOUT = b"protoshard"  # key of the JSON in a Parquet file's metadata
_ROWS_AT_ONCE = 1 << 16


class Rows(NamedTuple):
    """Some rows of a file."""

    embedding_nD: np.ndarray  # float32
    names: Sequence[str]
    identities: Sequence[str]


@dataclass(frozen=True)
class Embeddings:
    """embedding: float32 [n, D], finite; of a .npy it stays on the disk. model: SHA-256 of the weights that made them;
    flip: whether with the mirror image; None if unknown."""

    path: str
    embedding_nD: np.ndarray
    names: Sequence[str]
    identities: Sequence[str]
    model: str | None
    flip: bool | None = None


def beside(out: str) -> list[str]:
    """All files that `write` makes, the one that counts last."""
    return [out] if out.endswith(".parquet") else [out[:-4] + ".csv", out[:-4] + ".json", out]


def check(out: str) -> None:
    """ValueError where a file of this name could not be written in the end, whatever the embeddings."""
    if not out.endswith(EXTENSIONS):
        raise ValueError(f"{out} must end in .parquet or .npy")
    if out.endswith(".parquet"):
        with extra("parquet"):
            import pyarrow.parquet  # noqa: F401


def write(files: Sequence[str], parts: Iterable[Rows], count: int, width: int, about: dict[str, Any]) -> None:
    """Writes what `parts` give, `count` rows in all, to `files`, as `beside` names them. Memory is that of a part."""
    if len(files) == 1:
        return _write_parquet(files[0], parts, width, about)
    names, description, rows = files
    with open(description, "x", encoding="utf-8") as file:
        json.dump(about, file, indent=2)
    header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
    with (
        open(names, "x", encoding="utf-8", newline="") as file,
        open(rows, "xb") as array,
    ):  # a mapped file would end by SIGBUS on a full disk
        np.lib.format.write_array_header_1_0(array, header)
        table, at = csv.writer(file), 0
        table.writerow(("identity", "name"))
        for part in parts:
            array.write(np.ascontiguousarray(part.embedding_nD, "<f4").data)
            table.writerows((printable(identity), printable(name)) for identity, name in zip(part.identities, part.names, strict=True))
            at += len(part.names)
    assert at == count


def read(path: str) -> Embeddings:
    """ValueError for a file that holds no matrix of finite numbers, or whose rows and names differ in number."""
    try:
        found = _read_parquet(path) if path.endswith(".parquet") else _read_npy(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    array = found.embedding_nD
    if not len(array):
        raise ValueError(f"{path} holds no embeddings")
    for start in range(0, len(array), _ROWS_AT_ONCE):
        bad = np.flatnonzero(~np.isfinite(array[start : start + _ROWS_AT_ONCE]).all(axis=1))
        if len(bad):
            at = start + int(bad[0])
            raise ValueError(f"{path}: the embedding of {printable(found.names[at])}, row {at}, is not finite: make it again")
    return found


def is_embeddings(path: str) -> bool:
    """Whether a file holds embeddings, and not images: a .npy, or a .parquet with a column of that name."""
    if path.endswith(".npy"):
        return True
    return path.endswith(".parquet") and os.path.isfile(path) and COLUMN in _schema(path).names


def _schema(path: str) -> Any:
    with extra("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {error}") from error


def _write_parquet(path: str, parts: Iterable[Rows], width: int, about: dict[str, Any]) -> None:
    with extra("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    columns = [("name", pa.string()), ("identity", pa.string()), (COLUMN, pa.list_(pa.float32(), width))]
    schema = pa.schema(columns, metadata={_ABOUT: json.dumps(about)})
    with pq.ParquetWriter(path, schema) as writer:
        for part in parts:
            values = pa.FixedSizeListArray.from_arrays(pa.array(part.embedding_nD.reshape(-1)), width)
            texts = ([printable(name) for name in names] for names in (part.names, part.identities))
            writer.write_table(pa.table([*texts, values], schema=schema))


def _read_parquet(path: str) -> Embeddings:
    schema = _schema(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    if COLUMN not in schema.names:
        raise ValueError(f"{path} has no column {COLUMN!r}, so it holds no embeddings: make them with protoshard embed")
    kind = schema.field(COLUMN).type
    if not (pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type)):
        raise ValueError(f"{path}: column {COLUMN!r} is of type {kind}, but must be lists of floats, all of one length")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if table[COLUMN].null_count:
        raise ValueError(f"{path}: {table[COLUMN].null_count} rows have no embedding")
    flat = table[COLUMN].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if len(flat) != table.num_rows * kind.list_size:
        raise ValueError(f"{path}: some embeddings have missing numbers")
    array = np.ascontiguousarray(flat, np.float32).reshape(table.num_rows, kind.list_size)
    texts = {
        name: [str(value or "") for value in table[name].to_pylist()] if name in schema.names else [""] * len(array)
        for name in ("name", "identity")
    }
    names = texts["name"] if "name" in schema.names else list(map(str, range(len(array))))
    return Embeddings(path, array, names, texts["identity"], *_maker((schema.metadata or {}).get(_ABOUT)))


def _read_npy(path: str) -> Embeddings:
    try:
        with open(path, "rb", opener=open_regular):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is not a whole .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f" or not array.shape[1]:
        shape = f"{array.dtype} of shape {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"{path} holds {shape}, but embeddings are a matrix of floats, a row for each image")
    if array.dtype != np.float32:
        array = array.astype(np.float32)
    listed, described = beside(path)[:2]
    rows = _rows_of(listed) if os.path.isfile(listed) else [("", str(number)) for number in range(len(array))]
    if len(rows) != len(array):
        raise ValueError(f"{path} has {len(array)} rows, but {listed} beside it names {len(rows)} images: they are not of one run")
    content = None
    if os.path.isfile(described):
        with open(described, "rb", opener=open_regular) as file:
            content = file.read(1 << 20)
    return Embeddings(path, array, [name for _, name in rows], [identity for identity, _ in rows], *_maker(content))


def _rows_of(path: str) -> list[tuple[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="", opener=open_regular) as file:
            table = csv.reader(file)
            if next(table, None) != ["identity", "name"]:
                raise ValueError("its first line is not identity,name")
            return [(identity, name) for identity, name in table]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} does not list the names of embeddings: {error}") from error


def _maker(content: bytes | None) -> tuple[str | None, bool | None]:
    """Model and flip, of what `write` says about the rows."""
    try:
        about = json.loads(content or b"{}")
        model, flip = about.get("model"), about.get("flip")
    except (ValueError, AttributeError, RecursionError):
        return None, None
    return model if isinstance(model, str) else None, flip if isinstance(flip, bool) else None
