"""The evaluations of a run: which sets, how often, and where their figures go."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dali_loaders.config import DataConfig
from dali_loaders.remote import is_remote, without_secrets
from pipeline.agreement import Agreement
from pipeline.distributed import Place
from pipeline.evaluation import Report, evaluate, sheets
from pipeline.evaluation.curves_so_far import CurvesSoFar
from pipeline.evaluation.embed import Breaks
from pipeline.evaluation.kept import FILE, Kept
from pipeline.evaluation.protocols import OPTIONS, open_protocol
from pipeline.evaluation.report import HISTOGRAM_EDGES
from pipeline.evaluation.set_names import AVERAGED, CURVES, HARD_PAIRS, file_name, set_names
from pipeline.monitor import Monitor, of_set
from pipeline.monitor.json_lines import rows_at_end
from pipeline.same_data import open_on_all_ranks

BEST_COSINE = "best_cosine"  # of what is kept: a figure that metrics call by another name
SAID = ("accuracy", "eer", "tar_at_far/1e-2", "tar_at_far/1e-3", "rank1")  # on the console; the rest goes to the metrics


@dataclass(frozen=True)
class EvaluationConfig:
    data: str = ""  # labelled folder, .tar or .rec of identities that are not trained on: all pairs, at the end of the run; "" for none
    pairs: tuple[str, ...] = ()  # InsightFace .bin pair sets, at the same times
    protocols: tuple[str, ...] = ()  # other comparisons, as NAME:PATH with a NAME of `protoshard protocols`, at the same times
    every_epochs: float = 0.0  # evaluate also during training; 0: only at the end
    at_start: bool = False  # also the untrained network, for comparison
    flip: bool = True  # add the features of the mirror image
    batch_size: int = 64  # images per forward pass on each rank

    def __post_init__(self) -> None:
        for name, least in (("every_epochs", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"evaluation.{name} is {getattr(self, name)}, but must be at least {least}")
        for named in self.protocols:
            if not all(named.partition(":")):
                raise ValueError(f"evaluation.protocols has {named!r}; expected NAME:PATH, with a NAME of `protoshard protocols`")

    def sets(self) -> list[tuple[str, str | None, str]]:
        """The field that names a set, its protocol (None: the default of such a path) and its path."""
        protocols = [named.partition(":") for named in self.protocols]
        plain = [("data", self.data), *(("pairs", path) for path in self.pairs)]
        return [(field, None, path) for field, path in plain if path] + [("protocols", name, path) for name, _, path in protocols]


class Evaluator:
    """Evaluates a network on every configured set, over all ranks, and reports to the monitor and as PNG files in `folder`."""

    def __init__(self, config: EvaluationConfig, data: DataConfig, place: Place, folder: str) -> None:
        """Opens every set, so that one that cannot be read costs no training. Every rank calls it. ValueError for such a set, for one
        that ranks do not see alike, and for one that is named twice."""
        sets = config.sets()
        self.names = dict(zip((path for _, _, path in sets), set_names([path for _, _, path in sets]), strict=True))
        self.protocols = {path: protocol for _, protocol, path in sets}
        self.remarks: list[str] = []  # what of the sets was passed over
        self.sets: dict[str, dict[str, Any]] = {}  # by path, what tells one from another
        for field, protocol, path in sets:
            remarks, self.sets[path] = _try(field, protocol, path, data)
            self.sets[path] |= {"flip": config.flip} | ({"protocol": protocol} if protocol else {})
            self.remarks += remarks
        if self.sets and place.is_first:  # the import takes a second, which no other rank needs; not later, after the training
            from pipeline.evaluation import figures

            self.figures = figures
        self.config, self.data, self.place, self.folder = config, data, place, folder
        self.newest: dict[str, float] = {}  # figures of all sets, as metrics name them
        self.curves: dict[str, CurvesSoFar] = {}  # by name of the results
        self.drawn: dict[str, int] = {}  # the step
        self.done_at, self.done = -1, dict[str, dict[str, float]]()  # by name: what was measured already at the step the run goes on from
        self.kept = Kept(folder, 0)

    def go_on(self, step: int, averaged: bool, agreement: Agreement) -> None:
        """Takes over what the run has measured up to the checkpoint of `step`, from which it goes on. Every rank calls it."""
        if self.place.is_first:
            self.kept = Kept(self.folder, step + 1)
            for path, set_name in self.names.items():
                for name in (set_name, set_name + AVERAGED)[: 1 + averaged]:
                    of = self.sets[path]
                    if BEST_COSINE in (values := self.kept.values(step, name, of) or {}):
                        self.done[name] = values
        self.done_at, self.done = step, agreement.of_first(self.done)

    def owed(self, step: int, averaged: bool) -> list[str]:
        """Paths of the sets that are still to be evaluated at `step`."""
        done = self.done.keys() if step == self.done_at else set()
        return [path for path, name in self.names.items() if not {name, *[name + AVERAGED] * averaged} <= done]

    def run(self, module: nn.Module, step: int, monitor: Monitor, averaged: bool = False, breaks: Breaks | None = None) -> dict[str, float]:
        """The figures of the first set, or nothing where there is none. Every rank calls it. `averaged` says whose weights these are. Those
        that were measured before the run was broken off, at this step, are not measured again."""
        results = []
        for path, set_name in self.names.items():
            name = set_name + AVERAGED * averaged
            values = self.done.get(name) if step == self.done_at else None
            if values is None:
                values = self._measure(module, path, name, step, monitor, breaks)
            figures = {key: value for key, value in values.items() if key != BEST_COSINE}
            results.append(figures)
            self.newest |= {f"{name}/{key}": value for key, value in figures.items()}
            if self.place.is_first and not self._has_line(step, name, figures):
                monitor.evaluation(step, name, figures, values[BEST_COSINE])
                said = [f"{key} {results[-1][key]:.4f}" for key in SAID if key in results[-1]]
                monitor.say(f"{name} at step {step}: {', '.join(said)}")
        return results[0] if results else {}

    def _measure(self, module: nn.Module, path: str, name: str, step: int, monitor: Monitor, breaks: Breaks | None) -> dict[str, float]:
        """The figures of one set. It is drawn and kept before metrics say them, so that a run that is broken off in between draws it
        again."""
        seen: list[Any] = []
        is_last = step >= monitor.total_steps
        report = evaluate(
            module,
            path,
            self.data,
            protocol=self.protocols[path],
            batch_size=self.config.batch_size,
            flip=self.config.flip,
            device=self.place.device,
            rank=self.place.rank,
            world_size=self.place.world_size,
            breaks=breaks,
            look=(lambda *of: seen.extend(of)) if is_last and monitor.config.images and self.place.is_first else None,
        )
        values = {key: value for key, value in report.numbers().items() if value is not None}
        values[BEST_COSINE] = report.best_cosine
        if self.place.is_first:
            # Pictures of at most a hundred evaluations of a run, and of the last one.
            if is_last or step - self.drawn.get(name, -monitor.total_steps) >= monitor.total_steps / 100:
                self.drawn[name] = step
                self._draw(name, report, step, monitor, self.sets[path])
            if seen:
                pairs = sheets.show(monitor, step, name, seen[0], self.data, *seen[1:])
                hard = Path(self.folder, HARD_PAIRS.format(file_name(name)))
                monitor.try_to("the file of hard pairs", lambda: sheets.keep(hard, self.sets[path], pairs))
            monitor.try_to(FILE, lambda: self.kept.add(step, name, self.sets[path], values, report))
        return values

    def _has_line(self, step: int, name: str, figures: dict[str, float]) -> bool:
        """Whether metrics.jsonl says that already."""
        expected = {f"{name}/{key}": value if math.isfinite(value) else None for key, value in figures.items()}
        rows = rows_at_end(Path(self.folder, "metrics.jsonl"), step)
        return any(expected.items() <= row.items() for row in rows)

    def _draw(self, name: str, report: Report, step: int, monitor: Monitor, of: dict[str, Any]) -> None:
        monitor.histogram(step, of_set(name, "genuine_cosines"), report.genuine_histogram, HISTOGRAM_EDGES)
        monitor.histogram(step, of_set(name, "impostor_cosines"), report.impostor_histogram, HISTOGRAM_EDGES)
        monitor.figure(step, of_set(name, "cosines"), self.figures.score_figure(report, name))
        so_far = self.curves.setdefault(name, CurvesSoFar(Path(self.folder, CURVES.format(file_name(name))), of))
        curves = so_far.with_newest(step, report)
        monitor.try_to("the file of curves", so_far.write)
        figure = self.figures.roc_figure(curves, name)
        monitor.figure(step, of_set(name, "roc"), figure)
        monitor.figure(step, of_set(name, "det"), self.figures.det_figure(curves, name))
        path = os.path.join(self.folder, f"roc-{file_name(name)}-{step:08d}.png")
        monitor.try_to("the ROC figure", lambda: self.figures.write_png(figure, path))


def _try(field: str, protocol: str | None, path: str, data: DataConfig) -> tuple[list[str], dict[str, Any]]:
    """What was passed over in a set, and what tells it from others: names and labels of its images, and where it lies."""
    try:
        source, facts = open_on_all_ranks(path, lambda: open_protocol(protocol, path, data).source)
        bytes_of = os.path.getsize(path) if os.path.isfile(path) else None
        return source.account.remarks(path), {"path": without_secrets(_absolute(path)), "bytes": bytes_of, **facts}
    except ValueError as error:
        of_eval = any(option in str(error) for option in OPTIONS.values())
        hint = " (Options are of `protoshard eval`; of a run, images must lie or be linked where the protocol looks.)" * of_eval
        raise ValueError(f"evaluation.{field}: {error}{hint} Name another set, or none with --set evaluation.{field}=") from error


def _absolute(path: str) -> str:
    return ",".join(part if is_remote(part) else os.path.abspath(part) for part in path.split(","))
