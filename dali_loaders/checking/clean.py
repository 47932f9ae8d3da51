"""Writes a set without what is wrong with it, and the list of what was left out."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from dali_loaders.account import Account
from dali_loaders.checking.findings import Findings
from dali_loaders.packing import pack
from dali_loaders.sources import Source


def check_name(source: Source, out: str) -> None:
    """ValueError, before hours of checking, where the clean set could not be written to `out`."""
    if not out.endswith(".rec"):
        raise ValueError(f"the clean set would be named {out}; give it a name that ends in .rec.")
    folder = os.path.dirname(out) or "."
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(f"the clean set would be {out}, but files cannot be written to the folder {folder}; make it, or choose another.")
    if os.path.exists(out) and os.path.exists(source.path) and os.path.samefile(out, source.path):
        raise ValueError(f"{out} is the set that is checked; give the clean one another name.")


def write_clean(source: Source, found: Findings, copies: Sequence[np.ndarray], out: str) -> None:
    """Writes out (.rec) with what else `pack` writes, and OUT.left_out.txt: lines name<tab>reason.

    copies: groups of images with the same bytes. Of those under one identity the first stays; of those under several none does, since
    nobody knows whose it is. ValueError if nothing would be left."""
    left_out = {**found.unreadable, **found.damaged}
    for group in copies:
        first, *others = group.tolist()
        if len(np.unique(source.labels[group])) > 1:
            identities = " and ".join(source.identities[label] for label in np.unique(source.labels[group]))
            left_out.update((image, f"the same image under {identities}") for image in group.tolist() if image not in left_out)
        else:
            left_out.update((image, f"the same image as {source.name(first)}") for image in others if image not in left_out)
    kept = np.setdiff1d(np.arange(len(source)), np.fromiter(left_out, np.int64, len(left_out)))
    if not len(kept):
        raise ValueError(f"{source.path}: nothing would be left of its {len(source)} images, so {out} is not written.")
    pack(_Part(source, kept), out)
    with open(f"{os.path.splitext(out)[0]}.left_out.txt", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(f"{source.name(image)}\t{left_out[image]}\n" for image in sorted(left_out))


class _Part:
    """Some images of a source as a source; identities of which none is left have no label."""

    def __init__(self, source: Source, images: np.ndarray) -> None:
        self.path = source.path
        self.account = Account(len(images), len(images))
        self._source, self._images = source, images
        labels, self.labels = np.unique(source.labels[images], return_inverse=True)
        self.identities = [source.identities[label] for label in labels.tolist()]

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> bytes:
        return self._source.read(int(self._images[index]))

    def name(self, index: int) -> str:
        return self._source.name(int(self._images[index]))
