"""Where images come from: every form of a data set behind one small interface (number, labels, names, encoded bytes, account)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dali_loaders.account import Account
from dali_loaders.config import DataConfig
from dali_loaders.fetching import fetch, is_copied
from dali_loaders.names import printable, quoted
from dali_loaders.remote import is_remote
from dali_loaders.sources import by_name, meant
from dali_loaders.sources.by_name import IMAGE_EXTENSIONS, LAYOUT
from dali_loaders.sources.fingerprint import fingerprint
from dali_loaders.sources.folder import FolderSource
from dali_loaders.sources.parquet_files import is_parquet
from dali_loaders.sources.patterns import expand, is_pattern, tars_in
from dali_loaders.sources.recordio import RecordSource, find_record
from dali_loaders.sources.several import SeveralSources, distinct_names, split_paths
from dali_loaders.sources.source import Part, Source, check_images_per_identity, read_many, single_image_identities
from dali_loaders.sources.subset import SubsetSource, select
from dali_loaders.sources.tar import TarSource
from dali_loaders.sources.webdataset import open_tars
from dali_loaders.waiting import waiting

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

_FORMS = "a folder, a .tar, .rec or .parquet file, or a pattern of such files"


def open_data(config: DataConfig) -> Source:
    """The training set of a configuration: its sets with their weights, and of them the images that its lists leave."""
    joined = config.identities == "joined"
    source = open_source(config.train, config.reader, cache=config.cache, weights=config.weights, joined=joined)
    with waiting("the lists of data.subset and data.exclude to be read"):
        return select(source, config.subset, config.exclude)


def open_source(path: str, reader: str = "native", *, cache: str = "", weights: Sequence[float] = (), joined: bool = False) -> Source:
    """Opens a set of any form, by what its path is, or several of them between commas.

    reader: "native", or "mxnet" to read a .rec through the mxnet package
    cache: a folder for copies of what is at remote addresses
    weights, joined: of several sets, as in SeveralSources
    ValueError for whatever holds no labelled images.
    """
    if reader not in ("native", "mxnet"):
        raise ValueError(f"unknown reader {reader!r}: expected 'native' or 'mxnet'.")
    paths = split_paths(path)
    if len(paths) > 1:
        names = distinct_names(paths)
        return SeveralSources(path, [_opened(one, reader, cache) for one in paths], names, weights, joined)
    if weights:
        raise ValueError(f"data.weights is given for several sets, but data.train names one, {path}; leave it out.")
    return _opened(paths[0], reader, cache)


def _opened(path: str, reader: str, cache: str) -> Source:
    try:
        with waiting(f"the data set {path} to be opened"):
            return _open(path, reader, cache)
    except OSError as error:
        where = os.fsdecode(error.filename) if error.filename is not None else path
        raise ValueError(f"{where} cannot be read: {error.strerror or error}; check the path and its permissions.") from error


def _open(path: str, reader: str, cache: str) -> Source:
    """One set."""
    if not path:
        raise ValueError(f"no data given: name {_FORMS}.")
    if is_remote(path):
        if not is_copied(path):
            from dali_loaders.sources.remote_folder import RemoteFolderSource

            return RemoteFolderSource(path, cache)
        path = fetch(path, cache)
    paths = [path]
    if is_parquet(path):
        if reader == "native":
            from dali_loaders.sources.parquet import ParquetSource

            return ParquetSource(path)
    elif is_pattern(path):
        paths = expand(path)
    elif os.path.isdir(path):
        paths = _files_of(path)
        source = _of_paths(paths, path, reader)
        if paths != [path]:
            _pass_over_others(source.account, path, paths)
        return source
    elif not _exists(path):
        guess = meant.guess(path)
        raise ValueError(f"{quoted(path)} does not exist; expected {_FORMS}{f'; {guess}' if guess else '.'}")
    return _of_paths(paths, path, reader)


def _exists(path: str) -> bool:
    """OSError where that cannot be said."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _of_paths(paths: list[str], path: str, reader: str) -> Source:
    """The set that `path` stands for."""
    kinds = {os.path.splitext(one)[1].lower() for one in paths}
    if kinds == {".rec"} and not any(map(os.path.isdir, paths)):
        if len(paths) == 1:
            return RecordSource(paths[0], reader)
        return SeveralSources(path, [RecordSource(one, reader) for one in paths], distinct_names(paths), joined=True)
    if ".rec" in kinds:
        raise ValueError(f"{path} stands for {', '.join(paths[:3])}: expected RecordIO files only, or none.")
    if reader == "mxnet":
        raise ValueError(f"reader='mxnet' reads .rec files only, but the data is {path}; use reader='native'.")
    folders = [one for one in paths if os.path.isdir(one)]
    if not folders:
        return open_tars(paths, path)
    if len(folders) < len(paths):
        raise ValueError(f"{path} stands for {folders[0]}, a folder, and for files; name folders and files apart, between commas.")
    if len(paths) == 1:
        return FolderSource(path)
    return SeveralSources(path, [FolderSource(one) for one in paths], distinct_names(paths), joined=True)


def _files_of(folder: str) -> list[str]:
    """The files that a folder of them is a set by, such as InsightFace's train.rec or tar shards; itself, if it holds folders."""
    with os.scandir(folder) as entries:
        if any(entry.is_dir() and not by_name.aside(os.fsencode(entry.name) + b"/") for entry in entries):
            return [folder]
    record = find_record(folder)
    return [record] if record else tars_in(folder) or [folder]


def _pass_over_others(account: Account, folder: str, paths: list[str]) -> None:
    """Accounts for what the folder holds beside the files that it is opened by and those that belong to them, such as train.idx."""
    stems = tuple(os.path.splitext(os.path.basename(path))[0] + "." for path in paths)
    for name in sorted(os.listdir(folder)):
        if name != "property" and not name.startswith(stems):
            account.pass_over(by_name.beside(os.fsencode(name)), printable(name))
