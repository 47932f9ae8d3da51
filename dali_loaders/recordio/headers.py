"""The headers of many records at once, as columns: of image records in a .rec, without a Python loop where that can be avoided."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dali_loaders.account import ReadError
from dali_loaders.recordio.records import LENGTH_BITS, MAGIC, WHOLE, RandomAccessFile, read_record, unpack_record

IMAGE, EMPTY, SHORT = range(3)  # states: an image follows the header; nothing does; the record is too short for its header
WORDS = 10  # of 4 bytes: magic, length, flag, label, id and id2 of 8 bytes each, first two numbers of a label array
HEADER_BYTES = 24
_NEAR = 16 * 1024  # bytes from record to record up to which reading everything is faster than a call for each
_BLOCK = 4 << 20


class Headers(NamedTuple):
    """Columns [n] of records. Where the state is SHORT only `extents` counts."""

    extents: np.ndarray  # int64: bytes of the file, padding and all parts included
    lengths: np.ndarray  # int64: bytes of the (first) part
    states: np.ndarray  # uint8
    flags: np.ndarray  # uint32: numbers in the label array, or 0
    labels: np.ndarray  # float32: the first label
    seconds: np.ndarray  # float32: the second number of a label array, else 0
    ids: np.ndarray  # uint64
    id2s: np.ndarray  # uint64


def parse(words_nw: np.ndarray) -> tuple[Headers, np.ndarray]:
    """From the first WORDS words, uint32 [n, WORDS], of records; and which of them are records of one part, bool [n]. Nothing holds for
    the others."""
    flags, lengths = words_nw[:, 2], (words_nw[:, 1] & ((1 << LENGTH_BITS) - 1)).astype(np.int64)
    needed = HEADER_BYTES + 4 * flags.astype(np.int64)
    labels = np.where(flags > 0, words_nw[:, 8], words_nw[:, 3]).view(np.float32)
    wide = words_nw[:, 4:8].astype(np.uint64)
    headers = Headers(
        extents=8 + lengths + (-lengths % 4),
        lengths=lengths,
        states=np.where(lengths < needed, SHORT, np.where(lengths > needed, IMAGE, EMPTY)).astype(np.uint8),
        flags=flags,
        labels=labels,
        seconds=np.where(flags > 1, words_nw[:, 9], np.uint32(0)).view(np.float32),
        ids=wide[:, 0] | wide[:, 1] << np.uint64(32),
        id2s=wide[:, 2] | wide[:, 3] << np.uint64(32),
    )
    return headers, (words_nw[:, 0] == MAGIC) & (words_nw[:, 1] >> LENGTH_BITS == WHOLE)


def read_headers(file: RandomAccessFile, offsets: np.ndarray) -> Headers:
    """Of the records at rising `offsets`; about a million a second once the file is in memory. ReadError where no record starts."""
    headers, plain = parse(_gather(file, offsets))
    for at in np.flatnonzero(~plain | (offsets % 4 != 0)).tolist():
        _fill(headers, at, file, int(offsets[at]))
    return headers


def _fill(headers: Headers, at: int, file: RandomAccessFile, offset: int) -> None:
    """One record, read as a whole: of several parts, or none at all."""
    record, end = read_record(file, offset)
    headers.extents[at] = end - offset
    try:
        header, image = unpack_record(record)
    except ReadError:
        headers.states[at] = SHORT
        return
    headers.states[at] = IMAGE if image else EMPTY
    label = np.atleast_1d(np.asarray(header.label, np.float32))
    headers.flags[at], headers.labels[at], headers.ids[at], headers.id2s[at] = header.flag, label[0], header.id, header.id2
    headers.seconds[at] = label[1] if len(label) > 1 else 0


def _gather(file: RandomAccessFile, offsets: np.ndarray) -> np.ndarray:
    """The first words, uint32 [n, WORDS], of what stands at rising `offsets`; zeros beyond the end of the file."""
    words_nw = np.zeros((len(offsets), WORDS), np.uint32)
    if offsets[-1] - offsets[0] > _NEAR * len(offsets):
        rows = words_nw.view(np.uint8)
        for at, offset in enumerate(offsets.tolist()):
            file.read_into(rows[at], offset)
        return words_nw
    block = np.empty(_BLOCK // 4 + WORDS, np.uint32)
    windows, start = np.lib.stride_tricks.sliding_window_view(block, WORDS), 0
    while start < len(offsets):
        first = int(offsets[start]) & ~3
        stop = int(np.searchsorted(offsets, first + _BLOCK, side="right"))
        size = int(offsets[stop - 1]) - first + 4 * WORDS
        read = file.read_into(block.view(np.uint8)[:size], first)
        block.view(np.uint8)[read:size] = 0
        words_nw[start:stop] = windows[(offsets[start:stop] - first) // 4]
        start = stop
    return words_nw
