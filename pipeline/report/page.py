"""The page: what is said first, and the sections that follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timezone

import numpy as np

import partial_fc
from pipeline.report import set_section
from pipeline.report.cells import key
from pipeline.report.charts import Line, address, over_steps, style_of
from pipeline.report.entries import by_set
from pipeline.report.html import Safe, bullets, image, joined, page, table, tag
from pipeline.report.metrics import thinned
from pipeline.report.run_files import RunFiles
from pipeline.report.verdict import verdict

MOST_POINTS = 4000  # of all curves of a chart
CHARTS = (  # name in metrics.jsonl, title, scale, whether the axis begins at 0
    ("loss", "loss", "linear", False),
    ("learning_rate", "learning rate of the backbone", "linear", True),
    ("gradient_norm", "gradient norm, before clipping", "log", False),
    ("target_cosine", "cosine of a sample and its own prototype", "linear", False),
    ("hardest_non_target_cosine", "cosine of a sample and the nearest other prototype", "linear", False),
    ("prototypes/nearest_cosine", "cosine of a prototype and the nearest other one", "linear", False),
    ("prototypes/norm", "length of the prototypes", "linear", False),
    ("prototypes/never_sampled", "share of classes never sampled", "linear", True),
    ("images_per_second", "images per second", "linear", True),
    ("wait_share", "share of time that waits for data", "linear", True),
    ("memory/host_gib", "host memory of the largest rank, GiB", "linear", True),
    ("memory/gpu_gib", "GPU memory of the largest rank, GiB", "linear", True),
)
TERMS = """<dl>
<dt><b>EER</b></dt><dd>The error rate at the threshold where as many impostor pairs are accepted as genuine ones are rejected.</dd>
<dt><b>TAR at FAR 1e-3</b></dt><dd>The share of genuine pairs accepted, at the lowest threshold that accepts at most 1 of 1,000 impostor
pairs. FNMR is 1 - TAR, and FMR another name of FAR. Unreached: the set has too few impostor pairs for that rate.</dd>
<dt><b>rank-1</b></dt><dd>The share of images whose nearest other image is of the same identity.</dd>
<dt><b>OPIS</b></dt><dd>How differently one threshold serves the identities of a set (arXiv 2307.04047); 0: all alike.</dd>
<dt><b>threshold</b></dt><dd>A cosine; a pair is accepted from it on.</dd>
<dt><b>interval</b></dt><dd>95 %, by a bootstrap over identities (of .bin sets: over pairs). It says how much the choice of the people in
the set matters. What another seed of the training would give, it does not say.</dd>
</dl>"""
WENT_WRONG = {"skipped_steps": "steps left out", "skipped_images": "images not readable", "rollbacks": "rollbacks"}


def made_of(runs: Sequence[RunFiles]) -> str:
    """The whole page, HTML."""
    sets = by_set(runs)
    sections = [("verdict", "Verdict", verdict(sets)), ("runs", "Runs", _runs(runs))]
    if len(runs) > 1:
        sections.append(("differences", "Differences of configuration", _differences(runs)))
    sections.append(("training", "Training", _training(runs)))
    pictures = set_section.Budget()
    for number, (name, entries) in enumerate(sets.items(), start=1):
        sections.append((f"set-{number}", f"Evaluation: {name}", set_section.of_set(name, entries, runs, pictures)))
    if thresholds := set_section.one_threshold(runs):
        sections.append(("thresholds", "One threshold for all sets", thresholds))
    sections += [("data", "Data and machines", _data(runs)), ("configuration", "Configuration", _configuration(runs))]
    if missing := joined(_missing(run) for run in runs if run.missing):
        sections.append(("missing", "What is not here", missing))
    sections.append(("terms", "Terms", Safe(TERMS)))
    title = f"Report: {', '.join(run.label for run in runs)}"
    made = f"Made {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC by protoshard {partial_fc.__version__}."
    links = tag("nav", joined((tag("a", heading, href=f"#{key}") for key, heading, _ in sections), " "))
    body = [tag("section", tag("h2", heading), content, id=key) for key, heading, content in sections]
    return page(title, tag("h1", title), tag("p", made, class_="dim"), links, *body)


def progress(run: RunFiles) -> str:
    """How far it is."""
    step, total = run.metrics.step, run.total_steps
    if total is None:
        return f"step {step:,}"
    if step >= total:
        return f"complete, {total:,} steps"
    last = "" if math.isnan(run.metrics.ended) else f", last line {_time(run.metrics.ended)}"
    return f"step {step:,} of {total:,} ({step / total:.0%}){last}"


def _runs(runs: Sequence[RunFiles]) -> Safe:
    rows = [
        ("folder", *(run.path for run in runs)),
        ("state", *map(progress, runs)),
        ("epochs", *(_number(run.metrics.last.get("epoch")) for run in runs)),
        ("first and last line", *(_span(run) for run in runs)),
        ("training set", *(_set(run) for run in runs)),
        ("network", *(run.config.get("backbone.name", "") for run in runs)),
        ("loss", *(run.config.get("loss.name", "") for run in runs)),
        ("last loss", *(_number(run.metrics.last.get("loss")) for run in runs)),
        ("images per second, median", *(_median(run, "images_per_second") for run in runs)),
        *((title, *(_number(run.metrics.last.get(name)) for run in runs)) for name, title in WENT_WRONG.items()),
    ]
    return table(["", *(run.label for run in runs)], [row for row in rows if any(row[1:])], numbers=False)


def _set(run: RunFiles) -> str:
    images, identities = run.start.get("images"), run.start.get("identities")
    counts = f"{images:,} images of {identities:,} identities" if isinstance(images, int) and isinstance(identities, int) else ""
    return ": ".join(filter(None, (run.config.get("data.train", ""), counts)))


def _differences(runs: Sequence[RunFiles]) -> Safe:
    known = [run for run in runs if run.config]
    names = list(dict.fromkeys(name for run in known for name in run.config if name != "run.folder"))
    names = [name for name in names if len({run.config.get(name) for run in known}) > 1]
    if len(known) < len(runs):
        note = f"Not known of {', '.join(run.label for run in runs if not run.config)}."
    else:
        note = "Only the fields that differ; run.folder always does."
    if not names:
        return tag("p", "The configurations are equal but for run.folder." if len(known) == len(runs) else note)
    rows = [[tag("code", name), *(run.config.get(name, "not a field") if run.config else "?" for run in runs)] for name in names]
    return table(["field", *(run.label for run in runs)], rows, note, numbers=False)


def _training(runs: Sequence[RunFiles]) -> Safe:
    figures = []
    most = max(40, min(1000, MOST_POINTS // len(runs)))
    for name, title, scale, at_least_0 in CHARTS:
        lines = []
        for number, run in enumerate(runs):
            if name in run.metrics.series:
                lines.append(Line(run.label, *thinned(*run.metrics.series[name], most), style_of(number)))
        if scale == "log" and any((line.value_n <= 0).any() for line in lines):
            scale = "symlog"
        if lines and not (name == "prototypes/never_sampled" and not any(line.value_n.any() for line in lines)):
            drawn = over_steps(lines, title, scale, marked=name.startswith("prototypes"), at_least_0=at_least_0)
            said = "; ".join(
                f"{line.label}: {line.value_n[0]:.4g} at step {line.step_n[0]:,.0f}, {line.value_n[-1]:.4g} at step {line.step_n[-1]:,.0f}"
                for line in lines
            )
            figures.append(tag("figure", image(address(drawn), f"{title} over steps. {said}")))
    if not figures:
        return tag("p", "There are no lines of training in metrics.jsonl.")
    batches = {run.config.get("run.batch") for run in runs if run.config}
    losses = {tuple(item for item in run.config.items() if item[0].startswith("loss.")) for run in runs if run.config}
    notes = ["Steps of these runs are not equally long: run.batch differs."] if len(batches) > 1 else []
    notes += ["Values of the loss are not comparable: its name or options differ."] if len(losses) > 1 else []
    return joined(
        [
            key({run.label: style_of(number) for number, run in enumerate(runs)}),
            tag("p", " ".join(notes)) if notes else "",
            tag("div", *figures, class_="figures"),
        ]
    )


def _data(runs: Sequence[RunFiles]) -> Safe:
    start = [run.start for run in runs]
    rows = [
        (title, *(_plain(one.get(name)) for one in start))
        for name, title in (
            ("device", "device"), ("ranks", "ranks"), ("host", "host of rank 0"), ("system", "system"), ("torch", "torch"),
            ("protoshard", "protoshard"), ("commit", "commit"), ("when", "newest start"), ("step", "from step"),
        )
    ]  # fmt: skip
    parts = [table(["", *(run.label for run in runs)], [row for row in rows if any(row[1:])], numbers=False)]
    for run in runs:
        said = run.start.get("said_of_data")
        if isinstance(said, list):
            parts.append(tag("h3", f"What was passed over in the data of {run.label}"))
            parts.append(
                bullets(map(_plain, said)) if said else tag("p", "Nothing: every file of the training and evaluation sets was used.")
            )
    return joined(parts)


def _configuration(runs: Sequence[RunFiles]) -> Safe:
    parts = []
    for run in runs:
        lines = "\n".join(f"{name} = {value}" for name, value in run.config.items()) or "not known"
        parts.append(tag("details", tag("summary", f"{run.label}: all {len(run.config)} fields"), tag("pre", lines)))
    return joined(parts)


def _missing(run: RunFiles) -> Safe:
    return joined([tag("h3", run.label), bullets(run.missing)])


def _plain(value: object) -> str:
    return "" if value is None else str(value)[:500]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if isinstance(value, float) and value != int(value) else f"{value:,.0f}"


def _median(run: RunFiles, name: str) -> str:
    return f"{np.median(run.metrics.series[name][1]):,.0f}" if name in run.metrics.series else ""


def _time(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return "at no time"


def _span(run: RunFiles) -> str:
    if math.isnan(run.metrics.began):
        return ""
    minutes = (run.metrics.ended - run.metrics.began) / 60
    return (
        f"{_time(run.metrics.began)} to {_time(run.metrics.ended)} ({minutes / 60:,.1f} h)"
        if minutes >= 90
        else f"{_time(run.metrics.began)} to {_time(run.metrics.ended)} ({minutes:,.0f} min)"
    )
