"""What results call the evaluation sets of a run: as short as tells them apart, also in names of files and TensorBoard's tags."""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter
from collections.abc import Sequence

LONGEST = 200  # bytes of a file's name, of which 255 are possible, and what is added takes some
CURVES, HARD_PAIRS = "curves-{}.npz", "hard-pairs-{}.json"  # files in a run's folder, by `file_name`
AVERAGED = "_ema"  # ends the names under which averaged weights are evaluated


def set_names(paths: Sequence[str]) -> list[str]:
    """One name for each path: "lfw" for data/lfw.bin. Of sets whose names would be alike each gets its extension, then one more folder,
    and so on: "test.tar" and "test.bin", "a/lfw" and "b/lfw".

    ValueError where two paths lead to the same file or folder, which would be evaluated twice."""
    _check_distinct(paths)
    forms = [_forms(path, number) for number, path in enumerate(paths, start=1)]
    chosen = [0] * len(paths)
    while True:
        names = [form[at] for form, at in zip(forms, chosen, strict=True)]
        taken = Counter(_as_seen(result) for name in names for result in (name, name + AVERAGED))
        alike = [at for at, name in enumerate(names) if taken[_as_seen(name)] > 1 or taken[_as_seen(name + AVERAGED)] > 1]
        longer = [at for at in alike if chosen[at] + 1 < len(forms[at])]
        if not longer:
            return names
        for at in longer:
            chosen[at] += 1


def file_name(name: str) -> str:
    """The name without what file systems and TensorBoard's tags have no place for. A long one ends with a checksum instead."""
    short = re.sub(r"[^\w.-]", "-", name)
    return (
        short
        if len(short.encode()) <= LONGEST
        else f"{short.encode()[: LONGEST - 9].decode(errors='ignore')}-{zlib.crc32(short.encode()):08x}"
    )


def _as_seen(name: str) -> str:
    """Names that are equal here could be one on some file system."""
    return file_name(name).casefold()


def _forms(path: str, number: int) -> list[str]:
    """Names of one set, from the shortest to its whole path; the last has its number among the sets, for folders x and x_ema side by side.
    A list of sets, separated by commas, is called by all of them."""
    parts = [os.path.abspath(part).split("/") for part in path.split(",")]
    forms = []
    for depth in range(1, max(map(len, parts)) + 1):
        whole = ["/".join(part[-depth:]) for part in parts]
        forms += ["+".join(os.path.splitext(name)[0] for name in whole), "+".join(whole)]
    forms.append(f"{forms[0]}#{number}")
    return [form.encode(errors="backslashreplace").decode() for form in dict.fromkeys(forms)]  # metrics and figures hold UTF-8 only


def _check_distinct(paths: Sequence[str]) -> None:
    seen: dict[object, str] = {}
    for path in paths:
        key = _identity(path)
        if key in seen:
            other = f" and {path} are" if seen[key] != path else " is named twice:"
            raise ValueError(f"evaluation: {seen[key]}{other} the same set; name it once in evaluation.data, pairs and protocols")
        seen[key] = path


def _identity(path: str) -> object:
    """What is equal for two names of one file or folder: links lead to it, and it may be mounted twice."""
    try:
        status = os.stat(path)
    except OSError:  # a list of sets, or an address
        return path
    return status.st_dev, status.st_ino
