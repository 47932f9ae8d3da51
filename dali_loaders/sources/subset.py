"""A part of a set, by the lists with which people clean sets: image numbers, image names or identity names, one a line."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

import numpy as np

from dali_loaders.account import EXAMPLES, Account, Unreadable
from dali_loaders.names import printable
from dali_loaders.regular import open_regular
from dali_loaders.sources.fingerprint import order_checksum
from dali_loaders.sources.source import Source, read_many


class SubsetSource:
    """A source without some of its images, in its order. Labels are numbered anew, without the identities of which no image is left.

    left_out: by reason, bool [N] each, the images that are not to be seen; the account gives the first reason of an image
    ValueError if none is left.
    """

    def __init__(self, source: Source, left_out: dict[str, np.ndarray]) -> None:
        self.path = source.path
        self._source = source
        self.account = Account(source.account.seen, source.account.used)
        self.account.passed_over.update(source.account.passed_over)
        kept = np.ones(len(source), bool)
        for reason, images in left_out.items():
            _pass_over(self.account, source, np.flatnonzero(images & kept), reason)
            kept &= ~images
        if not kept.any():
            raise ValueError(f"{source.path}: all {len(source)} images are {' or '.join(left_out)}; give a list that leaves some.")
        self._indices = np.flatnonzero(kept)
        labels = source.labels[self._indices]
        has_images = np.bincount(labels, minlength=len(source.identities)) > 0
        self.labels = (np.cumsum(has_images) - 1)[labels]
        present = np.flatnonzero(has_images)
        self.identities = [source.identities[label] for label in present.tolist()]
        self.parts = tuple(
            part._replace(start=int(np.searchsorted(self._indices, part.start)), stop=int(np.searchsorted(self._indices, part.stop)))
            for part in getattr(source, "parts", ())
        )
        self.remarks = [
            *getattr(source, "remarks", ()),
            *(f"{reason}: {int(images.sum())} images" for reason, images in left_out.items()),
            f"{len(self)} of {len(source)} images and {len(present)} of {len(source.identities)} identities are left",
        ]

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> bytes:
        return self._source.read(int(self._indices[index]))

    def read_many(self, indices: np.ndarray) -> list[bytes | np.ndarray | Unreadable]:
        """As `source.read_many`."""
        return read_many(self._source, self._indices[indices])

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def order_checksum(self) -> int:
        """Of the source's own, and of which images are left (fingerprint.py)."""
        return zlib.crc32(self._indices.astype("<i8", copy=False).data, order_checksum(self._source))


def _pass_over(account: Account, source: Source, images: np.ndarray, reason: str) -> None:
    """Moves used images to those passed over."""
    account.seen -= len(images)
    account.used -= len(images)
    for place, image in enumerate(images[:EXAMPLES].tolist(), start=1):
        account.pass_over(reason, source.name(image), 1 if place < EXAMPLES else len(images) - place + 1)


def select(source: Source, subset: str = "", exclude: str = "") -> Source:
    """The images of `source` that the list `subset` names, without those that the list `exclude` names; "" is no list.

    A line of a list is the number of an image (from 0), the name of an identity, or the name of an image or the end of it from a / or :
    on. What follows a tab is a remark. `image:` or `identity:` before it says which is meant. ValueError with the number of the line for
    what is none of these, or is several."""
    left_out = {}
    if subset:
        left_out["left out by data.subset"] = ~_List(source, subset, "data.subset").images
    if exclude:
        left_out["left out by data.exclude"] = _List(source, exclude, "data.exclude").images
    return SubsetSource(source, left_out) if left_out else source


class _List:
    """images: bool [N], those that the file `path` names."""

    def __init__(self, source: Source, path: str, option: str) -> None:
        self.source, self.path = source, path
        self.images = np.zeros(len(source), bool)
        self.line_of: dict[str, int] = {}  # lines that may be names of images
        label_of = {text: label for label, name in enumerate(source.identities) for text in (printable(name), name)}
        listed_labels = np.zeros(len(source.identities), bool)
        for line, text in self._lines(option):
            kind, colon, rest = text.partition(":")
            meant = kind if colon and kind in ("image", "identity") and text not in label_of else ""
            name = rest if meant else text
            is_number = meant != "identity" and re.fullmatch(r"0|[1-9][0-9]{0,17}", name) is not None and int(name) < len(source)
            is_identity = meant != "image" and name in label_of
            if is_number and is_identity:
                raise self._error(
                    line, f"{name!r} is the number of an image and the name of an identity; write image:{name} or identity:{name}."
                )
            if is_number:
                self.images[int(name)] = True
            elif is_identity:
                listed_labels[label_of[name]] = True
            elif meant == "identity":
                raise self._error(line, f"no identity of {source.path} is called {name!r}; they are called like {source.identities[0]!r}.")
            else:
                self.line_of.setdefault(name, line)
        if listed_labels.any():
            self.images |= listed_labels[source.labels]
        if self.line_of:
            self._find_by_name()

    def _error(self, line: int, fault: str) -> ValueError:
        return ValueError(f"{self.path}, line {line}: {fault}")

    def _lines(self, option: str) -> Iterator[tuple[int, str]]:
        try:
            # utf-8-sig: editors of Windows put a mark at the beginning.
            with open(self.path, encoding="utf-8-sig", errors="surrogateescape", opener=open_regular) as file:
                for number, line in enumerate(file, start=1):
                    if text := line.rstrip("\n").partition("\t")[0]:
                        yield number, text
        except OSError as error:
            raise ValueError(
                f"{option}: {self.path} cannot be read ({error.strerror}); expected a text file, one image or identity a line."
            ) from error

    def _find_by_name(self) -> None:
        source = self.source
        found: dict[str, int] = {}
        for index in range(len(source)):
            name = source.name(index)
            for end in (name, *(name[match.end() :] for match in re.finditer("[/:]", name))):
                if end not in self.line_of:
                    continue
                if end in found:
                    both = f"{source.name(found[end])} and {name}"
                    raise self._error(self.line_of[end], f"{end!r} is the name of several images ({both}); write more of it.")
                found[end] = index
        missing = [name for name in self.line_of if name not in found]
        if missing:
            identity, image, last = source.identities[0], source.name(0), len(source) - 1
            more = f" {len(missing)} lines are like that." if len(missing) > 1 else ""
            raise self._error(
                self.line_of[missing[0]],
                f"{missing[0]!r} is nothing of {source.path}; expected the number of an image (0 to {last}), the name of an identity (such "
                f"as {identity!r}) or of an image (such as {image!r}).{more}",
            )
        self.images[list(found.values())] = True
