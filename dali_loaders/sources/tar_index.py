"""Where the images of a tar are, and whose: found by reading its headers once, then kept in a cache (see set_cache)."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from dali_loaders.account import Account, Passed, ReadError
from dali_loaders.names import Names, printable
from dali_loaders.progress import progress
from dali_loaders.regular import open_regular
from dali_loaders.set_cache import cached
from dali_loaders.sources import by_name, meant, samples
from dali_loaders.sources.tar_headers import CutOffError, DamagedTarError, Member, members
from dali_loaders.sources.tar_tree import IS_SPARSE, Unpacked

_KIND = "tar 1"  # to be counted up whenever the arrays, or what they hold, change
_LARGEST_SPARSE = 1 << 30  # bytes, since one block may stand for terabytes of zeros


@dataclass
class TarIndex:
    """Arrays of N images in the order of their names; their memory is shared by the processes of a host."""

    names: Names
    offsets: np.ndarray  # int64 [N]; of the first header where the size is IS_SPARSE
    sizes: np.ndarray  # int64 [N]
    labels: np.ndarray  # int64 [N]
    identities: list[bytes]  # by label
    has_samples: bool  # labels are those of WebDataset's samples, and not folders
    account: Account


def index_of(path: str) -> TarIndex:
    """Of an uncompressed tar, whose index may have no images. ValueError, in a sentence, for what cannot be read as a tar."""
    arrays = cached(path, [path], _KIND, lambda: {name: [array] for name, array in _build(path).items()})
    account = json.loads(arrays["account"].tobytes())
    return TarIndex(
        names=Names(arrays["names"], arrays["starts"]),
        offsets=arrays["offsets"],
        sizes=arrays["sizes"],
        labels=arrays["labels"],
        identities=list(Names(arrays["identities"], arrays["identity_starts"])),
        has_samples=account["has_samples"],
        account=Account(account["seen"], account["used"], {reason: Passed(**passed) for reason, passed in account["passed_over"].items()}),
    )


def _build(path: str) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb", buffering=0, opener=open_regular) as file:
            return _Builder(path, file.fileno()).arrays()
    except DamagedTarError as error:
        remedy = meant.guess(path)
        if isinstance(error, CutOffError) and not remedy:
            raise ValueError(f"{printable(path)} is cut off ({error}); copy it again from its source.") from error
        remedy = remedy or "expected a folder, a .tar or a .rec file; a damaged tar is best copied again from its source."
        raise ValueError(f"{printable(path)} is not a readable uncompressed .tar ({error}); {remedy}") from error
    except OSError as error:
        raise ValueError(f"{printable(path)} cannot be read: {ReadError.of(error)}; check the path and its permissions.") from error


class _Builder:
    def __init__(self, path: str, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        self._account = Account()
        self._unpacked = Unpacked(_shown(members(descriptor, os.fstat(descriptor).st_size), path), self._account)
        self._names, self._places = self._unpacked.files()
        by_name.pass_over_links(path, self._unpacked.links_to_nowhere, self._account)

    def arrays(self) -> dict[str, np.ndarray]:
        """See TarIndex."""
        members_of = samples.label_members(self._names)
        labels_at = {place for places in members_of.values() for place in places.values()}
        images = self._admitted([at for at in range(len(self._names)) if at not in labels_at])
        of_samples = members_of and samples.identities_of(
            self._path, [self._names[at] for at in images], members_of, self._read, self._account
        )
        if of_samples:
            images = [at for at, identity in zip(images, of_samples, strict=True) if identity is not None]
            of_images = [identity for identity in of_samples if identity is not None]
            identities = samples.in_order(set(of_images))
            label_of = {identity: label for label, identity in enumerate(identities)}
            labels = np.fromiter((label_of[identity] for identity in of_images), np.int64, len(of_images))
        else:  # what could have held labels is a file like others
            images = sorted(images + self._admitted(sorted(labels_at)), key=self._names.__getitem__)
            labels, identities = by_name.labels_of(self._path, [self._names[at] for at in images], f"{by_name.LAYOUT}, or {samples.LAYOUT}")
            by_name.without_images(self._unpacked.folders, identities, self._account)
        self._account.use(len(images))
        names, places = Names.of([self._names[at] for at in images]), np.array([self._places[at] for at in images], np.int64)
        named = Names.of(identities)
        about = json.dumps({**self._account.as_dict(), "has_samples": bool(of_samples)})
        return {
            "names": names.blob,
            "starts": names.starts,
            "offsets": np.asarray(self._unpacked.offsets, np.int64)[places],
            "sizes": np.asarray(self._unpacked.sizes, np.int64)[places],
            "labels": labels,
            "identities": named.blob,
            "identity_starts": named.starts,
            "account": np.frombuffer(about.encode(), np.uint8),
        }

    def _admitted(self, places: list[int]) -> list[int]:
        """Those of the images among the files at `places`."""
        found = by_name.admitted(
            [self._names[at] for at in places], self._account, lambda chosen: self._heads([places[at] for at in chosen])
        )
        return [places[at] for at in found]

    def _heads(self, places: list[int]) -> Iterable[bytes | str]:
        for at in places:
            try:
                yield self._read(at, by_name.HEAD)
            except ReadError as error:
                yield str(error)

    def _read(self, at: int, most: int = samples.LARGEST) -> bytes:
        """The first bytes of a file."""
        offset, size = self._unpacked.offsets[self._places[at]], self._unpacked.sizes[self._places[at]]
        if size == IS_SPARSE:
            return read_sparse(self._path, offset)[:most]
        return os.pread(self._descriptor, min(size, most), offset)


def _shown(found: Iterable[Member], path: str) -> Iterator[Member]:
    with progress(f"headers of {printable(os.path.basename(path))}") as done:
        for member in found:
            done.add()
            yield member


def read_sparse(path: str, offset: int) -> bytes:
    """The data of the sparse member whose first header stands at `offset`. ReadError if it is damaged."""
    try:
        with open(path, "rb", opener=open_regular) as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                member = tar.next()
                content = tar.extractfile(member) if member is not None and member.size <= _LARGEST_SPARSE else None
                if content is None:
                    raise ReadError("too large")
                return content.read()
    except ReadError:
        raise
    except Exception as error:  # tarfile trusts the numbers of a member's map
        raise ReadError("damaged sparse member") from error
