"""Two checkpoints side by side: what they say, and all their tensors, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.first_format import FirstCheckpoint
from pipeline.checkpoint.reading import Checkpoint

ELEMENTS = 1 << 22  # compared at a time: 32 MiB in each of two float64 copies
OF_THE_FILES = ("format", "files")  # entries of `info` that say how a checkpoint lies there, not what it is
OF_THE_MOMENT = ("when", "host", "owner")  # these differ between two runs that are equal to the bit, and so does where they are
PLACES = ("run.folder", "checkpoint.folder")
Pair = tuple[Any, Any]


def said(first: Checkpoint, second: Checkpoint) -> tuple[dict[str, Pair], dict[str, Pair]]:
    """Entries of the infos, and options of the configurations as section.field, that differ. None stands for what one does not have."""
    ours, theirs = ({key: value for key, value in saved.info.items() if key not in (*OF_THE_FILES, "config")} for saved in (first, second))
    return _unequal(ours, theirs), _unequal(flat(first.info.get("config", {})), flat(second.info.get("config", {})))


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration as section.field: value."""
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.")
    return found


def _unequal(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Pair]:
    keys = [*first, *(key for key in second if key not in first)]
    # By their text, for a NaN is not equal to itself.
    return {key: (first.get(key), second.get(key)) for key in keys if repr(first.get(key)) != repr(second.get(key))}


def kinds(first: Checkpoint, second: Checkpoint) -> dict[str, Pair]:
    """dtype and shape of tensors that differ in it, or that one of the two does not have."""

    def kind(saved: Checkpoint, name: str) -> str | None:
        return f"{str(saved.dtype(name)).removeprefix('torch.')} {list(saved.shape(name))}" if name in saved else None

    return {name: (kind(first, name), kind(second, name)) for name in sorted({*first, *second}) if kind(first, name) != kind(second, name)}


def contents(first: Checkpoint, second: Checkpoint, done: Callable[[int], None] = lambda count: None) -> dict[str, float]:
    """By name of a tensor of one kind in both, the largest absolute difference of its elements, where any bit differs: 0 where only the
    signs of zeros do. `done` is told of bytes. DamagedError, if what is read is not what was written."""
    found = {}
    for name in sorted({*first} & {*second}):
        if first.shape(name) == second.shape(name) and first.dtype(name) == second.dtype(name):
            differences = [_largest(ours, theirs) for ours, theirs in _blocks(first, second, name, done)]
            unequal = [difference for difference in differences if difference is not None]
            if unequal:
                found[name] = math.nan if any(map(math.isnan, unequal)) else max(unequal)
    return found


def _blocks(first: Checkpoint, second: Checkpoint, name: str, done: Callable[[int], None]) -> Iterator[tuple[Tensor, Tensor]]:
    for start, count in _ranges(first, second, name):
        pair = torch.empty(count, dtype=first.dtype(name)), torch.empty(count, dtype=first.dtype(name))
        for saved, out in zip((first, second), pair, strict=True):
            saved.fill(name, out, start)
        for at in range(0, count, ELEMENTS):
            yield pair[0][at : at + ELEMENTS], pair[1][at : at + ELEMENTS]
        done(count * pair[0].itemsize)


def _ranges(first: Checkpoint, second: Checkpoint, name: str) -> list[tuple[int, int]]:
    """First element and count of what is read at a time; of format 1 what a rank wrote, because nothing less can be read of it."""
    for saved in (first, second):
        if isinstance(saved, FirstCheckpoint):
            return [(start, count) for start, count, *_ in saved.pieces[name] if count]
    elements = math.prod(first.shape(name))
    return [(start, min(ELEMENTS, elements - start)) for start in range(0, elements, ELEMENTS)]


def _largest(first: Tensor, second: Tensor) -> float | None:
    """None where all bits are the same."""
    ours, theirs = first.view(torch.uint8), second.view(torch.uint8)
    words = len(ours) // 8 * 8  # torch compares element by element: eight bytes at a time
    if torch.equal(ours[:words].view(torch.int64), theirs[:words].view(torch.int64)) and torch.equal(ours[words:], theirs[words:]):
        return None
    return float((first.double() - second.double()).abs().max())


def identities(first: Checkpoint, second: Checkpoint) -> dict[str, Any] | None:
    """None where both have the same names in the same order, or neither has any."""
    ours, theirs = first.identities(), second.identities()
    if ours == theirs:
        return None
    only = [sorted(set(one or []) - set(other or [])) for one, other in ((ours, theirs), (theirs, ours))]
    counts = [None if names is None else len(names) for names in (ours, theirs)]
    return {"counts": counts, "only_in_one": [len(names) for names in only], "first_of_these": [names[:3] for names in only]}
