"""Where images come from: a folder, a tar or a RecordIO file behind one small interface (number, labels, names, encoded bytes)."""

import os
import tarfile
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from dali_loaders.identities import identities_path, read_identities
from dali_loaders.mxnet_records import MXNetReader
from dali_loaders.records import IndexedRecordReader, RandomAccessFile, unpack_record

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
LAYOUT = "IDENTITY/IMAGE.jpg (one folder per identity)"


class Source(Protocol):
    """A labelled set of encoded images. Picklable; `read` may be called from several threads."""

    path: str
    labels: np.ndarray  # int64 [N], in 0..C-1
    identities: list[str]  # C names, indexed by label

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded bytes of image `index`."""

    def name(self, index: int) -> str:
        """How messages call image `index`."""


def open_source(path: str, reader: str = "native") -> Source:
    """Opens a folder or .tar of IDENTITY/IMAGE files, or a .rec (its .idx is rebuilt when missing).

    reader: "native", or "mxnet" to read a .rec through the mxnet package. ValueError for whatever holds no labelled images.
    """
    if reader not in ("native", "mxnet"):
        raise ValueError(f"unknown reader {reader!r}: expected 'native' or 'mxnet'.")
    if not path:
        raise ValueError("no data given: name a folder, a .tar or a .rec file.")
    if not os.path.exists(path):
        raise ValueError(f"{path} does not exist; expected a folder, a .tar or a .rec file.")
    if path.lower().endswith(".rec"):
        if os.path.isdir(path):
            raise ValueError(f"{path} is a folder; a name that ends in .rec is expected to be a RecordIO file.")
        return RecordSource(path, reader)
    if reader == "mxnet":
        raise ValueError(f"reader='mxnet' reads .rec files only, but the data is {path}; use reader='native'.")
    return FolderSource(path) if os.path.isdir(path) else TarSource(path)


class FolderSource:
    """PATH/IDENTITY/IMAGE; identities and images in sorted order."""

    def __init__(self, path: str) -> None:
        self.path = path
        root = path.rstrip("/") + "/"
        files = (f"{folder}/{name}"[len(root) :] for folder, names in _walk(root.rstrip("/") or "/") for name in names)
        self._names = sorted(name for name in files if _is_image(name))
        self.labels, self.identities = _labels(path, self._names)

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        try:
            with open(self.name(index), "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise ValueError(f"cannot read {self.name(index)}: {error.strerror}; check the file and its permissions.") from error

    def name(self, index: int) -> str:
        return os.path.join(self.path, self._names[index])


class TarSource:
    """An uncompressed tar of IDENTITY/IMAGE files. Its headers are read once; its images are read at their offsets, without unpacking."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = RandomAccessFile(path)
        members = sorted(_tar_members(path))
        self._names = [name for name, _, _ in members]
        self.labels, self.identities = _labels(path, self._names)
        self._offsets = np.array([offset for _, offset, _ in members], np.int64)
        self._sizes = np.array([size for _, _, size in members], np.int64)
        if int((self._offsets + self._sizes).max()) > self._file.size:
            raise ValueError(f"{path} is cut off; copy it again from its source.")

    def __len__(self) -> int:
        return len(self._names)

    def read(self, index: int) -> bytes:
        return self._file.read(int(self._sizes[index]), int(self._offsets[index]))

    def name(self, index: int) -> str:
        return f"{os.path.basename(self.path)}:{self._names[index]}"


class RecordSource:
    """The image records of a .rec file in key order; records without an image (InsightFace's headers) are left out.

    Labels that are not 0..C-1 are renumbered in rising order; identity names are the original labels, or those of the sidecar that
    `pack` writes (it also spares reading a header per image)."""

    def __init__(self, path: str, reader: str = "native") -> None:
        self.path = path
        self._records = IndexedRecordReader(path)
        self._mxnet = MXNetReader(path) if reader == "mxnet" else None
        order = np.argsort(self._records.keys, kind="stable")
        packed = read_identities(path)
        if packed is not None:
            counts, self.identities = packed
            if len(self._records) != 1 + counts.sum() + len(counts):
                raise ValueError(f"{identities_path(path)} does not match {path}; delete it or pack the images again.")
            self.labels = np.repeat(np.arange(len(counts)), counts)
            images = order[1 : 1 + len(self.labels)]
        else:
            labels, has_image = self._records.scan_headers(self._records.offsets[order])
            if not has_image.any():
                raise ValueError(f"{path} holds {len(self._records)} records but no image; pack the images again.")
            images = order[has_image]
            values, self.labels = np.unique(labels[has_image], return_inverse=True)
            self.identities = [f"{value:.9g}" for value in values.tolist()]
        self._keys = self._records.keys[images]
        self._offsets = self._records.offsets[images]

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, index: int) -> bytes:
        if self._mxnet is not None:
            return unpack_record(self._mxnet.read(int(self._keys[index])))[1]
        return unpack_record(self._records.read_at(int(self._offsets[index])))[1]

    def name(self, index: int) -> str:
        return f"{os.path.basename(self.path)}:record {self._keys[index]}"


def single_image_identities(source: Source) -> list[str]:
    """Names of the identities with one image: they can be trained on, but form no genuine pair."""
    counts = np.bincount(source.labels, minlength=len(source.identities))
    return [source.identities[label] for label in np.flatnonzero(counts == 1)]


def check_images_per_identity(source: Source, least: int, why: str, remedy: str) -> np.ndarray:
    """int64 [identities]: images of each. ValueError if one has fewer than `least`; `why` says what asks for them, `remedy` what to do
    instead of removing them."""
    counts = np.bincount(source.labels, minlength=len(source.identities))
    few = np.flatnonzero(counts < least)
    if len(few):
        raise ValueError(
            f"{source.path}: identity {source.identities[few[0]]!r} has {counts[few[0]]} image(s), but {why} ({len(few)} such "
            f"identities): remove them, or {remedy}"
        )
    return counts


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) of all folders below `root`, through symbolic links too, but never into a folder that leads there."""
    above: dict[str, frozenset[str]] = {root: frozenset()}
    for folder, folders, names in os.walk(root, followlinks=True):
        inside = above.pop(folder) | {os.path.realpath(folder)}
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(folder, name)) not in inside]
        above.update((os.path.join(folder, name), inside) for name in folders)
        yield folder, names


def _is_image(name: str) -> bool:
    """Whether a path has an image's extension; hidden files, and files in hidden folders, are left out."""
    return name.lower().endswith(IMAGE_EXTENSIONS) and not any(part.startswith(".") for part in name.split("/"))


def _labels(path: str, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels int64 [N] and identity names of sorted paths IDENTITY/IMAGE."""
    if not names:
        raise ValueError(f"{path} holds no images ({', '.join(IMAGE_EXTENSIONS)}); expected {LAYOUT}.")
    folders = [os.path.dirname(name) for name in names]
    if "" in folders:
        raise ValueError(f"{path} holds {names[folders.index('')]} outside any identity folder; expected {LAYOUT}.")
    identities = sorted(set(folders))
    label_of = {identity: label for label, identity in enumerate(identities)}
    return np.fromiter((label_of[folder] for folder in folders), np.int64, len(folders)), identities


def _tar_members(path: str) -> Iterable[tuple[str, int, int]]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = os.path.normpath(member.name)
                if member.isreg() and _is_image(name):
                    yield name, member.offset_data, member.size
        # tarfile takes a cut at a header for the end, but a whole archive ends with blocks of zeros.
        with open(path, "rb") as file:
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"{path} is cut off; copy it again from its source.")
    except (tarfile.TarError, OSError, EOFError) as error:
        with open(path, "rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise ValueError(
                    f"{path} is compressed with gzip; unpack it with gunzip, so that images can be read at their places."
                ) from error
        raise ValueError(f"{path} is not a readable uncompressed .tar ({error}); expected a folder, a .tar or a .rec file.") from error
