"""Sets whose identities are the folders of their images' names: which files are images, and what their labels are.

A name that ends like an image's is believed; other files are looked at. Names are bytes, as file systems and tars have them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dali_loaders.account import Account
from dali_loaders.names import printable
from dali_loaders.sources.walk import NOWHERE

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".jp2",
)  # fmt: skip
LAYOUT = "IDENTITY/IMAGE.jpg (one folder per identity)"
_REASONS = 4  # that a message lists
HEAD = 32  # bytes that tell what a file is

_SETS = (b".rec", b".tar", b".parquet", b".zip", b".7z", b".rar", b".gz", b".tgz", b".bz2", b".xz", b".zst")
_BY_NAME = tuple(extension.encode() for extension in IMAGE_EXTENSIONS)
_ASIDE = re.compile(
    rb"(?:^|/)(?:\.|@eadir/|__macosx/|lost\+found/|\$recycle\.bin/|#recycle/|(?:eh)?thumbs\.db$|desktop\.ini$)", re.IGNORECASE
)
_SYSTEM_FOLDERS = {
    b"@eadir": "thumbnail of a NAS (@eaDir)",
    b"__macosx": "macOS metadata (__MACOSX)",
    b"lost+found": "in lost+found",
    b"$recycle.bin": "in a recycle bin",
    b"#recycle": "in a recycle bin",
}
_EXTENSION = re.compile(rb"\.[a-z][a-z0-9_]{0,9}$")
_CONTENT = (
    (re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8[79]a|II\*\0|MM\0\*|\0\0\0\x0cjP  |\xff\x4f\xff\x51", re.DOTALL), None),
    (re.compile(rb"BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL), None),  # "BM" alone may begin a text
    (re.compile(rb"P[1-6]\s+(?:\d|#)"), None),
    (re.compile(rb".{4}ftyp(?:hei|hev|mif1|msf1)", re.DOTALL), "HEIC image, which is not decoded; convert it to JPEG"),
    (re.compile(rb".{4}ftypavi", re.DOTALL), "AVIF image, which is not decoded; convert it to JPEG"),
)


def aside(name: bytes) -> str | None:
    """Why a file below the set's folder is passed over whatever it holds: hidden ones, and what systems put beside images."""
    if _ASIDE.search(name) is None:
        return None
    *folders, file = name.split(b"/")
    for folder in folders:
        if folder.lower() in _SYSTEM_FOLDERS:
            return _SYSTEM_FOLDERS[folder.lower()]
        if folder.startswith(b"."):
            return "in a hidden folder"
    if file.startswith(b"._"):
        return "macOS metadata (._ file)"
    return "hidden file" if file.startswith(b".") else "Windows metadata"


def named_like_an_image(name: bytes) -> bool:
    return name.lower().endswith(_BY_NAME)


def beside(name: bytes) -> str:
    """Why a file is passed over that stands in a folder which is opened by other files, such as tars."""
    if reason := aside(name):
        return reason
    may_be_data = name.lower().endswith((*_BY_NAME, *_SETS))
    return "data beside the files that the folder is opened by" if may_be_data else "no image by its name"


def no_image(name: bytes, head: bytes) -> str | None:
    """Why a file that begins with `head` (HEAD bytes) is no image that can be read; None if it is one."""
    for content, reason in _CONTENT:
        if content.match(head):
            return reason
    extension = _EXTENSION.search(name.lower())
    return f"no image by its content ({extension[0].decode() if extension else 'no extension'})"


def admitted(
    names: Sequence[bytes],
    account: Account,
    heads: Callable[[list[int]], Iterable[bytes | str]],
) -> list[int]:
    """Places of the images among `names`, in the order of their names; `account` gets the others.

    heads: the first HEAD bytes of the files at some places, or why they cannot be read; asked only for names that tell nothing."""
    images, unknown = [], []
    for place, name in enumerate(names):
        if _ASIDE.search(name) is not None:
            account.pass_over(aside(name) or "", printable(name))
        elif named_like_an_image(name):
            images.append(place)
        else:
            unknown.append(place)
    for place, head in zip(unknown, heads(unknown), strict=True):
        reason = head if isinstance(head, str) else no_image(names[place], head)
        if reason is None:
            images.append(place)
        else:
            account.pass_over(reason, printable(names[place]))
    images.sort(key=names.__getitem__)
    return images


def labels_of(path: str, names: Sequence[bytes], expected: str = LAYOUT) -> tuple[np.ndarray, list[bytes]]:
    """Labels int64 [N] and folders, which are the identities, of sorted names IDENTITY/IMAGE."""
    folders = [name.rpartition(b"/")[0] for name in names]
    if b"" in folders:
        first, more = printable(names[folders.index(b"")]), folders.count(b"") - 1
        raise ValueError(
            f"{printable(path)} holds {first} outside any identity folder{f', and {more} more' if more else ''}; expected {expected}."
        )
    identities = sorted(set(folders))
    label_of = {identity: label for label, identity in enumerate(identities)}
    return np.fromiter((label_of[folder] for folder in folders), np.int64, len(folders)), identities


def without_images(folders: Iterable[bytes], identities: Iterable[bytes], account: Account) -> None:
    """Accounts for the folders that would be identities but hold neither an image nor a folder."""
    outer, known = set(), set(identities)
    inner = {folder for folder in folders if aside(folder + b"/") is None}
    for folder in inner:
        while folder := folder.rpartition(b"/")[0]:
            outer.add(folder)
    for folder in sorted((inner | known) - outer - known - {b""}):
        account.pass_over("identity folder without an image", printable(folder))


def pass_over_links(path: str, names: Iterable[bytes], account: Account) -> None:
    """Accounts for links that lead nowhere. ValueError for those whose names have no extension: they may be folders of identities, such
    as those of a disk that is not mounted."""
    folders = []
    for name in names:
        if _EXTENSION.search(name.lower()) is None and aside(name + b"/") is None:
            folders.append(name)
        else:
            account.pass_over(NOWHERE, printable(name))
    if folders:
        raise ValueError(
            f"{len(folders)} symbolic link(s) of {printable(path)} lead nowhere and may be folders of identities, the first is "
            f"{printable(min(folders))}: mend or remove them."
        )


def no_images(path: str, account: Account, meant: str) -> ValueError:
    """For a set that holds none; `meant` says what was probably meant, or is empty."""
    reasons = [f"{passed.count} {reason}, such as {passed.examples[0]}" for reason, passed in account.passed_over.items()]
    seen = "; ".join([*reasons[:_REASONS], "..."] if len(reasons) > _REASONS else reasons)
    return ValueError(f"{printable(path)} holds no images{f' ({seen})' if seen else ''}; {meant or f'expected {LAYOUT}.'}")
