"""The monitor's three outputs, read back with the tools users read them with."""

import io
import json
import math
import sys

import matplotlib.figure
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.monitor import Monitor


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_events(folder):
    return EventAccumulator(str(folder / "tensorboard" / folder.name)).Reload()


def test_scalars_reach_both_files_with_step_and_time(tmp_path):
    monitor = Monitor(tmp_path, total_steps=2, console=False)
    monitor.scalars(0, {"train/loss": 2.5, "train/learning_rate": 0.1})
    assert [line["train/loss"] for line in read_lines(tmp_path)] == [2.5], "lines are flushed as they are written"
    monitor.scalars(1, {"train/loss": 1.5})
    monitor.close()
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[0]["train/learning_rate"] == 0.1 and lines[0]["time"] <= lines[1]["time"]
    assert [(event.step, event.value) for event in read_events(tmp_path).Scalars("train/loss")] == [(0, 2.5), (1, 1.5)]


def test_numbers_that_json_lacks_become_null(tmp_path):
    monitor = Monitor(tmp_path, total_steps=2, console=False)
    monitor.scalars(0, {"loss": math.nan, "gradient_norm": math.inf, "rate": np.float32(0.5)})
    monitor.close()
    line = read_lines(tmp_path)[0]
    assert line["loss"] is None and line["gradient_norm"] is None and line["rate"] == 0.5


def test_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    interrupted = Monitor(tmp_path, total_steps=10, console=False)
    for step in range(6):
        interrupted.scalars(step, {"loss": 100.0 + step})
    interrupted.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    resumed = Monitor(tmp_path, total_steps=10, console=False, first_step=4)
    for step in range(4, 7):
        resumed.scalars(step, {"loss": 200.0 + step})
    resumed.close()
    expected = [(0, 100.0), (1, 101.0), (2, 102.0), (3, 103.0), (4, 204.0), (5, 205.0), (6, 206.0)]
    assert [(line["step"], line["loss"]) for line in read_lines(tmp_path)] == expected
    assert [(event.step, event.value) for event in read_events(tmp_path).Scalars("train/loss")] == expected
    assert not list(tmp_path.glob("*.tmp"))


def test_new_run_in_an_old_folder_starts_anew(tmp_path):
    for value in (1.0, 2.0):
        monitor = Monitor(tmp_path, total_steps=2, console=False)
        monitor.scalars(0, {"loss": value})
        monitor.close()
    assert [line["loss"] for line in read_lines(tmp_path)] == [2.0]
    assert [event.value for event in read_events(tmp_path).Scalars("train/loss")] == [2.0]


def test_histogram_keeps_counts_and_edges_of_the_range_that_is_used(tmp_path):
    monitor = Monitor(tmp_path, total_steps=1, console=False)
    monitor.histogram(3, "genuine", np.array([0, 1, 0, 4, 0, 0]), np.array([-1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0]))
    monitor.histogram(3, "empty", np.zeros(2), np.array([0.0, 1.0, 2.0]))
    with pytest.raises(AssertionError, match="genuine: 3 counts need 4 edges"):
        monitor.histogram(3, "genuine", np.array([1, 0, 4]), np.array([-1.0, 0.0, 0.5]))
    monitor.close()
    assert read_events(tmp_path).Tags()["histograms"] == ["genuine"]
    event = read_events(tmp_path).Histograms("genuine")[0]
    value = event.histogram_value
    assert event.step == 3 and list(value.bucket) == [1, 0, 4] and list(value.bucket_limit) == [0.0, 0.5, 1.0]
    assert (value.min, value.max, value.num) == (-0.5, 1.0, 5), "the outermost bands that are drawn"
    assert value.sum == pytest.approx(-0.25 + 4 * 0.75)


def test_figures_and_texts_reach_tensorboard(tmp_path):
    monitor = Monitor(tmp_path, total_steps=1, console=False)
    figure = matplotlib.figure.Figure(figsize=(1, 1))
    figure.subplots().plot([0, 1])
    monitor.figure(2, "roc", figure)
    monitor.text(2, "recipe", "a recipe")
    monitor.close()
    events = read_events(tmp_path)
    assert events.Images("roc")[0].step == 2
    assert events.Tensors("recipe/text_summary")[0].tensor_proto.string_val == [b"a recipe"]


def test_other_ranks_are_silent(tmp_path):
    stream = io.StringIO()
    monitor = Monitor(tmp_path / "run", total_steps=1, rank=1, stream=stream)
    monitor.scalars(0, {"loss": 1.0})
    monitor.histogram(0, "genuine", np.ones(1), np.array([0.0, 1.0]))
    monitor.figure(0, "roc", matplotlib.figure.Figure())
    monitor.text(0, "recipe", "a recipe")
    monitor.say("hello")
    monitor.close()
    assert not (tmp_path / "run").exists() and stream.getvalue() == ""


def test_without_tensorboard_the_run_goes_on_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delitem(sys.modules, "pipeline.monitor.tensorboard", raising=False)
    stream = io.StringIO()
    monitor = Monitor(tmp_path, total_steps=1, stream=stream)
    monitor.scalars(0, {"loss": 1.0})
    monitor.histogram(0, "genuine", np.ones(1), np.array([0.0, 1.0]))
    monitor.close()
    assert "tensorboard is not installed" in stream.getvalue().splitlines()[0]
    assert read_lines(tmp_path)[0]["loss"] == 1.0 and not (tmp_path / "tensorboard").exists()


def test_close_twice_is_harmless(tmp_path):
    monitor = Monitor(tmp_path, total_steps=1, console=False)
    monitor.close()
    monitor.close()
