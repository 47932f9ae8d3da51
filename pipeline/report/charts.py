"""The figures of the page, as SVG in data addresses: a browser neither loads anything nor runs anything for them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dali_loaders.extras import extra
from pipeline.evaluation.figures import COLORS, canvas, legend

with extra("train"):
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

SIZE = (5.0, 3.2)  # inches
MOST_NAMED = 6  # curves that have a legend in the figure; the page has one for all
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
AVERAGED = (0, (3, 1))


@dataclass(frozen=True)
class Line:
    label: str
    step_n: np.ndarray
    value_n: np.ndarray
    style: Mapping[str, Any]
    low_n: np.ndarray | None = None  # ends of intervals; NaN where there is none
    high_n: np.ndarray | None = None


def style_of(number: int, is_averaged: bool = False) -> dict[str, Any]:
    """Colour and dashes of the run of that number; its averaged weights have its colour."""
    dashes = DASHES[number // len(COLORS) % len(DASHES)]
    return {"color": COLORS[number % len(COLORS)], "linestyle": AVERAGED if is_averaged else dashes}


def over_steps(lines: Sequence[Line], title: str, scale: str = "linear", *, marked: bool = False, at_least_0: bool = False) -> Figure:
    """One curve for each run over its steps; with `marked` also its points, and intervals as bands."""
    figure, axes = canvas(title, SIZE)
    for line in lines:
        axes.plot(line.step_n, line.value_n, linewidth=1.3, marker="o" if marked else "", markersize=3.5, label=line.label, **line.style)
        if line.low_n is not None and line.high_n is not None:
            axes.fill_between(line.step_n, line.low_n, line.high_n, color=line.style["color"], alpha=0.12, linewidth=0)
    axes.set(xlabel="step", yscale=scale)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if scale == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=9)
    if at_least_0 and scale == "linear":
        axes.set_ylim(bottom=0)
    if 1 < len(lines) <= MOST_NAMED:
        legend(axes, fontsize=8, edgecolor="none", framealpha=0.8, loc="best")
    return figure


def address(figure: Figure) -> str:
    """The figure as an image's address. Texts stay texts, for the fonts of the reader."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "protoshard", "path.simplify_threshold": 0.3}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return _address(file.getvalue())


def sample(style: Mapping[str, Any]) -> str:
    """A short line as `style_of` has it, as an image's address."""
    dashes = style["linestyle"]
    pattern = "" if isinstance(dashes, str) else f' stroke-dasharray="{" ".join(str(2 * part) for part in dashes[1])}"'
    line = f'<line x1="0" y1="5" x2="34" y2="5" stroke="{style["color"]}" stroke-width="3"{pattern}/>'
    return _address(f'<svg xmlns="http://www.w3.org/2000/svg" width="34" height="10">{line}</svg>'.encode())


def _address(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
