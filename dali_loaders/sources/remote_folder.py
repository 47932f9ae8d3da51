"""A remote folder of one folder per identity, whose images are read one by one."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading

from dali_loaders.account import Account, ReadError
from dali_loaders.names import printable, text
from dali_loaders.regular import open_regular
from dali_loaders.remote import RemoteFile, cache_name, connect, described, lasting, retried, without_secrets, words
from dali_loaders.sources.by_name import LAYOUT, aside, labels_of, named_like_an_image, no_images
from dali_loaders.waiting import waiting

log = logging.getLogger(__name__)


class RemoteFolderSource:
    """ADDRESS/IDENTITY/IMAGE at any address of fsspec; identities and images in sorted order, found by their names.

    Opening lists the folder. Images are asked for when they are needed, and kept in the folder `cache` where one is given; what cannot be
    written there is asked for again. Keeping an image is atomic and safe from several processes."""

    def __init__(self, address: str, cache: str = "") -> None:
        self.path = address.rstrip("/")
        self._system, root = connect(self.path)
        self._cache = os.path.join(cache, cache_name(self.path)) if cache else ""
        self.account = Account()
        self._system.invalidate_cache()
        try:
            with waiting(f"the list of files at {address}"):
                listed = retried(lambda: self._system.find(root, detail=True))
        except Exception as error:  # packages of storages raise their own kinds
            raise ValueError(f"{address} cannot be listed ({words(error)}); check the address, the connection and credentials.") from error
        if not listed or root in listed:
            what = "is one file, and no folder" if listed else "does not exist, is empty or cannot be reached"
            raise ValueError(f"{address} {what}; expected the address of a folder of {LAYOUT}, or of .rec, .tar or .parquet files.")
        found = sorted((path[len(root) :].lstrip("/"), info) for path, info in listed.items() if info["type"] != "directory")
        if any(name.endswith(".parquet") for name, _ in found):
            raise ValueError(f"{address} holds .parquet files; name them by a pattern, such as {self.path}/*.parquet.")
        folder = root.rstrip("/") + "/"
        self._files = [described(folder, name, info) for name, info in found if self.account.admits(name, _no_image(name))]
        if not self._files:
            raise no_images(address, self.account, "")
        self.labels, identities = labels_of(address, [file.name.encode(errors="surrogateescape") for file in self._files])
        self.identities = [text(identity) for identity in identities]

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        file = self._files[index]
        kept = ""
        if self._cache:
            key = hashlib.sha256(str(file).encode(errors="surrogateescape")).hexdigest()  # of its size and version too
            kept = os.path.join(self._cache, key[:2], key[2:34])
            with contextlib.suppress(OSError), open(kept, "rb", buffering=0, opener=open_regular) as copy:
                data = copy.read()
                if len(data) == file.size:
                    return data
        try:
            data = retried(lambda: self._ask(file))
        except ReadError:
            raise
        except Exception as error:  # packages of storages raise their own kinds
            vanished = isinstance(error, FileNotFoundError) and lasting(error)
            raise ReadError("vanished" if vanished else words(error).lower()) from error
        if kept:
            self._keep(data, kept)
        return data

    def name(self, index: int) -> str:
        return printable(f"{without_secrets(self.path)}/{self._files[index].name}")

    def _ask(self, file: RemoteFile) -> bytes:
        data = self._system.cat_file(file.path)
        if len(data) < file.size:
            raise OSError(f"gave {len(data)} bytes of {file.size}")
        if len(data) > file.size:
            raise ReadError("changed since it was listed")
        return data

    def _keep(self, data: bytes, path: str) -> None:
        temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(temporary, "wb") as out:
                out.write(data)
            os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            log.warning("%s cannot be written (%s): images are read from %s again", self._cache, words(error), without_secrets(self.path))
            self._cache = ""


def _no_image(name: str) -> str | None:
    data = name.encode(errors="surrogateescape")
    return aside(data) or (None if named_like_an_image(data) else "no image by its name")
