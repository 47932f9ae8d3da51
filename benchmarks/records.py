"""How fast large .rec files open and are read: `python -m benchmarks.records FOLDER --records 10000000`.

Draws a set whose images are holes of the file, opens it in new processes, first without its cache and then with it; then reads at
random."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import BinaryIO, TextIO

import numpy as np

from dali_loaders.identities import identities_path, write_identities
from dali_loaders.recordio.records import MAGIC, RandomAccessFile, index_path
from dali_loaders.sources import RecordSource

_CHUNK = 100_000
_OPEN = """
import json, re, sys, time
from dali_loaders.sources import RecordSource
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024  # getrusage would count the parent's
before, start = peak(), time.perf_counter()
source = RecordSource(sys.argv[1])
print(json.dumps({"seconds": time.perf_counter() - start, "MiB": peak() - before, "images": len(source)}))
"""


def draw(path: str, records: int, identities: int, image_bytes: int, named: bool = False) -> None:
    """A .rec of `records` images of `image_bytes` each, which are holes, in InsightFace's layout; with an identities file if `named`."""
    stride, small = 8 + 24 + image_bytes + -image_bytes % 4, 8 + 24 + 8
    counts = np.bincount(np.arange(records) % identities, minlength=identities)
    ends = 1 + np.cumsum(counts)
    with open(path, "wb") as file, open(index_path(path), "w", encoding="ascii") as index:
        _write(file, index, np.array([0]), small, np.array([[records + 1, records + 1 + identities]]), 0)
        for start in range(0, records, _CHUNK):
            keys = np.arange(start + 1, min(start + _CHUNK, records) + 1)
            _write(file, index, keys, stride, np.searchsorted(ends, keys, side="right")[:, None], image_bytes)
        for start in range(0, identities, _CHUNK):
            rows = slice(start, min(start + _CHUNK, identities))
            labels = np.stack([ends[rows] - counts[rows], ends[rows]], axis=1)
            _write(file, index, records + 1 + np.arange(rows.start, rows.stop), small, labels, 0)
        file.truncate(file.tell())
    if named:
        write_identities(identities_path(path), counts, [f"person {number}" for number in range(identities)])


def _write(file: BinaryIO, index: TextIO, keys: np.ndarray, stride: int, labels: np.ndarray, image_bytes: int) -> None:
    """Records of one length; an array of labels where there are two."""
    pair, start = labels.shape[1] == 2, file.tell()
    head = np.zeros((len(keys), 10), np.uint32)
    head[:, 0], head[:, 1], head[:, 4] = MAGIC, (24 + image_bytes + 8 * pair), keys
    (head[:, 8:] if pair else head[:, 3:4])[:] = labels.astype(np.float32).view(np.uint32)
    if pair:
        head[:, 2] = 2
    size = 40 if pair else 32
    if stride < 2 * 4096:
        rows = np.zeros((len(keys), stride), np.uint8)
        rows[:, :size] = head.view(np.uint8)[:, :size]
        file.write(rows.data)
    else:
        file.flush()
        for row, at in zip(head.view(np.uint8)[:, :size], range(start, start + len(keys) * stride, stride), strict=True):
            os.pwrite(file.fileno(), row.data, at)
        file.truncate(start + len(keys) * stride)
        file.seek(start + len(keys) * stride)
    offsets = start + stride * np.arange(len(keys))
    index.writelines(f"{key}\t{offset}\n" for key, offset in zip(keys.tolist(), offsets.tolist(), strict=True))


def open_in_new_process(path: str) -> dict[str, float]:
    """Seconds, and MiB above the import at the peak."""
    done = subprocess.run([sys.executable, "-c", _OPEN, path], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def images_per_second(path: str, batch: int = 256, seconds: float = 2.0) -> float:
    """Of `read_many` in one thread, at random places of the first images that fit into memory."""
    source = RecordSource(path)
    within = min(len(source), (1 << 30) // (4 * int(source._words[0])))
    for start in range(0, within, batch):
        source.read_many(np.arange(start, min(start + batch, within)))
    random, best = np.random.default_rng(0), 0.0
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        batches = [random.integers(0, within, batch) for _ in range(50)]
        start_time = time.perf_counter()
        for indices in batches:
            source.read_many(indices)
        best = max(best, 50 * batch / (time.perf_counter() - start_time))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--identities", type=int, default=200_000)
    parser.add_argument("--bytes", type=int, default=32, help="of an image")
    parser.add_argument("--names", action="store_true", help="with an identities file, as `protoshard data pack` writes it")
    options = parser.parse_args()
    path = os.path.join(options.folder, "train.rec")
    draw(path, options.records, options.identities, options.bytes, options.names)
    print(f"{options.records} records, {RandomAccessFile(path).size / 2**30:.2f} GiB")
    for opening in ("first", "second", "third"):
        print(opening, "opening", {name: round(value, 2) for name, value in open_in_new_process(path).items()})
    print(f"read_many: {images_per_second(path):.0f} images/s in one thread")


if __name__ == "__main__":
    main()
