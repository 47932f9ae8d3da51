"""Where images come from: every form of a data set behind one small interface (number, labels, names, encoded bytes, account)."""

from __future__ import annotations

import os

from dali_loaders.sources.by_name import IMAGE_EXTENSIONS, LAYOUT
from dali_loaders.sources.folder import FolderSource
from dali_loaders.sources.recordio import RecordSource
from dali_loaders.sources.source import Source, check_images_per_identity, single_image_identities
from dali_loaders.sources.tar import TarSource

__all__ = [
    "IMAGE_EXTENSIONS",
    "LAYOUT",
    "FolderSource",
    "RecordSource",
    "Source",
    "TarSource",
    "check_images_per_identity",
    "open_source",
    "single_image_identities",
]


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
