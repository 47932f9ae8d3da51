"""Writes a set without what is wrong with it, and the list of what was left out."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from dali_loaders import packing
from dali_loaders.checking.findings import Findings
from dali_loaders.names import printable
from dali_loaders.packing import PackReport, pack
from dali_loaders.sources import Source, SubsetSource


def check_name(source: Source, out: str) -> None:
    """ValueError, before hours of checking, where the clean set could not be written to `out`."""
    if not out.endswith(".rec"):
        raise ValueError(f"the clean set would be named {out}; give it a name that ends in .rec.")
    folder = os.path.dirname(out) or "."
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(f"the clean set would be {out}, but files cannot be written to the folder {folder}; make it, or choose another.")
    packing.check_name(source, out)


def write_clean(source: Source, found: Findings, copies: Sequence[np.ndarray], out: str, timeout: float) -> PackReport:
    """Writes out (.rec) with what else `pack` writes, and OUT.left_out.txt: lines name<tab>reason. The report is of all images of `source`.

    copies: groups of images with the same bytes. Of those under one identity the first stays; of those under several none does, since
    nobody knows whose it is. timeout: seconds that the read of an image may take. ValueError if nothing would be left."""
    reasons = {**found.unreadable, **found.damaged}
    remarks: dict[int, str] = {}  # what a reason does not say
    for group in copies:
        labels = np.unique(source.labels[group])
        if len(labels) > 1:
            reason, remark = "the same image under several identities", " and ".join(source.identities[label] for label in labels)
        else:
            reason, remark = "the same image as another", source.name(int(group[0]))
        for image in (group if len(labels) > 1 else group[1:]).tolist():
            if image not in reasons:
                reasons[image], remarks[image] = reason, f": {printable(remark)}"
    is_left_out = np.zeros(len(source), bool)
    is_left_out[list(reasons)] = True
    if is_left_out.all():
        raise ValueError(f"{source.path}: nothing would be left of its {len(source)} images, so {out} is not written.")
    part = SubsetSource(source, {"wrong": is_left_out})
    packed = pack(part, out, timeout=timeout)
    lines = [f"{printable(source.name(image))}\t{printable(reasons[image])}{remarks.get(image, '')}\n" for image in sorted(reasons)]
    if packed.left_out_list:  # what has become unreadable since it was looked at
        with open(packed.left_out_list, encoding="utf-8") as file:
            lines += file.readlines()
    packed.left_out_list = f"{os.path.splitext(out)[0]}.left_out.txt"
    with open(packed.left_out_list, "w", encoding="utf-8") as file:
        file.writelines(lines)
    for image in sorted(reasons):
        packed.account.pass_over(reasons[image], source.name(image))
    packed.lost = sorted({*packed.lost, *source.identities} - set(part.identities))
    return packed
