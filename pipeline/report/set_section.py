"""The section of an evaluation set: over the training, ROC, DET and scores, tables, groups, hard pairs. And one threshold for all sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dali_loaders.names import printable
from pipeline.evaluation import figures
from pipeline.evaluation.curves_so_far import Curve, labelled
from pipeline.evaluation.report import ALWAYS, FARS
from pipeline.evaluation.set_names import AVERAGED
from pipeline.report.cells import key, of_entry, of_rows, of_value, title_of
from pipeline.report.charts import MOST_NAMED, Line, address, over_steps, style_of
from pipeline.report.entries import Entry, main_figures
from pipeline.report.html import Safe, image, joined, table, tag
from pipeline.report.run_files import RunFiles, jpeg_of
from pipeline.report.thresholds import stability

FIRST_PAIRS = 8  # of each kind that are in sight
MOST_BANDS = 4  # curves with intervals as bands
PICTURES = 2_500_000  # bytes that hard pairs take of a page
TABLES = {"thresholds": "thresholds of parts of the set"}


class Budget:
    """Bytes that are left for pictures."""

    def __init__(self, left: int = PICTURES) -> None:
        self.left = left

    def takes(self, size: int) -> bool:
        """Whether so many are left; then they are taken."""
        fits = size <= self.left
        self.left -= size * fits
        return fits


def of_set(name: str, entries: Sequence[Entry], runs: Sequence[RunFiles], pictures: Budget) -> Safe:
    styles = {entry.label: style_of(runs.index(entry.run), entry.is_averaged) for entry in entries}
    whose = {entry.label: f"{entry.label}: " if len(entries) > 1 else "" for entry in entries}
    parts: list[Safe] = [key(styles), _over_steps(entries, styles), _curves(name, entries, styles)]
    parts += [tag("h3", "Operating points"), _operating_points(entries), tag("h3", "Other figures"), _others(entries)]
    for entry in entries:
        parts += _groups(entry, whose[entry.label])
    tables = [
        tag("div", _heading(whose[entry.label], TABLES.get(title, title.replace("_", " "))), of_rows(rows))
        for entry in entries
        for title, rows in entry.newest.tables.items()
    ]
    parts += [tag("div", *tables, class_="beside")] if tables else []
    for entry in entries:
        parts += _pairs(entry, whose[entry.label], pictures)
    return joined(parts)


def one_threshold(runs: Sequence[RunFiles]) -> Safe:
    """Of each run with several sets; nothing where there is none."""
    parts = []
    for run in runs:
        newest = {name: curves[max(curves)] for name, curves in run.curves.items() if not name.endswith(AVERAGED)}
        shared = _shared(newest, "sets")
        parts += [tag("h3", run.label), shared] if shared else []
    return joined(parts)


def _shared(curves: Mapping[str, Curve], what: str) -> Safe:
    whole = {name: curve for name, curve in curves.items() if _has_scores(curve)}
    if len(whole) < 2:
        return Safe("")
    common, rows = stability(whole)
    own = [row["threshold"] for row in rows]
    said = (
        f"The best single threshold is {common:.3f}, where the mean false accept rate of the {what} and their mean false reject rate meet, "
        f"to within 1/128. Their own thresholds, at the EER, run from {min(own):.3f} to {max(own):.3f} "
        f"(standard deviation {np.std(own):.3f})."
    )
    return joined([tag("p", said), of_rows(rows)])


def _has_scores(curve: Curve) -> bool:
    return curve.histograms is not None and curve.threshold_at_eer is not None and bool(curve.histograms.sum(axis=1).all())


def _over_steps(entries: Sequence[Entry], styles: Mapping[str, Mapping[str, Any]]) -> Safe:
    if all(len(entry.evaluations) < 2 for entry in entries):
        return Safe("")
    drawn, has_bands = [], False
    for figure in main_figures(entries):
        lines = []
        for entry in entries:
            known = [one for one in entry.evaluations if figure in one.values]
            if known:
                ends = np.array([one.intervals.get(figure, (np.nan, np.nan)) for one in known])
                steps, values = np.array([one.step for one in known]), np.array([one.values[figure] for one in known], float)
                band = () if entry.is_averaged or len(entries) > MOST_BANDS or np.isnan(ends).all() else (ends[:, 0], ends[:, 1])
                has_bands |= bool(band)
                lines.append(Line(entry.label, steps, values, styles[entry.label], *band))
        said = "; ".join(f"{line.label}: {line.value_n[-1]:.4f} at step {line.step_n[-1]:,}" for line in lines)
        drawn.append(_figure(over_steps(lines, title_of(figure), marked=True), f"{title_of(figure)} over steps. {said}"))
    but = ", which averaged weights are drawn without" if any(entry.is_averaged for entry in entries) else ""
    note = tag("p", f"Bands are 95 % intervals{but}.", class_="dim") if has_bands else ""
    return joined([tag("h3", "Over the training"), tag("div", *drawn, class_="figures"), note])


def _curves(name: str, entries: Sequence[Entry], styles: Mapping[str, Mapping[str, Any]]) -> Safe:
    if len(entries) > 1:
        shown: dict[str, Curve] = {entry.label: entry.curve for entry in entries if entry.curve}
    else:
        shown, styles = labelled(entries[0].curves) if entries[0].curves else {}, {}
    if not shown:
        return tag("p", "No ROC and DET curves are kept.")
    eers = "; ".join(f"{label}: EER {curve.eer:.4f}" for label, curve in shown.items())
    roc, det = figures.roc_figure(shown, "ROC", styles), figures.det_figure(shown, "DET", styles)
    for figure in (roc, det):
        if len(shown) > MOST_NAMED and (legend := figure.axes[0].get_legend()):  # it would cover the curves
            legend.remove()
    drawn = [
        _figure(roc, f"ROC of {name}: true over false accept rate, which is logarithmic. {eers}"),
        _figure(det, f"DET of {name}: FNMR over FMR, both logarithmic. {eers}"),
    ]
    for entry in entries:
        curve = entry.curve
        if curve is not None and _has_scores(curve):
            said = f"Histograms of genuine and impostor cosines of {entry.label} on {name}; the EER is at {curve.threshold_at_eer:.3f}"
            drawn.append(_figure(figures.score_figure(curve, "cosines"), said, entry.label if len(entries) > 1 else ""))
    return joined([tag("h3", "ROC, DET and scores"), tag("div", *drawn, class_="figures wide")])


def _operating_points(entries: Sequence[Entry]) -> Safe:
    reached = [place for place, far in enumerate(FARS) if any(f"tar_at_far/{far}" in entry.newest.values for entry in entries)]
    if not reached:
        return tag("p", "The protocol has none.")
    names = list(FARS)[: max(ALWAYS, reached[-1] + 1)]
    parts = []
    for kind, title in (("tar_at_far", "TAR at FAR"), ("threshold_at_far", "threshold at FAR")):
        rows = [[far, *(of_entry(entry, f"{kind}/{far}", nothing=_nothing(entry, far)) for entry in entries)] for far in names]
        if any(f"{kind}/{far}" in entry.newest.values for entry in entries for far in names):  # the first versions kept no thresholds
            parts.append(table([title, *(entry.label for entry in entries)], rows))
    return joined([tag("div", *parts, class_="beside"), tag("p", "FNMR is 1 - TAR. Thresholds are cosines.", class_="dim")])


def _nothing(entry: Entry, far: str) -> str:
    tar = entry.newest.values.get(f"tar_at_far/{far}")
    return "unreached" if tar is None else "accepts nothing" if tar == 0 else "not kept"


def _others(entries: Sequence[Entry]) -> Safe:
    groups = tuple(f"{group}/" for entry in entries for group in _group_names(entry))
    known = dict.fromkeys(name for entry in entries for name in entry.newest.values)
    names = [name for name in known if not name.startswith((*groups, "tar_at_far/", "fnmr_at_fmr/", "threshold_at_far/"))]
    rows = [[title_of(name), *(of_entry(entry, name) for entry in entries)] for name in names]
    return table(["figure", *(entry.label for entry in entries)], rows)


def _group_names(entry: Entry) -> list[str]:
    return [name.removesuffix("/eer") for name in entry.newest.values if name.endswith("/eer")]


def _groups(entry: Entry, whose: str) -> list[Safe]:
    names = _group_names(entry)
    if not names:
        return []
    values, intervals = entry.newest.values, entry.newest.intervals
    own = [key.removeprefix(f"{name}/") for name in names for key in values if key.startswith(f"{name}/")]
    figures_of = [figure for figure in dict.fromkeys(own) if not figure.startswith("fnmr_at_fmr/")]
    rows = [
        [title_of(figure), *(of_value(values.get(f"{name}/{figure}"), intervals.get(f"{name}/{figure}")) for name in names)]
        for figure in figures_of
    ]
    parts = [_heading(whose, "groups"), table(["figure", *names], rows)]
    if curves := entry.curve.groups if entry.curve else {}:
        titles = (("ROC of groups", figures.roc_figure), ("DET of groups", figures.det_figure))
        drawn = [_figure(draw(curves, title), f"{title}: {', '.join(curves)}") for title, draw in titles]
        parts += [tag("div", *drawn, class_="figures wide"), _shared(curves, "groups")]
    return parts


def _pairs(entry: Entry, whose: str, pictures: Budget) -> list[Safe]:
    parts: list[Safe] = []
    for kind, what in (("genuine", "genuine pairs that look most different"), ("impostor", "impostor pairs that look most alike")):
        pairs = [pair for pair in _list(entry.pairs.get(kind)) if isinstance(pair, dict) and jpeg_of(pair)]
        if not pairs:
            continue
        parts.append(_heading(whose, what))
        if not pictures.takes(sum(len(pair["jpeg"]) for pair in pairs)):
            parts.append(tag("p", "Left out, so that the page stays below 5 MB: make one of fewer runs."))
            continue
        shown = [_pair(kind, pair) for pair in pairs]
        parts.append(tag("div", *shown[:FIRST_PAIRS], class_="pairs"))
        if shown[FIRST_PAIRS:]:
            rest = tag("div", *shown[FIRST_PAIRS:], class_="pairs")
            parts.append(tag("details", tag("summary", f"{len(shown) - FIRST_PAIRS} more"), rest))
    step, images = entry.pairs.get("step"), entry.pairs.get("images")
    if parts and isinstance(step, int) and isinstance(images, int):
        parts.append(tag("p", f"At step {step:,}, among {images:,} images. No image is in two pairs of a kind.", class_="dim"))
    return parts


def _pair(kind: str, pair: Mapping[str, Any]) -> Safe:
    names = [printable(str(name))[:80] for name in _list(pair.get("identities"))[:2]]
    cosine = pair.get("cosine")
    shown = f"{cosine:.3f}" if isinstance(cosine, float) else ""
    alt = f"{kind} pair of {' and '.join(dict.fromkeys(names))}, cosine {shown}"
    caption = tag("figcaption", tag("b", shown), " ", " / ".join(dict.fromkeys(names)))
    return tag("figure", image(f"data:image/jpeg;base64,{jpeg_of(pair)}", alt), caption)


def _heading(whose: str, what: str) -> Safe:
    return tag("h3", f"{whose}{what}" if whose else f"{what[:1].upper()}{what[1:]}")


def _figure(figure: Figure, alt: str, caption: str = "") -> Safe:
    return tag("figure", tag("figcaption", caption) if caption else "", image(address(figure), alt))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
