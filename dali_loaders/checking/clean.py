"""Writes a set without what is wrong with it, and the list of what was left out."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from dali_loaders.checking.findings import Findings
from dali_loaders.packing import pack
from dali_loaders.sources import Source, SubsetSource


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
    is_left_out = np.zeros(len(source), bool)
    is_left_out[list(left_out)] = True
    if is_left_out.all():
        raise ValueError(f"{source.path}: nothing would be left of its {len(source)} images, so {out} is not written.")
    packed = pack(SubsetSource(source, {"wrong": is_left_out}), out)
    lines = [f"{source.name(image)}\t{left_out[image]}\n" for image in sorted(left_out)]
    if packed.left_out_list:  # what has become unreadable since it was looked at
        with open(packed.left_out_list, encoding="utf-8", errors="surrogateescape") as file:
            lines += file.readlines()
    with open(f"{os.path.splitext(out)[0]}.left_out.txt", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(lines)
