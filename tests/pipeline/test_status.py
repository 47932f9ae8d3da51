"""`protoshard status`: what a folder tells, with ranks that beat, are silent or have ended."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from types import SimpleNamespace

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
    began = time.time() - 30
    when = datetime.fromtimestamp(began, timezone.utc).isoformat(timespec="seconds")
    (folder / "run.json").write_text(json.dumps({"start": {"total_steps": 100, "step": 0, "when": when}}))
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


@pytest.mark.parametrize("end", ["refused", "error", "hung", "lost"])
def test_a_run_that_failed(run, end):
    """Of several ranks the first to fail says why, whether or not its lease was released."""
    (run / "lease-3.json").write_text(json.dumps({"token": "t", "beat": 1, "released": True}))
    beat(run, 0, 2, end="lost", doing="rank 1 on node1 has died")
    beat(run, 1, 2, end=end, doing="loss is not finite")
    found = status.of_run(str(run), lambda seconds: None)
    what = {"hung": "rank 1 on node1 stood still after step 21: loss is not finite", "lost": "rank 1 on node1 has died"}
    assert (found.state, found.why) == ("failed", what.get(end, "rank 1 on node1 failed after step 21: loss is not finite"))
    assert f"reason      {found.why}\n" in status.as_text(found) and json.loads(status.as_json(found))["why"] == found.why
    beat(run, 0, 2, end="stopped", doing="stopped by SIGTERM")  # others may lose a rank that stops
    assert status.of_run(str(run), lambda seconds: None).state == ("stopped" if end in ("hung", "lost") else "failed")


def test_a_job_that_waits_between_two_starts(run):
    beat(run, 1, 2, end="error", doing="OSError: no")
    found = status.of_run(str(run), lambda seconds: None, job_runs=True)
    assert found.state == "waiting" and found.why.endswith("failed after step 21: OSError: no")
    assert "waiting: its job runs, and its ranks do not" in status.as_text(found)
    assert status.of_run(str(run), moving(run, 0, 2), job_runs=True).state == "running"
    (run / "checkpoints" / "step-00000100").mkdir()
    assert status.of_run(str(run), lambda seconds: None, job_runs=True).state == "finished"


def test_the_time_left_is_that_of_the_newest_start(run):
    """Eleven hours lie between two starts, and the second begins at step 10 again."""
    now = time.time()
    rows = [{"step": step, "time": now - 40_000 + step, "loss": 3.0, "images_per_second": 64.0} for step in range(2, 19, 2)]
    rows += [{"step": step, "time": now - 30 + step, "loss": 3.0, "images_per_second": 64.0} for step in range(12, 21, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    when = datetime.fromtimestamp(now - 25, timezone.utc).isoformat(timespec="seconds")
    (run / "run.json").write_text(json.dumps({"start": {"total_steps": 100, "step": 10, "when": when}}))
    assert status.of_run(str(run), moving(run, 0, 1, 2)).seconds_left == pytest.approx(80, rel=0.1)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-4]))  # one line of it tells no pace
    assert status.of_run(str(run), moving(run, 0, 1, 2)).seconds_left is None


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


def test_what_may_be_a_job(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["status", "faces-2"]) == 2
    assert "; for the job of that name or id give --address RAY_ADDRESS too" in capsys.readouterr().err
    assert main(["status", "runs/faces"]) == 2
    assert "--address" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("absent", "sentence"),
    [
        ("launch", "--address needs a checkout, whose launch/ is not installed here"),
        ("ray", "ray is not installed; it comes with"),
    ],
)
def test_a_job_without_a_checkout_or_without_ray(monkeypatch, capsys, absent, sentence):
    """Imports fail as where the package was never installed."""

    class Nothing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == absent:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.split(".")[0] in ("launch", absent)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Nothing(), *sys.meta_path])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == absent else find(name, *rest))
    assert main(["status", "faces", "--address", "127.0.0.1:1"]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and said.out == ""


def test_the_job_of_a_cluster(run, capsys, monkeypatch):
    """The answer of Ray says whether the job runs."""
    pytest.importorskip("ray")
    from launch import attached, connecting

    about = {"protoshard": "faces", "folder": str(run.parent), "stop_file": f"{run.name}/stop"}
    details = SimpleNamespace(submission_id="faces-2", metadata=about, status=SimpleNamespace(is_terminal=lambda: False))
    monkeypatch.setattr(connecting, "connect", lambda address: None)
    monkeypatch.setattr(attached, "jobs", lambda client: [details])
    monkeypatch.setattr(status.of_run, "__defaults__", (lambda seconds: None, False))
    assert main(["status", "faces", "--address", "head:8265", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["run"]) == ("waiting", str(run))


def test_the_command(run, capsys, monkeypatch):
    monkeypatch.setattr(status.time, "sleep", moving(run, 0, 1, 2))
    monkeypatch.setattr(status.of_run, "__defaults__", (moving(run, 0, 1, 2), False))
    assert main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "running"
