"""Figures of evaluations and sets: ROC curves, score histograms, images per identity. They are drawn without pyplot, so that no display or
global state is touched."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from dali_loaders.extras import extra
from pipeline.evaluation.report import HISTOGRAM_EDGES, Report

with extra("train"):
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, PercentFormatter, StrMethodFormatter

LOWEST_FAR = 1e-4  # of an ROC; of a set with more impostor pairs, the lowest power of ten that it reaches
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe & Ito: told apart by colour-blind readers and in grey


def roc_figure(reports: Mapping[str, Report], title: str) -> Figure:
    """TAR over FAR (logarithmic, 1e-4 or less to 1), one curve per named report, its EER in the legend and a dot on the curve."""
    figure, axes = _canvas(title)
    lowest = _lowest_far(reports)
    for i, (name, report) in enumerate(reports.items()):
        far_P, tar_P = _visible(report, lowest)
        color = COLORS[i % len(COLORS)]
        label = f"{name} (EER {report.eer:.2%})"
        axes.plot(far_P, tar_P, color=color, linewidth=1.8, drawstyle="steps-post", label=label, clip_on=False, zorder=3)
        if report.eer >= lowest:
            axes.plot(report.eer, 1 - report.eer, "o", color=color, markersize=5, clip_on=False, zorder=4)
    chance = np.geomspace(lowest, 1, 200)
    axes.plot(chance, chance, color="0.6", linewidth=1, linestyle=":", label="chance")
    axes.set(xscale="log", xlim=(lowest, 1), ylim=(0, 1), xlabel="False accept rate", ylabel="True accept rate")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(edgecolor="none", framealpha=0.85, loc="upper left" if _upper_left_is_free(reports) else "lower right")
    return figure


def det_figure(reports: Mapping[str, Report], title: str) -> Figure:
    """Detection error tradeoff: FNMR over FMR, both logarithmic, one curve per named report. A curve ends where no genuine pair is
    rejected any more; the dots are the EER."""
    figure, axes = _canvas(title)
    lowest = _lowest_far(reports)
    least = min(1 / report.genuine_pairs for report in reports.values())
    for i, (name, report) in enumerate(reports.items()):
        far_P, tar_P = _visible(report, lowest)
        rejects = tar_P < 1
        color = COLORS[i % len(COLORS)]
        label = f"{name} (EER {report.eer:.2%})"
        axes.plot(far_P[rejects], 1 - tar_P[rejects], color=color, linewidth=1.8, drawstyle="steps-post", label=label, zorder=3)
        if report.eer >= lowest:
            axes.plot(report.eer, report.eer, "o", color=color, markersize=5, zorder=4)
    axes.plot([lowest, 1], [lowest, 1], color="0.6", linewidth=1, linestyle=":", label="equal rates")
    axes.set(xscale="log", yscale="log", xlim=(lowest, 1), ylim=(min(0.1, least), 1))
    axes.set(xlabel="False match rate (FMR)", ylabel="False non-match rate (FNMR)")
    axes.legend(edgecolor="none", framealpha=0.85, loc="best")
    return figure


def score_figure(report: Report, title: str) -> Figure:
    """Distributions of genuine and impostor cosines, each with area 1, and the threshold of the EER."""
    figure, axes = _canvas(title)
    kinds = (("impostor", report.impostor_histogram, report.impostor_pairs), ("genuine", report.genuine_histogram, report.genuine_pairs))
    edges = HISTOGRAM_EDGES[::2]
    for (name, counts, pairs), color in zip(kinds, (COLORS[1], COLORS[0]), strict=True):
        density = counts.reshape(-1, 2).sum(axis=1) / (pairs * np.diff(edges))
        axes.stairs(density, edges, fill=True, alpha=0.35, color=color)
        axes.stairs(density, edges, color=color, linewidth=1.2, label=f"{name} ({pairs:,} pairs)")
    label = f"EER {report.eer:.2%} at {report.threshold_at_eer:.3f}"
    axes.axvline(report.threshold_at_eer, color="0.25", linewidth=1, linestyle="--", label=label)
    used = np.flatnonzero(report.genuine_histogram + report.impostor_histogram)
    low, high = HISTOGRAM_EDGES[used[0]], HISTOGRAM_EDGES[used[-1] + 1]
    axes.set(xlim=(max(-1, low - 0.05), min(1, high + 0.05)), xlabel="Cosine", ylabel="Density")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="best")
    return figure


def identities_figure(counts_C: np.ndarray, title: str) -> Figure:
    """Images of each identity, int64 [C] of 1 and more, from the one with the most to the one with the fewest; both axes logarithmic."""
    figure, axes = _canvas(title)
    identities, most = len(counts_C), int(counts_C.max())
    rank_C = np.arange(1, identities + 1)
    axes.plot(rank_C, np.sort(counts_C)[::-1], color=COLORS[0], linewidth=1.8, drawstyle="steps-mid", clip_on=False, zorder=3)
    median = float(np.median(counts_C))
    axes.axhline(median, color="0.25", linewidth=1, linestyle="--", label=f"median {median:g}")
    if single := int((counts_C == 1).sum()):
        axes.axvspan(identities - single + 0.5, identities + 0.5, color=COLORS[1], alpha=0.15, label=f"{single:,} with one image")
    axes.set(xscale="log", yscale="log", xlim=(1, max(2, identities)), ylim=(0.9, max(2, 1.2 * most)))
    axes.set(xlabel="Identities, by number of images", ylabel="Images of the identity")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, loc="best")
    return figure


def save_png(figure: Figure, path: str | Path) -> None:
    """What `write_png` does. Raises ValueError when the path cannot be written."""
    try:
        write_png(figure, path)
    except OSError as error:
        raise ValueError(f"{path}: the figure cannot be written ({error.strerror}); choose a path that can.") from error


def write_png(figure: Figure, path: str | Path) -> None:
    """Writes the figure at 200 dots per inch, making the folder. Raises OSError, and leaves no half of it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=200)
    try:
        Path(path).write_bytes(picture.getvalue())
    except OSError:
        with suppress(OSError):
            if Path(path).is_file():
                Path(path).unlink()
        raise


def _canvas(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _lowest_far(reports: Mapping[str, Report]) -> float:
    return min(LOWEST_FAR, 10.0 ** -min(8, int(np.log10(max(report.impostor_pairs for report in reports.values())))))


def _visible(report: Report, lowest_drawn: float) -> tuple[np.ndarray, np.ndarray]:
    """The curve from the lowest FAR that is drawn and that the set can tell from 0, entered at the TAR of no more than this FAR."""
    far_P, tar_P = report.roc
    lowest = max(lowest_drawn, 1 / report.impostor_pairs)
    inside = far_P > lowest
    return np.concatenate([[lowest], far_P[inside]]), np.concatenate([tar_P[~inside][-1:], tar_P[inside]])


def _upper_left_is_free(reports: Mapping[str, Report]) -> bool:
    """Whether every curve stays below half height up to FAR 1 %, where the legend's box ends."""
    return all(tar_P[far_P <= 1e-2][-1] < 0.5 for far_P, tar_P in (report.roc for report in reports.values()))
