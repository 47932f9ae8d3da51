"""How figures are called and written in the page's tables and sentences, and the key of its curves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.charts import sample
from pipeline.report.entries import Entry
from pipeline.report.html import Safe, image, joined, table, tag

MOST_ROWS = 60  # of a table of a protocol
NAMES = {
    "eer": "EER",
    "threshold_at_eer": "threshold at the EER",
    "threshold_std": "spread of thresholds",
    "rank1": "rank-1",
    "rank5": "rank-5",
    "rank10": "rank-10",
    "opis": "OPIS",
}
COLUMNS = {"eer": "EER", "threshold": "own threshold", "far_at_common": "FAR*", "tar_at_common": "TAR*"}
COMMON = "*: at the threshold that all have in common."


def title_of(name: str) -> str:
    """ "tar_at_far/1e-3" -> "TAR at FAR 1e-3"."""
    group, _, rate = name.rpartition("/")
    kind, _, at = group.partition("_at_")
    if at and re.fullmatch(r"[\d.e-]+", rate):
        return f"{kind if kind == 'threshold' else kind.upper()} at {at.upper()} {rate}"
    return NAMES.get(name, name.replace("_", " "))


def of_entry(entry: Entry, figure: str, mark: str = "", nothing: str = "-") -> Safe:
    """The newest value of a figure, below it its interval."""
    return of_value(entry.newest.values.get(figure), entry.newest.intervals.get(figure), mark, nothing)


def of_value(value: Any, interval: tuple[float, float] | None = None, mark: str = "", nothing: str = "-") -> Safe:
    if value is None:
        return joined([nothing])
    shown = f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)[:200]
    return joined([f"{mark}{shown}", tag("small", f"{interval[0]:.4f} to {interval[1]:.4f}") if interval else ""], "")


def in_words(value: float | None, interval: tuple[float, float] | None) -> str:
    shown = "unreached" if value is None else f"{value:.4f}"
    return f"{shown} ({interval[0]:.4f} to {interval[1]:.4f})" if interval else shown


def key(styles: Mapping[str, Mapping[str, Any]]) -> Safe:
    """Which curve is whose, by label, where there are several."""
    if len(styles) < 2:
        return Safe("")
    return tag("ul", *(tag("li", image(sample(style), ""), label) for label, style in styles.items()), class_="key")


def of_rows(rows: Sequence[Mapping[str, Any]]) -> Safe:
    """A table of a report."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    notes = [f"The first {MOST_ROWS} of {len(rows):,} rows."] if len(rows) > MOST_ROWS else []
    notes += [COMMON] if "far_at_common" in names else []
    heads = [COLUMNS.get(name, str(name).replace("_", " ")) for name in names]
    return table(heads, [[of_value(row.get(name)) for name in names] for row in rows[:MOST_ROWS]], " ".join(notes))
