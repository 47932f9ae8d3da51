"""Images that are to be embedded: a set in any form, a pair set, one image file, or a folder of image files without identities."""

from __future__ import annotations

import os

import numpy as np

from dali_loaders.account import Account, ReadError
from dali_loaders.config import DataConfig
from dali_loaders.names import printable, text
from dali_loaders.regular import read_regular
from dali_loaders.sources import Source, by_name
from pipeline.evaluation import open_set


class ImageFiles:
    """Image files as a Source; nobody says who is in them, so all have the identity ""."""

    def __init__(self, path: str, files: list[bytes], account: Account) -> None:
        self.path, self.account = path, account
        self.labels = np.zeros(len(files), np.int64)
        self.identities = [""]
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        try:
            return read_regular(self._files[index])
        except OSError as error:
            raise ReadError.of(error) from error

    def name(self, index: int) -> str:
        return printable(self._files[index])


def open_images(path: str, data: DataConfig) -> Source:
    """ValueError where `path` holds no images."""
    if is_image(path):
        return ImageFiles(path, [os.fsencode(path)], Account(seen=1, used=1))
    if os.path.isdir(path):
        with os.scandir(os.fsencode(path)) as found:
            entries = sorted((entry.name, entry.is_dir()) for entry in found)
        images = [name for name, is_dir in entries if not is_dir and by_name.named_like_an_image(name) and by_name.aside(name) is None]
        if images and not any(is_dir and by_name.aside(name + b"/") is None for name, is_dir in entries):
            account = Account()
            account.use(len(images))
            for name, is_dir in entries:
                if not is_dir and name not in set(images):
                    account.pass_over(by_name.beside(name), printable(text(name)))
            return ImageFiles(path, [os.path.join(os.fsencode(path), name) for name in images], account)
    return open_set(path, data)


def is_image(path: str) -> bool:
    """Whether that is a single image file, by its name."""
    return os.path.isfile(path) and by_name.named_like_an_image(os.fsencode(path))
