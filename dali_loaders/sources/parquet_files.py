"""Which files a Parquet set consists of: one file, a pattern, or a folder as Hugging Face exports it, complete and of one split."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict

from dali_loaders.account import Account
from dali_loaders.names import printable
from dali_loaders.sources.by_name import beside
from dali_loaders.sources.patterns import expand, is_pattern

_SHARD = re.compile(r"(?P<set>.*)-(?P<number>\d+)-of-(?P<count>\d+)(-[0-9a-f]{16})?\.parquet")  # older exports end in a hash
_SPLITS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval"}

log = logging.getLogger(__name__)


def is_parquet(path: str) -> bool:
    """Whether `path`, without its columns, is a .parquet file or pattern, or a folder with such files in it or in its folder `data`."""
    path = split_columns(path)[0]
    if path.lower().endswith(".parquet") or not os.path.isdir(path):
        return path.lower().endswith(".parquet")
    folders = (folder for folder in (path, os.path.join(path, "data")) if os.path.isdir(folder))
    return any(name.lower().endswith(".parquet") for folder in folders for name in os.listdir(folder))


def split_columns(path: str) -> tuple[str, list[str]]:
    """PATH#IMAGE:LABEL names the columns; a path without a # names none."""
    where, mark, columns = path.rpartition("#")
    if not mark or os.path.exists(path):
        return path, []
    names = columns.split(":")
    if len(names) != 2 or not all(names):
        raise ValueError(f"{path}: expected two columns after the #, as in {where}#image:label.")
    return where, names


def parquet_files(path: str, account: Account) -> list[str]:
    """The files of `path` in sorted order. Other files of a folder are passed over.

    ValueError where a file NAME-00003-of-00012.parquet is lacking, or a folder holds several sets, such as train and test."""
    if os.path.isdir(path):
        files = _below(path, account)
        if not files:
            raise ValueError(f"{path} holds no .parquet file.")
        sets = sorted({_set_of(os.path.relpath(file, path)) for file in files})
        if len(sets) > 1:
            patterns = ", ".join(os.path.join(path, where, f"{name}*.parquet") for where, name in sets)
            raise ValueError(f"{path} holds several sets: name one of them by a pattern in quotes, such as {patterns}.")
    elif os.path.exists(path):
        shard = _SHARD.fullmatch(os.path.basename(path))
        if shard and int(shard["count"]) > 1:
            log.warning("%s is one file of %d; for all of them name their folder", path, int(shard["count"]))
        return [path]
    else:
        if not is_pattern(path):
            raise ValueError(f"{path} does not exist; expected a .parquet file, a pattern of them or a folder.")
        files = sorted(expand(path))
    _check_shards(files)
    return files


def _below(root: str, account: Account) -> list[str]:
    def fail(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be listed ({error.strerror}); check its permissions.") from error

    files = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders.sort()
        for name in sorted(names):
            file = os.path.join(folder, name)
            if name.lower().endswith(".parquet"):
                files.append(file)
            else:
                account.pass_over(beside(os.fsencode(os.path.relpath(file, root))), printable(file))
    return files


def _set_of(name: str) -> tuple[str, str]:
    """Folder and name of the set that a file belongs to: what stands before its number, or a usual name of a split in its path."""
    folder, file = os.path.split(name)
    shard = _SHARD.fullmatch(file)
    if shard:
        return folder, f"{shard['set']}-"
    words = re.findall("[a-z]+", file.lower())
    return folder, next((word for word in words if word in _SPLITS), "")


def _check_shards(files: list[str]) -> None:
    shards: dict[tuple[str, str], list[re.Match]] = defaultdict(list)
    for file in files:
        shard = _SHARD.fullmatch(os.path.basename(file))
        if shard:
            shards[os.path.dirname(file), shard["set"]].append(shard)
    for (folder, name), found in shards.items():
        counts = {shard["count"] for shard in found}
        numbers = [int(shard["number"]) for shard in found]
        if len(counts) > 1 or len(set(numbers)) < len(numbers):
            raise ValueError(
                f"{folder} holds files of several exports: {found[0].string} and {found[-1].string}; keep those of one export only."
            )
        (count,) = counts
        lacking = sorted(set(range(int(count))) - set(numbers))
        if lacking:
            first = f"{name}-{lacking[0]:0{len(count)}}-of-{count}.parquet"
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise ValueError(f"{folder} lacks {first}{more}; copy it too, or give the files to be used one by one, separated by commas.")
