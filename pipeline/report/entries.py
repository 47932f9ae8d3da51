"""The results of several runs set against each other: which belong to the same set, which is best, and whether that is more than chance."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.curves_so_far import Curve
from pipeline.evaluation.set_names import AVERAGED
from pipeline.report.run_files import Evaluation, RunFiles

MAIN = ("accuracy", "eer", "tar_at_far/1e-2", "tar_at_far/1e-3", "tar_at_far/1e-4", "tar_at_far/1e-6", "rank1", "opis")
MOST_MAIN = 7
LOWER = re.compile(r"(.*/)?(eer|opis|std|threshold_std|spread|spread_std|(fnmr|fnir|fpir)(_at_.*)?)")  # figures of which less is better
HIGHER = re.compile(r"(.*/)?(accuracy|(tar|tpir|dir)(_at_.*)?|rank\d+|top\d+)")
SIZES = ("images", "identities", "genuine_pairs", "impostor_pairs")


@dataclass(frozen=True)
class Entry:
    """The results of one run on one set, of its weights or of their average."""

    label: str
    run: RunFiles
    is_averaged: bool
    evaluations: Sequence[Evaluation]  # steps rising
    curves: Mapping[int, Curve]
    pairs: Mapping[str, Any]

    @property
    def newest(self) -> Evaluation:
        return self.evaluations[-1]

    @property
    def curve(self) -> Curve | None:
        """The newest that is kept."""
        return self.curves[max(self.curves)] if self.curves else None


def by_set(runs: Sequence[RunFiles]) -> dict[str, list[Entry]]:
    """The entries of each set, by its name, in the order of the runs."""
    sets: dict[str, list[Entry]] = {}
    for run in runs:
        for name, evaluations in run.evaluations.items():
            base = name.removesuffix(AVERAGED)
            is_averaged = base != name and base in run.evaluations
            label = f"{run.label} (averaged weights)" if is_averaged else run.label
            parts = run.curves.get(name, {}), run.pairs.get(name, {})
            sets.setdefault(base if is_averaged else name, []).append(Entry(label, run, is_averaged, evaluations, *parts))
    return sets


def are_of_one_set(entries: Sequence[Entry]) -> bool:
    """Whether all were measured on the same images in the same way, wherever these lie; of earlier versions the sizes are compared."""
    return len({_what(entry.newest) for entry in entries}) == 1 or (
        any(entry.newest.of is None for entry in entries) and len({_sizes(entry.newest) for entry in entries}) == 1
    )


def _what(one: Evaluation) -> str:
    of = {key: value for key, value in (one.of or {}).items() if key not in ("path", "bytes")}
    return repr(sorted(of.items())) if one.of is not None else repr(_sizes(one))


def _sizes(one: Evaluation) -> tuple[float | None, ...]:
    return tuple(one.values.get(name) for name in SIZES)


def main_figures(entries: Sequence[Entry]) -> list[str]:
    """Names of the figures of a short table: the usual ones and, where there are few of these, others of the protocol."""
    names = list(dict.fromkeys(name for entry in entries for name in entry.newest.values))
    chosen = [name for name in MAIN if name in names]
    others = [name for name in names if (LOWER.fullmatch(name) or HIGHER.fullmatch(name)) and name not in MAIN and "fnmr" not in name]
    return (chosen if len(chosen) > 2 else [*chosen, *others])[:MOST_MAIN]


@dataclass(frozen=True)
class Best:
    """The entry with the best value of a figure, and whether its interval overlaps with that of no other run."""

    entry: Entry
    is_clear: bool
    has_intervals: bool  # itself and all that it is compared with


def best_of(figure: str, entries: Sequence[Entry]) -> Best | None:
    """Compared with the entries of other runs; where all are of one run, with these. None where there are no two to compare, where another
    is as good, or where it is not known which way is better."""
    sign = -1 if LOWER.fullmatch(figure) else 1 if HIGHER.fullmatch(figure) else 0
    found = [entry for entry in entries if figure in entry.newest.values]
    if not sign or len(found) < 2:
        return None
    best = max(found, key=lambda entry: sign * entry.newest.values[figure])
    rivals = [entry for entry in found if entry.run is not best.run] or [entry for entry in found if entry is not best]
    if any(entry.newest.values[figure] == best.newest.values[figure] for entry in rivals):
        return None
    own, others = best.newest.intervals.get(figure), [entry.newest.intervals.get(figure) for entry in rivals]
    if own is None or None in others:
        return Best(best, is_clear=False, has_intervals=False)
    return Best(best, all(own[1] < end[0] if sign < 0 else own[0] > end[1] for end in others if end), has_intervals=True)
