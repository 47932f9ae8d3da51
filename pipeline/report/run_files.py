"""What a run's folder tells, of this version or an earlier one, finished or not: nothing of it has to be there but one sign of a run."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dali_loaders.names import printable, quoted
from dali_loaders.remote import is_remote, without_secrets
from pipeline.checkpoint import MANIFEST, looking
from pipeline.checkpoint.folder import ABOUT, FOLDER, MOST_ABOUT
from pipeline.config import value_text
from pipeline.evaluation import curves_so_far, kept
from pipeline.evaluation.curves_so_far import Curve
from pipeline.evaluation.set_names import CURVES, HARD_PAIRS, file_name
from pipeline.report import metrics
from pipeline.report.metrics import Metrics

SERIES = frozenset(
    {
        "loss",
        "learning_rate",
        "target_cosine",
        "hardest_non_target_cosine",
        "gradient_norm",
        "images_per_second",
        "wait_share",
        "memory/host_gib",
        "memory/gpu_gib",
        "prototypes/norm",
        "prototypes/nearest_cosine",
        "prototypes/never_sampled",
    }
)
MOST_PAIRS = 1 << 21  # bytes that are read of a file of hard pairs, which has 0.2 MB
_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Evaluation:
    step: int
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    tables: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    of: Mapping[str, Any] | None = None  # what the set is; None where it is not known


@dataclass
class RunFiles:
    path: str
    label: str  # what the page calls it
    metrics: Metrics = field(default_factory=Metrics)
    config: dict[str, str] = field(default_factory=dict)  # by section.field
    start: dict[str, Any] = field(default_factory=dict)  # as pipeline/start.py writes it
    evaluations: dict[str, list[Evaluation]] = field(default_factory=dict)  # by name of the results, steps rising
    curves: dict[str, dict[int, Curve]] = field(default_factory=dict)  # by name and step
    pairs: dict[str, dict[str, Any]] = field(default_factory=dict)  # hard ones, by name
    missing: list[str] = field(default_factory=list)  # what is not there, in sentences

    @property
    def total_steps(self) -> int | None:
        """Of the whole run; for runs of earlier versions from the epoch of their last line."""
        total = self.start.get("total_steps")
        if isinstance(total, int):
            return total
        with suppress(KeyError, ValueError, ZeroDivisionError, OverflowError):
            return max(1, math.ceil(round(float(self.config["run.epochs"]) * self.metrics.step / self.metrics.last["epoch"], 6)))
        return None


def read(path: str, label: str) -> RunFiles:
    """ValueError, one sentence, where `path` is no run's folder."""
    folder = Path(path)
    if is_remote(path):
        raise ValueError(f"{without_secrets(path)} is an address; copy the run's folder here first (its checkpoints are not needed)")
    if not folder.is_dir():
        raise ValueError(f"{quoted(path)} {'is no folder' if os.path.lexists(path) else 'does not exist'}; give the folder of a run")
    if (folder / MANIFEST).is_file():
        raise ValueError(f"{quoted(path)} is a checkpoint; give the folder of its run")
    signs = (ABOUT, "metrics.jsonl", kept.FILE, FOLDER)
    if not any((folder / name).exists() for name in signs):
        raise ValueError(f"{quoted(path)} is no run's folder: it has none of {', '.join(signs)}")
    run = RunFiles(path, label)
    try:
        run.metrics = metrics.read(folder / "metrics.jsonl", SERIES)
    except OSError as error:
        run.missing.append(f"metrics.jsonl cannot be read ({error.strerror}): no curves of the training.")
    if run.metrics.damaged:
        run.missing.append(f"{run.metrics.damaged:,} of {run.metrics.lines:,} lines of metrics.jsonl are damaged and left out.")
    _read_about(run, folder)
    _read_evaluations(run, folder)
    return run


def _read_about(run: RunFiles, folder: Path) -> None:
    about = _json(folder / ABOUT, MOST_ABOUT)
    config, start = about.get("config"), about.get("start")
    if not isinstance(config, dict):
        try:
            saved = looking.one(run.path)
        except (ValueError, OSError):
            run.missing.append("Neither run.json nor a checkpoint says what its configuration was.")
        else:
            info, code = saved.info, saved.info.get("code")
            config, start = info.get("config"), {"ranks": info.get("world_size"), "host": info.get("host")}
            start |= code if isinstance(code, dict) else {}
            run.missing.append(
                f"Of an earlier version: its configuration is that of {os.path.basename(saved.path)}, and of its data nothing is said."
            )
    run.start = start if isinstance(start, dict) else {}
    run.config = dict(_flat(config, "")) if isinstance(config, dict) else {}


def _read_evaluations(run: RunFiles, folder: Path) -> None:
    rows = kept.rows_of(str(folder / kept.FILE))
    found: dict[tuple[int, str], Evaluation] = {key: Evaluation(key[0], values) for key, values in run.metrics.evaluations.items()}
    read, given_up = 0, list[int]()
    for row in rows or ():
        with suppress(ValueError, TypeError, AttributeError, OverflowError):
            one = evaluation(row)
            read += 1
            if run.metrics.lines and one.step > run.metrics.step:  # metrics.jsonl is cut where a run goes back to an earlier checkpoint
                given_up.append(one.step)
            else:
                found[one.step, str(row["name"])] = one
    if found and (rows is None or read < len(rows) or any(one.of is None for one in found.values())):
        run.missing.append("There is no whole evaluations.json: figures that are not in it are those of metrics.jsonl, without intervals.")
    if given_up:
        run.missing.append(
            f"Evaluations of steps beyond {run.metrics.step:,} are left out ({len(given_up)}): the run went back to an earlier step."
        )
    if not found:
        run.missing.append("No evaluation is finished yet, or the run has no evaluation set (evaluation.data).")
    for (_, name), one in sorted(found.items(), key=lambda item: item[0][0]):  # sets stay in the order in which they were evaluated
        run.evaluations.setdefault(name, []).append(one)
    for name, several in run.evaluations.items():
        of = several[-1].of
        same = [one for one in several if one.of is None or one.of == of]
        if len(same) < len(several):
            run.missing.append(f"{name}: evaluations of another set of that name are left out ({len(several) - len(same)}).")
        run.evaluations[name] = same
        written_of, curves = curves_so_far.read(folder / CURVES.format(file_name(name)))
        if min(curves, default=math.inf) <= several[-1].step and (of is None or written_of == json.dumps(of)):
            run.curves[name] = {step: curve for step, curve in curves.items() if step <= several[-1].step}
        else:
            run.missing.append(f"{name}: no curves (ROC, DET) are kept.")
        path = folder / HARD_PAIRS.format(file_name(name))
        pairs = _json(path, MOST_PAIRS)
        if pairs and pairs.get("step") == several[-1].step and (of is None or pairs.get("of") == of):
            run.pairs[name] = pairs
        elif path.exists():
            run.missing.append(f"{name}: the hard pairs are those of another set or step, or damaged, and left out.")
    if run.evaluations and not run.pairs:
        run.missing.append("No hard pairs are kept: a run looks for them at its end, in labelled sets, if monitor.images is not 0.")


def evaluation(row: Mapping[str, Any]) -> Evaluation:
    """Of a row of evaluations.json, or of what `protoshard eval --json` printed. Raises what a row of another form raises."""
    values = {str(name): value for name, value in row["values"].items() if metrics.is_number(value) and name != "best_cosine"}
    intervals = {str(name): (float(low), float(high)) for name, (low, high) in row.get("intervals", {}).items()}
    if (
        not all(metrics.is_number(end) for ends in row.get("intervals", {}).values() for end in ends)
        or not 0 <= row["step"] < metrics.MOST_STEPS
    ):
        raise ValueError("an end of an interval is no number, or the step is none")
    tables = {str(name): [dict(item) for item in table] for name, table in row.get("tables", {}).items()}
    of = row.get("of")
    return Evaluation(int(row["step"]), values, intervals, tables, of if isinstance(of, dict) else None)


def jpeg_of(pair: Mapping[str, Any]) -> str | None:
    """The picture of a hard pair in base64; None where it is damaged."""
    with suppress(ValueError, KeyError, TypeError):
        content = base64.b64decode(pair["jpeg"], validate=True)
        if content.startswith(b"\xff\xd8"):
            return base64.b64encode(content).decode()
    return None


def _json(path: Path, most: int) -> dict[str, Any]:
    """The object in a file of at most that many bytes; an empty one where there is none."""
    with suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= most:
            values = json.loads(path.read_bytes())
            return values if isinstance(values, dict) else {}
    return {}


def _flat(part: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    """section.field and text of each value, as `--set` takes them."""
    found: list[tuple[str, str]] = []
    for name, value in part.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{prefix}{name}.")
        else:
            simple = isinstance(value, list) and all(isinstance(item, _PLAIN) for item in value)
            found.append((printable(f"{prefix}{name}"), printable(value_text(tuple(value) if simple else value))))
    return found
