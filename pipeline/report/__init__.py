"""One page of one run or several, by `protoshard report`: HTML in one file that loads nothing, to be read, printed and sent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from dali_loaders.names import printable, quoted
from dali_loaders.outputs import check_file
from dali_loaders.progress import announce
from pipeline.report import added, page, run_files
from pipeline.report.html import MARK

__all__ = ["write"]


def write(runs: Sequence[str], out: str, more: Sequence[str] = ()) -> int:
    """Writes the page of the runs in these folders, and of the files `more` that `protoshard eval --json` made. Returns its bytes.

    Nothing is written into a run's folder, unless `out` lies there. ValueError for what is no run, for a run that is named twice, for a
    file of another form or of none of the runs, and where `out` cannot be written or is something else than such a page."""
    check_file(out, "--out", ".html", ".htm")
    if os.path.exists(out) and os.path.getsize(out) and not _is_ours(out):
        raise ValueError(f"--out: {quoted(out)} is there already, and no page of protoshard report: choose another name.")
    read = []
    for path, label in zip(runs, labels(runs), strict=True):
        announce(f"reading {label}")
        read.append(run_files.read(path, label))
    for path in more:
        added.add(path, read)
    announce("drawing")
    content = page.made_of(read).encode()
    temporary = f"{out}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.replace(temporary, out)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        raise ValueError(f"--out: {quoted(out)} cannot be written ({error.strerror}): choose another place.") from None
    return len(content)


def labels(paths: Sequence[str]) -> list[str]:
    """What the page calls each run: the name of its folder, with as many folders above it as tell it from the others. ValueError where one
    folder is named twice."""
    parts = []
    for path in paths:
        whole = os.path.realpath(path)
        if whole in parts:
            raise ValueError(f"{quoted(path)} is named twice; name each run once")
        parts.append(whole)
    split = [whole.split("/")[1:] for whole in parts]
    depths = [1] * len(parts)
    while True:
        names = ["/".join(one[-depth:]) for one, depth in zip(split, depths, strict=True)]
        alike = [at for at, name in enumerate(names) if names.count(name) > 1 and depths[at] < len(split[at])]
        if not alike:
            return [printable(name) or "/" for name in names]
        for at in alike:
            depths[at] += 1


def _is_ours(path: str) -> bool:
    with suppress(OSError), open(path, "rb") as file:
        return f'content="{MARK}"'.encode() in file.read(1024)
    return False
