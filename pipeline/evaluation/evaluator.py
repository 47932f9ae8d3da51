"""The evaluations of a run: which sets, how often, and where their figures go."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from torch import nn

from dali_loaders.config import DataConfig
from pipeline.distributed import Place
from pipeline.evaluation import Report, evaluate, open_set
from pipeline.evaluation.embed import Breaks
from pipeline.evaluation.report import HISTOGRAM_EDGES
from pipeline.evaluation.set_names import AVERAGED, file_name, set_names
from pipeline.monitor import Monitor
from pipeline.same_data import open_on_all_ranks

SAID = ("accuracy", "eer", "tar_at_far/1e-2", "tar_at_far/1e-3", "rank1")  # on the console; the rest goes to the metrics


@dataclass(frozen=True)
class EvaluationConfig:
    data: str = ""  # labelled folder, .tar or .rec of identities that are not trained on: all pairs, at the end of the run; "" for none
    pairs: tuple[str, ...] = ()  # InsightFace .bin pair sets, at the same times
    every_epochs: float = 0.0  # evaluate also during training; 0: only at the end
    at_start: bool = False  # also the untrained network, for comparison
    flip: bool = True  # add the features of the mirror image
    batch_size: int = 64  # images per forward pass on each rank

    def __post_init__(self) -> None:
        for name, least in (("every_epochs", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"evaluation.{name} is {getattr(self, name)}, but must be at least {least}")


class Evaluator:
    """Evaluates a network on every configured set, over all ranks, and reports to the monitor and as PNG files in `folder`."""

    def __init__(self, config: EvaluationConfig, data: DataConfig, place: Place, folder: str) -> None:
        """Opens every set, so that one that cannot be read costs no training. Every rank calls it. ValueError for such a set, for one
        that ranks do not see alike, and for one that is named twice."""
        paths = [path for path in (config.data, *config.pairs) if path]
        self.names = dict(zip(paths, set_names(paths), strict=True))
        self.remarks: list[str] = []  # what of the sets was passed over
        for field, path in [("data", config.data), *(("pairs", path) for path in config.pairs)]:
            if path:
                self.remarks += _try(field, path, data)
        from pipeline.evaluation import figures  # not above, because a configuration draws nothing, and not later, after the training

        self.config, self.data, self.place, self.folder, self.figures = config, data, place, folder, figures
        self.newest: dict[str, float] = {}  # figures of all sets, as metrics name them
        self.first: dict[str, dict[str, Report]] = {}  # by name of the results: the first report, drawn beside the newest

    def run(self, module: nn.Module, step: int, monitor: Monitor, averaged: bool = False, breaks: Breaks | None = None) -> dict[str, float]:
        """The figures of the first set, or nothing where there is none. Every rank calls it. `averaged` says whose weights these are."""
        results = []
        for path, set_name in self.names.items():
            report = evaluate(
                module,
                path,
                self.data,
                batch_size=self.config.batch_size,
                flip=self.config.flip,
                device=self.place.device,
                rank=self.place.rank,
                world_size=self.place.world_size,
                breaks=breaks,
            )
            name = set_name + AVERAGED * averaged
            results.append({key: value for key, value in report.numbers().items() if value is not None})
            figures = {f"{name}/{key}": value for key, value in results[-1].items()}
            self.newest |= figures
            if self.place.is_first:
                monitor.scalars(step, {**figures, _threshold(name): report.best_cosine})
                said = [f"{key} {results[-1][key]:.4f}" for key in SAID if key in results[-1]]
                monitor.say(f"{name} at step {step}: {', '.join(said)}")
                self._draw(name, report, step, monitor)
        return results[0] if results else {}

    def is_done(self, step: int, averaged: bool = False) -> bool:
        """Whether the metrics of `step` have the figures of every set, also with averaged weights."""
        missing = {_threshold(name + AVERAGED * each) for name in self.names.values() for each in range(1 + averaged)}
        try:
            with open(os.path.join(self.folder, "metrics.jsonl"), encoding="utf-8") as file:
                for row in map(json.loads, file):
                    missing -= row.keys() if row["step"] == step else set()
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return not missing
        return not missing

    def _draw(self, name: str, report: Report, step: int, monitor: Monitor) -> None:
        monitor.histogram(step, f"{name}/genuine_cosines", report.genuine_histogram, HISTOGRAM_EDGES)
        monitor.histogram(step, f"{name}/impostor_cosines", report.impostor_histogram, HISTOGRAM_EDGES)
        monitor.figure(step, f"{name}/cosines", self.figures.score_figure(report, name))
        first = self.first.setdefault(name, {f"step {step}": report})
        figure = self.figures.roc_figure({**first, f"step {step}": report}, name)
        monitor.figure(step, f"{name}/roc", figure)
        path = os.path.join(self.folder, f"roc-{file_name(name)}-{step:08d}.png")
        monitor.try_to("the ROC figure", lambda: self.figures.write_png(figure, path))


def _try(field: str, path: str, data: DataConfig) -> list[str]:
    try:
        return open_on_all_ranks(path, lambda: open_set(path, data))[0].account.remarks(path)
    except ValueError as error:
        raise ValueError(f"evaluation.{field}: {error} Name another set, or none with --set evaluation.{field}=") from error


def _threshold(name: str) -> str:
    return f"evaluation/{name}/threshold"
