"""Results that `protoshard eval --json` printed, put among those of a run: other sets, other protocols."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dali_loaders.names import printable, quoted
from pipeline.evaluation.curves_so_far import Curve, checked
from pipeline.evaluation.set_names import AVERAGED
from pipeline.report.run_files import RunFiles, evaluation

MOST = 1 << 26  # bytes of a file
OTHERS = ("evaluated", "curve", "intervals", "tables")  # of the keys that are no figures


def add(path: str, runs: Sequence[RunFiles]) -> None:
    """Adds what the file tells to the run whose checkpoint was evaluated. ValueError for another file, and for one of none of `runs`."""
    shown = quoted(path)
    try:
        if os.path.getsize(path) > MOST:
            raise ValueError(f"{shown} has more than {MOST >> 20} MB, as no output of protoshard eval --json has")
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{shown} cannot be read ({error.strerror})") from None
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError):
        content = None
    if content is None and not os.path.getsize(path):
        raise ValueError(f"{shown} is empty: `protoshard eval` wrote nothing into it, and says why on the console")
    if not isinstance(content, dict) or not isinstance(evaluated := content.get("evaluated"), dict):
        raise ValueError(f"{shown} is not what `protoshard eval RUN --data SET --json` prints, in this version: make it anew")
    run = _run_of(str(evaluated.get("checkpoint")), runs, shown)
    try:
        row = {"step": evaluated["step"], **_flat(content)}
        found = evaluation({**row, "of": evaluated.get("of")})
        name = printable(str(evaluated["name"])) + AVERAGED * bool(evaluated.get("ema"))
        curve = _curve(found.step, found.values, content.get("curve"))
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        raise ValueError(f"{shown} is damaged: it lacks what `protoshard eval --json` prints; make it anew") from None
    known = [one for one in run.evaluations.get(name, []) if one.step != found.step or one.of != found.of]
    if known and known[-1].of != found.of:
        name, known = f"{name} ({printable(os.path.basename(path))})", []
    run.evaluations[name] = sorted([*known, found], key=lambda one: one.step)
    if curve:
        run.curves.setdefault(name, {})[found.step] = curve


def _run_of(checkpoint: str, runs: Sequence[RunFiles], shown: str) -> RunFiles:
    for run in runs:
        if os.path.realpath(checkpoint).startswith(os.path.realpath(run.path) + "/"):
            return run
    raise ValueError(f"{shown} is of the checkpoint {quoted(checkpoint)}, which is of none of the runs named: name its run too")


def _flat(part: Mapping[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """Values, intervals and tables by names with a /, as a run keeps them."""
    found: dict[str, dict[str, Any]] = {"values": {}, "intervals": {}, "tables": {}}
    for kind in ("intervals", "tables"):
        found[kind] |= {f"{prefix}{name}": item for name, item in part.get(kind, {}).items()}
    for name, value in part.items():
        if isinstance(value, dict) and name not in OTHERS:
            for kind, items in _flat(value, f"{prefix}{name}/").items():
                found[kind] |= items
        elif name not in OTHERS and value is not None:
            found["values"][f"{prefix}{name}"] = value
    return found


def _curve(step: int, values: Mapping[str, Any], curve: Any) -> Curve | None:
    if not isinstance(curve, dict):
        return None
    roc = np.array(curve["far"], float), np.array(curve["tar"], float)
    histograms = np.array([curve["genuine"], curve["impostor"]], np.int64)
    pairs = int(values["genuine_pairs"]), int(values["impostor_pairs"])
    return checked(Curve(step, float(values["eer"]), *pairs, roc, float(values["threshold_at_eer"]), histograms))
