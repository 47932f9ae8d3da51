"""Where images come from: every form of a data set behind one small interface (number, labels, names, encoded bytes, account)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dali_loaders.config import DataConfig
from dali_loaders.sources.by_name import IMAGE_EXTENSIONS, LAYOUT
from dali_loaders.sources.fingerprint import fingerprint
from dali_loaders.sources.folder import FolderSource
from dali_loaders.sources.recordio import RecordSource
from dali_loaders.sources.several import SeveralSources, distinct_names, split_paths
from dali_loaders.sources.source import Part, Source, check_images_per_identity, read_many, single_image_identities
from dali_loaders.sources.subset import SubsetSource, select
from dali_loaders.sources.tar import TarSource

__all__ = [
    "IMAGE_EXTENSIONS",
    "LAYOUT",
    "FolderSource",
    "Part",
    "RecordSource",
    "SeveralSources",
    "Source",
    "SubsetSource",
    "TarSource",
    "check_images_per_identity",
    "distinct_names",
    "fingerprint",
    "open_data",
    "open_source",
    "read_many",
    "select",
    "single_image_identities",
]


def open_data(config: DataConfig) -> Source:
    """The training set of a configuration: its sets with their weights, and of them the images that its lists leave."""
    source = open_source(config.train, config.reader, weights=config.weights, joined=config.identities == "joined")
    return select(source, config.subset, config.exclude)


def open_source(path: str, reader: str = "native", *, weights: Sequence[float] = (), joined: bool = False) -> Source:
    """Opens a folder or .tar of IDENTITY/IMAGE files, a .rec (its .idx is rebuilt when missing), or several of them between commas.

    reader: "native", or "mxnet" to read a .rec through the mxnet package. weights, joined: of several sets, as in SeveralSources.
    ValueError for whatever holds no labelled images.
    """
    if reader not in ("native", "mxnet"):
        raise ValueError(f"unknown reader {reader!r}: expected 'native' or 'mxnet'.")
    paths = split_paths(path)
    if len(paths) > 1:
        names = distinct_names(paths)
        return SeveralSources(path, [_open(one, reader) for one in paths], names, weights, joined)
    if weights:
        raise ValueError(f"data.weights is given for several sets, but data.train names one, {path}; leave it out.")
    return _open(paths[0], reader)


def _open(path: str, reader: str) -> Source:
    """One set, by what its path is."""
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
