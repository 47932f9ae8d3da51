"""What the page says first: how good each run is on each set, and whether one is better than the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.all_pairs import KEPT
from pipeline.report.cells import in_words, of_entry, title_of
from pipeline.report.entries import HIGHER, LOWER, Best, Entry, are_of_one_set, best_of, main_figures
from pipeline.report.html import Safe, joined, table, tag

COUNTS = {"images": "images", "identities": "identities", "genuine_pairs": "genuine pairs", "impostor_pairs": "impostor pairs"}

TOO_LARGE = f"sets of more than {KEPT:,} pairs have none, unless protoshard eval --resamples is asked for them"


def verdict(sets: Mapping[str, Sequence[Entry]]) -> Safe:
    """A sentence and a short table for each set."""
    if not sets:
        return tag("p", "There is no evaluation, so nothing can be said of how good the models are on other identities.", class_="lead")
    parts: list[Safe] = []
    for name, entries in sets.items():
        comparable = are_of_one_set(entries)
        shown = main_figures(entries)
        best = {figure: best_of(figure, entries) if comparable else None for figure in shown}
        parts += [tag("h3", name), tag("p", _sentence(entries, shown, best, comparable), class_="lead"), _short(entries, shown, best)]
    return joined(parts)


def _sentence(entries: Sequence[Entry], shown: Sequence[str], best: Mapping[str, Best | None], comparable: bool) -> str:
    if not shown:
        return "Its figures are below."
    figure = "eer" if "eer" in shown else shown[0]
    if len(entries) == 1:
        (entry,) = entries
        first, newest = entry.evaluations[0], entry.newest
        value = f"{title_of(figure)} {in_words(newest.values.get(figure), newest.intervals.get(figure))} at step {newest.step:,}"
        before = first.values.get(figure)
        return f"{value}." if first is newest or before is None else f"{value}, from {before:.4f} at step {first.step:,}."
    if not comparable:
        return "Not compared: these runs did not see the same images there, or not in the same way (mirror image, protocol)."
    found = best[figure]
    if found is None:
        return f"No single run has the best {title_of(figure)}."
    newest = found.entry.newest
    value = f"{found.entry.label} has the best {title_of(figure)}, {in_words(newest.values[figure], newest.intervals.get(figure))}"
    if found.is_clear:
        return f"{value}. Its interval overlaps with that of no other run."
    if found.has_intervals:
        return f"{value}. Intervals overlap, so the difference may be chance."
    return f"{value}. Without intervals of all, nothing tells whether that is chance."


def _short(entries: Sequence[Entry], shown: Sequence[str], best: Mapping[str, Best | None]) -> Safe:
    rows = []
    for entry in entries:
        row: list[Any] = [entry.label, f"{entry.newest.step:,}"]
        for figure in shown:
            found = best[figure]
            if found is None or found.entry is not entry:
                row.append(of_entry(entry, figure, nothing="unreached" if "_at_" in figure else "-"))
            elif found.is_clear:
                row.append(tag("td", of_entry(entry, figure, "★ "), class_="n best"))
            else:
                row.append(tag("td", of_entry(entry, figure, "☆ "), class_="n first"))
        rows.append(row)
    values = entries[0].newest.values
    notes = [_sizes(values)] if _sizes(values) else []
    is_large = values.get("genuine_pairs", 0) + values.get("impostor_pairs", 0) > KEPT
    missing = f"No intervals are kept{f': {TOO_LARGE}' if is_large else ''}."
    notes.append("Below a figure its 95 % interval." if any(entry.newest.intervals for entry in entries) else missing)
    if any(best.values()):
        notes.append(
            "★: the best, and its interval overlaps with that of no other run (a cautious test). ☆: the best, which may be chance."
        )
    heads = [
        f"{title_of(figure)} {'↓' if LOWER.fullmatch(figure) else '↑' if HIGHER.fullmatch(figure) else ''}".strip() for figure in shown
    ]
    return table(["run", "step", *heads], rows, " ".join(notes))


def _sizes(values: Mapping[str, float]) -> str:
    counts = [f"{values[name]:,.0f} {what}" for name, what in COUNTS.items() if name in values]
    return f"{', '.join(counts)}." if counts else ""
