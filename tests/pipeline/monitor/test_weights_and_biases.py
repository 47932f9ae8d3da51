"""Weights & Biases: a stand-in for its package everywhere, and the package itself, offline, where it is installed."""

from __future__ import annotations

import io
import sys
import time
import types

import numpy as np
import pytest

from pipeline import monitor as module
from pipeline.monitor import Monitor, MonitorConfig

WANDB = MonitorConfig(writers=("wandb",))


class Run:
    def __init__(self, options):
        self.options, self.logged, self.summary, self.is_finished, self.fault = options, [], {}, False, None

    def log(self, values, step):
        if self.fault:
            raise self.fault
        self.logged.append((step, values))

    def finish(self):
        self.is_finished = True


@pytest.fixture
def runs(monkeypatch):
    """Runs that were begun with the stand-in."""
    begun = []

    def init(**options):
        begun.append(Run(options))
        return begun[-1]

    stand_in = types.ModuleType("wandb")
    stand_in.init, stand_in.Settings = init, lambda **options: options
    stand_in.Image = lambda pixels: ("image", pixels.shape)
    stand_in.Histogram = lambda np_histogram: ("histogram", *np_histogram)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return begun


def test_what_it_is_told(tmp_path, runs):
    monitor = Monitor(tmp_path / "run", 10, console=False, config=WANDB, options={"run.batch": 64.0})
    monitor.scalars(1, {"loss": 2.0})
    monitor.evaluation(1, "test", {"eer": 0.1, "images": 400}, 0.3)
    monitor.histogram(1, "norms", np.arange(2000), np.arange(2001.0))
    monitor.image(1, "sheet", np.zeros((4, 6, 3), np.uint8))
    monitor.text(1, "config", "text")
    monitor.points(1, "test", np.zeros((1, 2)), ["a"], np.zeros((1, 2, 2, 3), np.uint8))
    monitor.outcome({"test/eer": 0.1})
    monitor.close()
    (run,) = runs
    assert run.options["name"] == "run" and run.options["project"] == "protoshard" and run.options["config"] == {"run.batch": 64.0}
    assert run.logged[0] == (1, {"train/loss": 2.0})
    assert run.logged[1] == (1, {"evaluation/test/eer": 0.1, "evaluation/test/threshold": 0.3})
    _, counts, edges = run.logged[2][1]["norms"]
    assert len(counts) <= 512 and counts.sum() == sum(range(2000)) and (edges[0], edges[-1]) == (1, 2000)
    assert run.logged[3] == (1, {"sheet": ("image", (4, 6, 3))})
    assert run.summary == {"evaluation/test/images": 400, "config": "text", "evaluation/test/eer": 0.1} and run.is_finished


def test_a_run_that_goes_on_is_the_same_run(tmp_path, runs):
    for first in (0, 5, 0):
        Monitor(tmp_path / "run", 10, console=False, config=WANDB, first_step=first).close()
    first, second, third = (run.options["id"] for run in runs)
    assert first == second != third and all(run.options["resume"] == "allow" for run in runs)


@pytest.mark.parametrize("content", [b"", b"\xff", b"../other\n"])
def test_a_number_that_was_not_written_whole_is_made_anew(tmp_path, runs, content):
    (tmp_path / "run" / "wandb").mkdir(parents=True)
    (tmp_path / "run" / "wandb" / "id").write_bytes(content)
    for _ in range(2):
        Monitor(tmp_path / "run", 10, console=False, config=WANDB, first_step=5).close()
    assert runs[0].options["id"] == runs[1].options["id"] and len(runs[0].options["id"]) == 16


def test_what_goes_wrong_in_it_does_not_end_the_run(tmp_path, runs):
    stream = io.StringIO()
    monitor = Monitor(tmp_path / "run", 10, config=WANDB, stream=stream)
    runs[0].fault = RuntimeError("no answer")
    for step in range(3):
        monitor.scalars(step, {"loss": 1.0})
    runs[0].fault = None
    monitor.scalars(3, {"loss": 1.0})
    monitor.close()
    assert stream.getvalue().count("wandb cannot be written (no answer): training goes on without it") == 1
    assert "wandb is written again; 3 records of it are lost" in stream.getvalue()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_start_that_fails_ends_in_a_sentence(tmp_path, runs, monkeypatch):
    def refuse(**_):
        raise RuntimeError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])\nmore")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(ValueError, match=r"wandb, which does not start \(api_key not configured.*\): log in with `wandb login`"):
        Monitor(tmp_path / "run", 10, console=False, config=WANDB)


def test_a_missing_package_ends_in_a_sentence_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"monitor\.writers has wandb, which is not installed: pip install 'protoshard\[wandb\]'"):
        module.check(WANDB)
    module.check(MonitorConfig())


def test_a_folder_called_wandb_is_not_the_package(tmp_path, monkeypatch):
    """W&B makes one where it is started, and Python takes any folder for a package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="wandb, which is not installed"):
        module.check(WANDB)


def test_the_package_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'protoshard[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monitor = Monitor(tmp_path / "run", 10, console=False, config=WANDB, options={"run.batch": 64.0})
    monitor.scalars(1, {"loss": 2.0})
    monitor.histogram(1, "norms", np.arange(2000), np.arange(2001.0))
    monitor.image(1, "sheet", np.zeros((4, 6, 3), np.uint8))
    monitor.evaluation(2, "test", {"eer": 0.1, "images": 400}, 0.3)
    monitor.outcome({"test/eer": 0.1})
    monitor.close()
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 30  # a process of its own writes, and does so after `finish` has returned
    while not (b"train/loss" in file.read_bytes() and b"evaluation/test/eer" in file.read_bytes()):
        assert time.monotonic() < deadline, file.stat().st_size
        time.sleep(0.1)
