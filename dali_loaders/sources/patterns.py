"""Several files by one pattern: {000..127} and {a,b} as a shell expands them, * ? [] as it finds files; none may be missing."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise

from dali_loaders.sources.by_name import aside

_MOST = 100_000  # names of one pattern; more is a mistake in it
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_NUMBER_OF = re.compile(r"^(.*?)(\d+)-of-(\d+)(\D*)$")  # Hugging Face and TensorFlow say how many there are

log = logging.getLogger(__name__)


def is_pattern(path: str) -> bool:
    """Whether a path stands for several; no file has that very name."""
    return any(sign in path for sign in "{*?[") and not os.path.lexists(path)


def expand(pattern: str) -> list[str]:
    """The paths that a pattern stands for: braces in their order, what is found in sorted order.

    ValueError if nothing matches, or a file that braces name is missing. Addresses with :// are only expanded, not looked for."""
    names = braces(pattern)
    if "://" in pattern:
        return names
    paths, missing = [], []
    for name in names:
        if os.path.lexists(name):
            paths.append(name)
        elif glob.has_magic(name) and (found := _found(name)):
            paths += found
        else:
            missing.append(name)
    if missing:
        if len(names) == 1:
            raise ValueError(f"{pattern} matches no file; check its folder and its name.")
        raise ValueError(
            f"{len(missing)} of the {len(names)} files of {pattern} are missing, the first is {missing[0]}; copy them, or leave their "
            "numbers out."
        )
    check_numbers(pattern, paths)
    return paths


def braces(pattern: str) -> list[str]:
    """What a pattern's braces stand for, in their order. ValueError if that is too much."""
    names = list(islice(_braces(pattern), _MOST + 1))
    if len(names) > _MOST:
        raise ValueError(f"{pattern} stands for more than {_MOST:,} files; check the numbers in its braces.")
    return names


def tars_in(folder: str) -> list[str]:
    """Paths of the tars of a folder that holds no folders, sorted; none of another one. ValueError if shards are missing."""
    with os.scandir(folder) as listing:
        entries = [entry for entry in listing if aside(os.fsencode(entry.name) + b"/") is None]
    if any(entry.is_dir() for entry in entries):
        return []
    paths = sorted(os.path.join(folder, entry.name) for entry in entries if entry.name.lower().endswith(".tar"))
    check_numbers(folder, paths)
    return paths


def check_numbers(shown_as: str, paths: Sequence[str]) -> None:
    """ValueError if names say 00003-of-00128 and one of the 128 is not there; for other gaps in numbers a warning."""
    numbers: dict[tuple[str, str, str], set[int]] = {}
    for path in paths:
        if match := _NUMBER_OF.match(path):
            numbers.setdefault((match[1], match[3], match[4]), set()).add(int(match[2]))
        elif match := re.match(r"^(.*?)(\d+)(\D*)$", path):
            numbers.setdefault((match[1], "", match[3]), set()).add(int(match[2]))
    for (before, total, after), present in numbers.items():
        first = 0 if total and 0 in present else min(present)
        gaps = sorted(set(range(first, first + int(total) if total else max(present))) - present) if max(present) < _MOST else []
        if gaps and total:
            raise ValueError(
                f"{shown_as} lacks {len(gaps)} of {int(total)} files {before}N-of-{total}{after}, the first is number {gaps[0]}; "
                "copy them too."
            )
        if gaps:
            log.warning(
                "%s: of the numbered files %sN%s %d are not there, the first is number %d", shown_as, before, after, len(gaps), gaps[0]
            )


def _found(pattern: str) -> list[str]:
    """Sorted; without the caches that this project keeps beside sets."""
    found = sorted(glob.glob(pattern, recursive=True))
    return [path for path in found if not (path.endswith(".cache") and os.path.exists(path.removesuffix(".cache")))]


def _braces(pattern: str) -> Iterator[str]:
    start = pattern.find("{")
    while start >= 0:
        end, parts = _group(pattern, start)
        if parts is not None:
            for part in parts:
                for inner in _braces(part):
                    for rest in _braces(pattern[end:]):
                        yield pattern[:start] + inner + rest
            return
        start = pattern.find("{", start + 1)
    yield pattern


def _group(pattern: str, start: int) -> tuple[int, Iterable[str] | None]:
    """(place after the brace that closes the one at `start`, alternatives); None for braces that a shell would leave as they are."""
    depth, cuts = 0, [start]
    for at in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[at], 0)
        if depth == 0 or (depth == 1 and pattern[at] == ","):
            cuts.append(at)
        if depth == 0:
            break
    if depth:
        return start, None
    if match := _RANGE.fullmatch(pattern[start + 1 : cuts[-1]]):
        return cuts[-1] + 1, _numbers(match[1], match[2])
    if len(cuts) == 2:
        return start, None
    return cuts[-1] + 1, [pattern[a + 1 : b] for a, b in pairwise(cuts)]


def _numbers(first: str, last: str) -> Iterator[str]:
    """With leading zeros where one of the two has them."""
    width = max(len(first), len(last)) if first[0] == "0" or last[0] == "0" else 0
    step = 1 if int(first) <= int(last) else -1
    return (f"{number:0{width}}" for number in range(int(first), int(last) + step, step))
