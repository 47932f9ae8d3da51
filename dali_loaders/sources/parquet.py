"""Parquet as Hugging Face datasets export it: a column of encoded images and one of labels, in one file or several."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from dali_loaders.account import Account, ReadError
from dali_loaders.extras import extra
from dali_loaders.regular import open_regular
from dali_loaders.sources.parquet_columns import Columns, find_columns, read_labels
from dali_loaders.sources.parquet_files import parquet_files, split_columns
from dali_loaders.sources.parquet_footer import DamagedFooterError, Group, read_groups

with extra("parquet"):
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

_KEPT_BYTES = 128 << 20  # of decoded row groups; at least one is kept
_LARGE_GROUP = 64 << 20

log = logging.getLogger(__name__)


class ParquetSource:
    """The rows of a .parquet file, of a pattern (train-*.parquet), or of a folder of such files, in the order of their names.

    Opening reads the labels and no image, but for row groups that hold null images or don't say. Identities are the names of the classes
    (ClassLabel), the strings, or the numbers of the label column, sorted; files may name different classes. Reading an image decodes its
    row group, of which the last 128 MiB are kept. `path` may end in #IMAGE:LABEL, the names of the columns."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.account = Account()
        where, wanted = split_columns(path)
        files = [_open(file, wanted) for file in parquet_files(where, self.account)]
        _check_alike(files)
        self._groups = _RowGroups(files)
        self._file_starts = np.cumsum([0] + [file.metadata.num_rows for file in files])
        parts = [self._read_labels(file, int(start)) for file, start in zip(files, self._file_starts, strict=False)]
        found = sorted({label for _, _, labels in parts for label in labels})
        label_of = {label: place for place, label in enumerate(found)}
        broken = next((label for label in found if isinstance(label, str) and set(label) & {"\n", "\r"}), None)
        if broken is not None:
            raise ValueError(f"{path}: the identity {broken!r} has a line break in its name, which lists of names cannot hold; rename it.")
        if not found:
            raise ValueError(f"{path} holds no labelled image: {'; '.join(map(str.strip, self.account.lines()))}.")
        self._rows = np.concatenate([rows for rows, _, _ in parts])  # int64 [N], counted over all files
        self.labels = np.concatenate([np.array([label_of[label] for label in labels], np.int64)[places] for _, places, labels in parts])
        self.identities = [str(label) for label in found]

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> bytes:
        return self._groups.read(int(self._rows[index]))

    def name(self, index: int) -> str:
        return self._name(int(self._rows[index]))

    def _name(self, row: int) -> str:
        file = int(np.searchsorted(self._file_starts, row, side="right")) - 1
        return f"{os.path.basename(self._groups.files[file].path)}:row {row - self._file_starts[file]}"

    def _read_labels(self, file: _File, start: int) -> tuple[np.ndarray, np.ndarray, list[Any]]:
        """Rows that are used, int64 [n], counted from `start`; places int64 [n] in the list of distinct labels; that list."""
        with _sentence(file.path):
            column = file.open().read(columns=[file.columns.label], use_threads=False).column(0)
            if len(column) != file.metadata.num_rows:
                raise ValueError(f"{file.path} is damaged: {len(column)} labels of {file.metadata.num_rows} rows; copy it again.")
            places, labels, without = read_labels(file.path, column, file.columns)
            without.update(_null_images(file))
        used = np.ones(len(places), bool)
        for reason, mask in without.items():
            passed = np.flatnonzero(mask & used)
            used[passed] = False
            if passed.size:
                self.account.pass_over(reason, self._name(start + int(passed[0])), passed.size)
        rows = np.flatnonzero(used)
        self.account.use(rows.size)
        present, places = np.unique(places[rows], return_inverse=True)
        return start + rows, places, [labels[place] for place in present]


class _File(NamedTuple):
    path: str
    columns: Columns
    metadata: pq.FileMetaData
    groups: list[Group]
    stamp: tuple[int, int]  # size and time of change: a file that is replaced in the middle of a run is noticed

    def open(self) -> pq.ParquetFile:
        if _stamp(self.path) != self.stamp:
            raise ReadError("the file has changed since it was opened")
        with _opened(self.path) as path:
            return pq.ParquetFile(path, metadata=self.metadata, page_checksum_verification=True)

    def images(self, group: int, column: str) -> pa.ChunkedArray:
        """Column `bytes` or `path` of one row group, as a flat column."""
        with self.open() as file:
            values = file.read_row_group(group, columns=[column], use_threads=False).column(0)
        return pc.struct_field(values, column.rpartition(".")[2]) if pa.types.is_struct(values.type) else values


class _RowGroups:
    """Images by row, counted over all files. The column of a row group is decoded as a whole, once for all threads that wait for it."""

    def __init__(self, files: list[_File]) -> None:
        self.files = files
        groups = [(number, group) for number, file in enumerate(files) for group in range(len(file.groups))]
        self._places = np.array(groups, np.int64).reshape(-1, 2)
        self._starts = np.cumsum([0] + [files[number].groups[group].rows for number, group in groups])
        largest = max((files[number].groups[group].chunks[files[number].columns.bytes].size for number, group in groups), default=0)
        if largest > _LARGE_GROUP:
            log.warning(
                "%s has row groups of up to %d MB, and reading an image means decoding one: pack the set before training "
                "(protoshard data pack), or export it with smaller ones",
                files[0].path,
                largest >> 20,
            )
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Future] = OrderedDict()

    def __reduce__(self) -> tuple:
        return _RowGroups, (self.files,)

    def read(self, row: int) -> bytes:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        try:
            column, row = self._column(group), row - int(self._starts[group])
            image = column[row].as_py() if row < len(column) else None
        except (pa.ArrowException, DamagedFooterError, OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno:
                raise ReadError.of(error) from error
            raise ReadError("damaged row group") from error
        if not image:
            raise ReadError("damaged row group" if image is None else "empty")
        return image

    def _column(self, group: int) -> pa.ChunkedArray:
        with self._lock:
            waiting = self._kept.get(group)
            if waiting is None:
                mine = self._kept[group] = Future()
            else:
                self._kept.move_to_end(group)
        if waiting is not None:
            return waiting.result()
        try:
            number, place = self._places[group]
            mine.set_result(self.files[number].images(int(place), self.files[number].columns.bytes))
        except BaseException as error:
            with self._lock:
                self._kept.pop(group, None)  # so that the next one tries again
            mine.set_exception(error)
        with self._lock:
            self._forget_oldest()
        return mine.result()

    def _forget_oldest(self) -> None:
        sizes = {group: column.result().nbytes for group, column in self._kept.items() if column.done()}
        while len(sizes) > 1 and sum(sizes.values()) > _KEPT_BYTES:
            oldest = next(iter(sizes))
            del sizes[oldest], self._kept[oldest]


def _open(path: str, wanted: list[str]) -> _File:
    with _sentence(path), _opened(path) as opened, pq.ParquetFile(opened) as file:
        stamp, metadata = _stamp(path), file.metadata
        columns = find_columns(path, file.schema_arrow, wanted)
        groups, needed = read_groups(path), (columns.bytes, columns.label)
        if lacking := [name for group in groups for name in needed if name not in group.chunks]:
            raise ValueError(f"{path} is damaged: a row group has no column {lacking[0]!r}; copy it again.")
        counts = [{group.rows, *(group.chunks[name].values for name in needed)} for group in groups]
        if any(len(count) > 1 or min(count) < 0 for count in counts) or sum(map(min, counts)) != metadata.num_rows:
            raise ValueError(f"{path} is damaged: its columns, row groups and footer differ in their number of rows; copy it again.")
        return _File(path, columns, metadata, groups, stamp)


def _check_alike(files: list[_File]) -> None:
    for file in files[1:]:
        if file.columns._replace(names=None) != files[0].columns._replace(names=None):
            raise ValueError(f"{file.path} has {_said(file)}, but {files[0].path} has {_said(files[0])}; give sets that differ one by one.")
        if (file.columns.names is None) != (files[0].columns.names is None):
            named, other = (file, files[0]) if file.columns.names is not None else (files[0], file)
            raise ValueError(f"{named.path} names the classes of its labels, but {other.path} does not; export both alike.")


def _said(file: _File) -> str:
    return f"images in {file.columns.bytes!r} and labels in {file.columns.label!r} ({file.columns.label_type})"


def _null_images(file: _File) -> dict[str, np.ndarray]:
    """Rows without bytes of an image, by the reason why, bool [rows]. Row groups whose statistics count no null are not read."""
    null, only_path = [], []
    for group, (rows, chunks) in enumerate(file.groups):
        if chunks[file.columns.bytes].nulls == 0:
            null.append(np.zeros(rows, bool))
            only_path.append(null[-1])
            continue
        null.append(np.asarray(file.images(group, file.columns.bytes).is_null()))
        paths = file.images(group, file.columns.path).is_valid() if file.columns.path else pa.array(np.zeros(rows, bool))
        only_path.append(null[-1] & np.asarray(paths))
    if not null:
        return {}
    return {"path of an image without its bytes": np.concatenate(only_path), "null image": np.concatenate(null)}


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@contextmanager
def _opened(path: str) -> Iterator[str]:
    """Another path of the very file, where no pipe can take its place: pyarrow would wait for its writer."""
    descriptor = open_regular(path)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


@contextmanager
def _sentence(path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, DamagedFooterError, OSError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]
        raise ValueError(f"{path} is cut off, damaged or no Parquet file ({words}); copy it again from its source.") from error
