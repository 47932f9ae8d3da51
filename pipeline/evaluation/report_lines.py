"""A report as people read it on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pipeline.evaluation.report import Report

WIDTH = 120  # columns of groups side by side
NOT_KNOWN = ("identities", "rank1")  # None where a protocol has no such thing; every other None is unreached
NARROWEST = 17  # of one of them, for "accepts nothing"


def lines(report: Report) -> Iterator[str]:
    """A line for each figure and threshold, with its interval; then the groups."""
    shown = _shown(report)
    first = _first_column([shown])
    for name, value in shown.items():
        interval = report.intervals.get(name)
        yield f"{name.replace('/', '='):{first}}{value}" + (f"  ({interval[0]:.4f} to {interval[1]:.4f})" if interval else "")
    yield from _side_by_side({name: _shown(group, short=True) for name, group in report.groups.items()})


def _side_by_side(groups: dict[str, dict[str, str]]) -> Iterator[str]:
    """As many groups as there is room for, without their intervals, then more."""
    first = _first_column(groups.values())
    width = max([NARROWEST, *(len(name) + 2 for name in groups)])
    at_once = max(1, (WIDTH - first) // width)
    names = list(groups)
    for start in range(0, len(names), at_once):
        block = names[start : start + at_once]
        yield "\n" + " " * first + "".join(f"{name:{width}}" for name in block).rstrip()
        for figure in dict.fromkeys(figure for name in block for figure in groups[name]):
            values = "".join(f"{groups[name].get(figure, '-'):{width}}" for name in block)
            yield f"{figure.replace('/', '='):{first}}{values}".rstrip()


def _first_column(columns: Iterable[Iterable[str]]) -> int:
    return max([28, *(len(name) + 2 for column in columns for name in column)])


def _shown(report: Report, short: bool = False) -> dict[str, str]:
    """Figures and thresholds by name, as people read them."""
    numbers = {**report.figures, **report.thresholds}
    found = {}
    for name, value in numbers.items():
        if value is None and name in NOT_KNOWN:
            continue
        unreached = numbers.get(name.replace("threshold", "tar")) is None
        missing = "unreached" + ": too few impostor pairs" * (not short) if unreached else "accepts nothing"
        found[name] = missing if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
    return found
