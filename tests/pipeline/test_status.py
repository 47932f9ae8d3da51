"""`protoshard status`: what a folder tells, with ranks that beat, are silent or have ended."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import pytest

from pipeline import beats, heartbeat, status
from pipeline.cli import main
from pipeline.heartbeat import Beat


@pytest.fixture
def run(tmp_path):
    """A run of 100 steps at step 20, with a checkpoint of step 10, on three ranks whose beats can be moved."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step-00000010").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000020.partial").mkdir()
    (folder / "logs" / "faces-2").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"start": {"total_steps": 100}}))
    began = time.time() - 30
    rows = [{"step": step, "time": began + step, "loss": 3.0, "images_per_second": 64.0} for step in range(2, 21, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2')
    (folder / "lease-3.json").write_text(json.dumps({"token": "t", "beat": 1, "released": False}))
    for rank in range(3):
        beat(folder, rank, 1)
    return folder


def beat(folder, rank, count, **values):
    heartbeat.write(str(folder), replace(Beat("start", rank, count, f"node{rank}", 7, 21, "a training step", True), **values))


def moving(folder, *ranks):
    """A wait in which these ranks beat."""
    count = iter(range(2, 100))

    def wait(seconds):
        number = next(count)
        for rank in ranks:
            beat(folder, rank, number)

    return wait


def test_a_run_that_trains(run):
    found = status.of_run(str(run), moving(run, 0, 1, 2))
    assert (found.state, found.step, found.total_steps, found.images_per_second, found.loss) == ("running", 21, 100, 64.0, 3.0)
    assert found.seconds_left == pytest.approx(80, rel=0.1) and 9 < found.seconds_since_line < 60
    assert found.checkpoint == f"{run}/checkpoints/step-00000010"
    assert (found.job, found.logs) == ("faces-2", f"{run}/logs/faces-2")
    text = status.as_text(found)
    for part in (": running", "step        21 of 100 (21%), 1m", "64 images/s, loss 3.0000, ", "3 of 3 alive"):
        assert part in text
    assert "     1 on node1  after step 21 in a training step" in text
    assert json.loads(status.as_json(found))["ranks"][2] == {
        "rank": 2, "host": "node2", "is_alive": True, "step": 21, "doing": "a training step", "end": "",
    }  # fmt: skip


def test_a_rank_that_is_silent_is_not_called_alive(run):
    found = status.of_run(str(run), moving(run, 0, 2))
    assert found.state == "running" and [rank.is_alive for rank in found.ranks] == [True, False, True]
    assert "2 of 3 alive" in status.as_text(found) and "1 on node1  silent: after step 21" in status.as_text(found)


def test_ranks_of_an_earlier_start_do_not_count(run):
    beat(run, 3, 1, run="earlier")
    assert len(status.of_run(str(run), moving(run, 0, 1, 2)).ranks) == 3


def test_a_run_that_is_dead(run):
    found = status.of_run(str(run), lambda seconds: None)
    assert found.state == "gone" and found.seconds_left is None and "0 of 3 alive" in status.as_text(found)
    assert "not running, and ended without a word" in status.as_text(found)


def test_runs_that_have_ended(run):
    for rank in range(3):
        beat(run, rank, 2, end="stopped", doing="stopped by SIGTERM")
    assert status.of_run(str(run), lambda seconds: None).state == "stopped"
    (run / "checkpoints" / "step-00000100").mkdir()
    found = status.of_run(str(run), lambda seconds: None)
    assert (found.state, found.step) == ("finished", 100)


def test_a_run_that_starts(run):
    """It holds the lease, and its ranks do not beat yet."""
    for path in (run / "ranks").iterdir():
        path.unlink()
    lease = run / "lease-3.json"

    def wait(seconds):
        lease.write_text(json.dumps({"token": "t", "beat": json.loads(lease.read_text())["beat"] + 1, "released": False}))

    assert status.of_run(str(run), wait).state == "starting"
    assert status.of_run(str(run), lambda seconds: None).state == "gone"
    lease.write_text(json.dumps({"released": True}))
    assert status.of_run(str(run), lambda seconds: None).state == "stopped"


def test_files_that_are_damaged(run):
    (run / "run.json").write_text("[" * 100_000)
    (run / "metrics.jsonl").write_bytes(b"\xff\n{}\n[1]\nnull\n")
    (run / "ranks" / "rank-00001").write_bytes(b"{")
    (run / "ranks" / "rank-00002").write_text(json.dumps({"rank": "2"}))
    (run / "lease-3.json").write_bytes(b"\x00")
    found = status.of_run(str(run), moving(run, 0))
    assert (found.state, found.total_steps, found.loss, len(found.ranks)) == ("running", None, None, 1)
    status.as_text(found)


def test_beats_of_nobody(tmp_path):
    assert beats.read_all(str(tmp_path)) == [] and beats.alive(str(tmp_path)) == {}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path / "none", "does not exist; give the folder of a run"),
        (lambda path: os.mkdir(path / "empty") or path / "empty", "is no run's folder: it has none of"),
        (lambda path: (path / "file").touch() or path / "file", "is no folder; give the folder of a run"),
        (lambda path: "s3://bucket/run", "is an address; give the run's folder"),
    ],
)
def test_what_is_no_run(tmp_path, capsys, make, sentence):
    assert main(["status", str(make(tmp_path))]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and said.out == ""


def test_the_command(run, capsys, monkeypatch):
    monkeypatch.setattr(status.time, "sleep", moving(run, 0, 1, 2))
    monkeypatch.setattr(status.of_run, "__defaults__", (moving(run, 0, 1, 2),))
    assert main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "running"
