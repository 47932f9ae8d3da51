"""What a source is: a labelled set of encoded images behind one small interface, and what holds for all of them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from dali_loaders.account import Account, Unreadable


class Source(Protocol):
    """A labelled set of encoded images. Picklable; `read` may be called from several threads.

    Some sources have more, which others look for: `read_many(indices)`, as the function below; `parts`, a sequence of Part, where they
    are made of several sets; `remarks`, lines about how they were made; `order_checksum()`, in place of that of all names (fingerprint.py);
    `lists`, a checksum of what else the files of a set say of its images, such as pairs to compare.
    """

    path: str
    labels: np.ndarray  # int64 [N], in 0..C-1
    identities: list[str]  # C names, indexed by label
    account: Account  # of everything that was seen when the source was opened

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded bytes of image `index`. ReadError, with the reason, where they cannot be had."""

    def name(self, index: int) -> str:
        """How messages call image `index`."""


class Part(NamedTuple):
    """One of the sets that a source is made of: the images [start, stop)."""

    name: str
    start: int
    stop: int
    weight: float  # its share of the stream, relative to those of the others; 0 for all: by the number of images


def read_many(source: Source, indices: np.ndarray) -> list[bytes | np.ndarray | Unreadable]:
    """The encoded bytes of the images `indices`, int64 [b], at once where the source can; some sources give reasons in place of images,
    others raise as `read` does."""
    if hasattr(source, "read_many"):
        return source.read_many(indices)
    return [source.read(index) for index in indices.tolist()]


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
