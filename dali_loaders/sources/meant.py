"""What was probably meant by a path that is no set of images: one sentence, for the end of an error's message."""

from __future__ import annotations

import difflib
import os

from dali_loaders.regular import open_regular

_COMPRESSED = {  # by their first bytes
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
}
_ARCHIVES = {b"PK\x03\x04": ("zip", "unzip"), b"7z\xbc\xaf\x27\x1c": ("7z", "7z x"), b"Rar!": ("rar", "unrar x")}
_ENDINGS = (".zip", ".7z", ".rar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_SEVERAL = 3  # names that a sentence lists


def guess(path: str) -> str:
    """What to give or to do instead: a sentence from a small letter to its full stop, or "" if nothing comes to mind."""
    try:
        if os.path.isdir(path):
            return _of_folder(path, sorted(os.listdir(path)))
        return _of_file(path) if os.path.exists(path) else _of_missing(path)
    except OSError:
        return ""


def _of_folder(path: str, names: list[str]) -> str:
    def ending(*endings: str) -> list[str]:
        return [os.path.join(path, name) for name in names if name.lower().endswith(endings) and not name.startswith(".")]

    if records := ending(".rec"):
        train = [record for record in records if os.path.basename(record) == "train.rec"]
        return f"it holds {_listed(records)}: give {train[0] if train else ','.join(records[:_SEVERAL])}."
    if tables := ending(".parquet"):
        return f"it holds {_listed(tables)}: give {tables[0] if len(tables) == 1 else os.path.join(path, '*.parquet')}."
    if tars := ending(".tar"):
        return f"it holds {_listed(tars)}: give {tars[0] if len(tars) == 1 else os.path.join(path, '*.tar')}."
    if archives := ending(*_ENDINGS):
        return f"it holds {_listed(archives)}: unpack {'it' if len(archives) == 1 else 'them'} first, and give the folder of identities."
    if pairs := ending(".bin"):
        return f"it holds {_listed(pairs)}: pair sets are given as evaluation.pairs."
    return ""


def _of_file(path: str) -> str:
    stem, ending = os.path.splitext(path)
    with open(path, "rb", opener=open_regular) as file:
        head = file.read(16)
    for magic, (form, command) in _COMPRESSED.items():
        if head.startswith(magic):
            return f"it is compressed with {form}: unpack it with {command}, so that images can be read at their places."
    for magic, (form, command) in _ARCHIVES.items():
        if head.startswith(magic):
            return f"it is a {form} archive: unpack it with {command}, and give the folder of identities."
    records = os.path.join(os.path.dirname(path), "train.rec") if os.path.basename(path) == "property" else f"{stem}.rec"
    if path.endswith(".identities.txt"):
        records = path.removesuffix(".identities.txt") + ".rec"
    if path.endswith(".cache") and os.path.exists(stem):
        return f"it is a cache: give {stem}."
    if os.path.exists(records) and records != path:
        return f"it belongs to a .rec: give {records}."
    if ending.lower() == ".lst":
        return "it is a list of images for MXNet's im2rec: give the folder of the images, or the .rec made of them."
    if ending.lower() == ".bin":
        return "it may be a pair set: those are given as evaluation.pairs."
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG")):
        return "it is one image: give the folder that holds the folders of identities."
    return ""


def _of_missing(path: str) -> str:
    folder, name = os.path.split(path.rstrip("/"))
    near = difflib.get_close_matches(name, sorted(os.listdir(folder or ".")), 1)
    return f"there is {os.path.join(folder, near[0])}: give that if it is meant." if near else ""


def _listed(paths: list[str]) -> str:
    names = ", ".join(os.path.basename(path) for path in paths[:_SEVERAL])
    return f"{names} and {len(paths) - _SEVERAL} more" if len(paths) > _SEVERAL else names
