"""What a look at every image says about the set: counts, sizes, what is wrong, and what is only worth a thought."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dali_loaders.account import Account
from dali_loaders.checking.clean import check_name, write_clean
from dali_loaders.checking.duplicates import copies
from dali_loaders.checking.findings import Findings, look
from dali_loaders.config import TIMEOUT, DataConfig
from dali_loaders.identities import identities_path
from dali_loaders.names import printable
from dali_loaders.packing import PackReport
from dali_loaders.sources import Source, open_source, single_image_identities

_SHOWN = 10  # names for people; JSON has all
_SIZES = 5
# Beginnings of reasons for which a file is rightly passed over. Whatever else is, may be a loss.
_SYSTEM = ("hidden", "in a hidden", "thumbnail", "macOS metadata", "Windows metadata", "in a recycle bin", "in lost+found")
_RIGHTLY = ("no image", "no .parquet", "left out by", *_SYSTEM)


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; str() of it is the text for people."""

    path: str
    account: Account  # of all files, members or records, as the source gave it when it was opened
    images: int
    identities: int
    counts: np.ndarray  # int64 [identities], images of each
    decoder: str  # what decoded JPEG
    sizes: dict[tuple[int, int], int]  # (width, height) -> readable images, most frequent first
    unreadable: list[tuple[str, str]]  # name of an image, reason
    damaged: list[tuple[str, str]]  # name of a JPEG, what libjpeg warned of; training would use it
    copies: list[list[str]]  # names of images of one identity with the same bytes
    contradictions: list[list[str]]  # names of images of several identities with the same bytes, each with its identity
    single: list[str]  # names of identities with one image
    labels: str | None  # what is odd about the numbers of identities, where these are numbers
    clean: PackReport | None = None  # the set without what is wrong, if it was written

    @property
    def images_per_identity(self) -> tuple[int, float, int]:
        """Least, median and most."""
        return int(self.counts.min()), float(np.median(self.counts)), int(self.counts.max())

    @property
    def wrong(self) -> list[str]:
        """What has to be mended, a few words each; empty for a set that can be trained on as it is."""
        lost = {reason: passed.count for reason, passed in self.account.passed_over.items() if not reason.startswith(_RIGHTLY)}
        counts = {
            "unreadable image(s)": len(self.unreadable),
            "damaged image(s)": len(self.damaged),
            "image(s) under several identities": len(self.contradictions),
        }
        return [f"{count} {what}" for what, count in counts.items() if count] + [
            f"{count} passed over: {why}" for why, count in lost.items()
        ]

    def __str__(self) -> str:
        least, median, most = self.images_per_identity
        shown = ", ".join(f"{width}x{height} ({count})" for (width, height), count in list(self.sizes.items())[:_SIZES])
        others = f" and {len(self.sizes) - _SIZES} other sizes" if len(self.sizes) > _SIZES else ""
        lines = [
            f"{self.path}: {self.images} images of {self.identities} identities",
            *self.account.lines(),
            f"images per identity: min {least}, median {median:g}, max {most}",
            f"sizes: {shown or 'none'}{others}",
            *_listed("identities with one image", self.single),
            *_listed("unreadable images", [f"{name}: {reason}" for name, reason in self.unreadable]),
            *_listed("damaged images, which training would use as they are", [f"{name}: {reason}" for name, reason in self.damaged]),
            *_listed("the same image several times under one identity", [" = ".join(group) for group in self.copies]),
            *_listed("the same image under several identities", [" = ".join(group) for group in self.contradictions]),
            *([f"labels: {self.labels}"] if self.labels else []),
            f"JPEG decoded by: {self.decoder}",
            f"wrong: {'; '.join(self.wrong) or 'nothing'}",
            *([str(self.clean)] if self.clean else []),
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON. Nothing is shortened but the examples of the account."""
        least, median, most = self.images_per_identity
        return {
            "path": self.path,
            "files": self.account.as_dict(),
            "images": self.images,
            "identities": self.identities,
            "images_per_identity": {"min": least, "median": median, "max": most},
            "decoder": self.decoder,
            "sizes": [{"width": width, "height": height, "images": count} for (width, height), count in self.sizes.items()],
            "unreadable": [{"name": name, "reason": reason} for name, reason in self.unreadable],
            "damaged": [{"name": name, "reason": reason} for name, reason in self.damaged],
            "copies": self.copies,
            "contradictions": self.contradictions,
            "single": self.single,
            "labels": self.labels,
            "wrong": self.wrong,
            "clean": self.clean and self.clean.as_dict(),
        }


def check(
    path: str,
    reader: str = "native",
    threads: int = 0,
    decoder: str = "auto",
    fix: str = "",
    cache: str = "",
    timeout: float = TIMEOUT,
) -> CheckReport:
    """Opens the data set and decodes every image fully, as a run with data.decoder = `decoder` on this machine would.

    fix: a .rec to write, with what can be trained on, and FIX.left_out.txt beside it with the rest (name<tab>reason). The report is of
    the set as it was. timeout: seconds that the read of an image may take. ValueError as for open_source, and for a `fix` that cannot be
    written."""
    config = DataConfig(reader=reader, threads=threads, decoder=decoder, timeout=timeout)
    source = open_source(path, reader, cache=cache)
    if fix:
        check_name(source, fix)
    found = look(source, config)
    readable = np.setdiff1d(np.arange(len(source)), np.fromiter(found.unreadable, np.int64, len(found.unreadable)))
    groups = copies(found.digests_n2[readable], readable)
    report = _report(source, found, groups)
    if fix:
        report = replace(report, clean=write_clean(source, found, groups, fix, timeout))
    return report


def _report(source: Source, found: Findings, groups: Sequence[np.ndarray]) -> CheckReport:
    labels = source.labels
    name = source.name
    widths_heights, counts = np.unique(found.sizes_n2[found.sizes_n2.any(axis=1), ::-1], axis=0, return_counts=True)
    frequent = np.argsort(-counts, kind="stable")
    contradicting = [len(np.unique(labels[group])) > 1 for group in groups]
    return CheckReport(
        path=source.path,
        account=source.account,
        images=len(source),
        identities=len(source.identities),
        counts=np.bincount(labels, minlength=len(source.identities)),
        decoder={"gpu": "nvJPEG on the GPU", "cpu": "libjpeg-turbo on the CPU"}[found.decodes_on],
        sizes={tuple(widths_heights[at].tolist()): int(counts[at]) for at in frequent},
        unreadable=[(name(image), found.unreadable[image]) for image in sorted(found.unreadable)],
        damaged=[(name(image), found.damaged[image]) for image in sorted(found.damaged)],
        copies=[[name(image) for image in group.tolist()] for group, several in zip(groups, contradicting, strict=True) if not several],
        contradictions=[
            [f"{name(image)} ({printable(source.identities[labels[image]])})" for image in group.tolist()]
            for group, several in zip(groups, contradicting, strict=True)
            if several
        ],
        single=[printable(identity) for identity in single_image_identities(source)],
        labels=_odd_labels(source),
    )


def _odd_labels(source: Source) -> str | None:
    """Of a .rec without names beside it, whose identities are called by the labels of its records."""
    if not source.path.lower().endswith(".rec") or not os.path.isfile(source.path) or os.path.exists(identities_path(source.path)):
        return None
    try:
        values = sorted(int(name) for name in source.identities)
    except ValueError:
        return None
    missing = values[-1] - values[0] + 1 - len(values)
    if (values[0], missing) == (0, 0):
        return None
    gaps = f", {missing} numbers between are not used" if missing else ""
    return f"{values[0]} to {values[-1]}{gaps}; training numbers them 0 to {len(values) - 1}"


def _listed(what: str, names: list[str]) -> list[str]:
    more = [f"  and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return [f"{what}: {len(names)}", *(f"  {name}" for name in names[:_SHOWN]), *more]
