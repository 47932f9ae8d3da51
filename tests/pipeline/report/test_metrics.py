"""Lines of metrics: whole, damaged and hostile ones; and series of fewer points that keep their extremes."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.report.metrics import read, thinned

NAMES = frozenset({"loss", "epoch"})


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), most=st.integers(4, 400), seed=st.integers(0, 99))
def test_thinned_series_keep_their_ends_and_extremes(n, most, seed):
    value_n = np.random.default_rng(seed).standard_cauchy(n)
    step_n = np.arange(n) * 20.0
    step_m, value_m = thinned(step_n, value_n, most)
    assert len(step_m) <= most and (np.diff(step_m) > 0).all() and (len(step_m) == n or n > most)
    assert step_m[0] == step_n[0] and step_m[-1] == step_n[-1]
    assert value_m.min() == value_n.min() and value_m.max() == value_n.max()
    assert (value_m == value_n[(step_m / 20).astype(int)]).all()


def test_lines_that_are_not_whole_are_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 20, "loss": 2.0}, {"step": 10, "loss": 3.0, "text": "x", "flag": True}, {"step": 30, "loss": None}]
    damaged = [
        '{"step": 40, "lo',
        "[]",
        "\0" * 50,
        '{"step": "50"}',
        '{"loss": 1}',
        '{"step": -1, "loss": 1}',
        "[" * 100_000,
        '{"step": 1e999}',
    ]
    rows.append({"step": 60, "loss": float("nan"), "epoch": 2})
    path.write_text("\n".join([*map(json.dumps, rows), *damaged, '{"step": 70, "loss": 1' + "0" * 400 + "}"]))
    found = read(path, NAMES)
    assert (found.lines, found.damaged, found.step) == (13, len(damaged), 70)
    assert [part.tolist() for part in found.series["loss"]] == [[10, 20], [3.0, 2.0]]
    assert found.last == {"loss": 3.0, "epoch": 2}


def test_evaluations_are_told_from_lines_of_training(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 5, "loss": 1.0},
        {"step": 5, "a/b/eer": 0.2, "a/b/men/eer": 0.3, "evaluation/a/b/threshold": 0.4},
        {"step": 6, "old/eer": 0.1, "old/images": 7},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read(path, NAMES).evaluations == {(5, "a/b"): {"eer": 0.2, "men/eer": 0.3}, (6, "old"): {"eer": 0.1, "images": 7}}
