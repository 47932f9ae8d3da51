"""Jobs on two Ray nodes of this machine, and a cluster that the launcher starts itself. The trainer is stub/pipeline, except in one test.
Only processes started here are ever signalled, other Ray clusters of the machine stay as they are."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.launch.ray_nodes import ROOT, Command, losses, steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def wait_for_step(number: int, folder: Path, job: Command) -> None:
    job.until(lambda: len(steps(folder)) > number)


def worker(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / "run" / f"worker{rank}.json").read_text())


def test_training_ends_with_the_losses_of_an_undisturbed_run(two_nodes, tmp_path):
    """The real trainer: faces drawn for the test, 72 steps, a checkpoint every 10, one of the two workers killed.

    --resume none counts for the first attempt only."""
    protoshard = [sys.executable, "-m", "pipeline.cli"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    drawing = [*protoshard, "data", "faces", "faces.tar", "--identities", "24", "--images", "12", "--size", "32"]
    subprocess.run(drawing, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=60)
    settings = ["data.train=faces.tar", "data.image_size=32", "run.batch=32", "run.epochs=8", "run.log_every=1"]
    settings += ["checkpoint.every_steps=10", "backbone.width=32", "engine.precision=float32", "evaluation.data="]
    overrides = [word for setting in settings for word in ("--set", setting)]
    quiet = [*protoshard, "train", "faces_small", "--ranks", "2", *overrides, "--set", "run.folder=quiet"]
    subprocess.run(quiet, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=120)
    command = ("faces_small", "--address", two_nodes.head, "--resume", "none", *overrides, "--set", "run.folder=killed")
    job = Command(tmp_path, *command, env={**two_nodes.env, "PYTHONPATH": str(ROOT)})
    try:
        job.until(lambda: len(losses(tmp_path / "killed")) >= 15)
        workers = [process for node in two_nodes.processes for process in psutil.Process(node.pid).children(recursive=True)]
        next(process for process in workers if "RayTrainWorker" in " ".join(process.cmdline())).kill()
    finally:
        code, log = job.wait(), job.said
    assert (
        code == 0
        and re.search(r"Failure 1, 3 allowed .*rank [01] on \S+ died without a word", log)
        and "resumed from killed/checkpoints/step-" in log
    ), log
    assert not list(tmp_path.glob("*/logs/*/storage-*"))
    killed, undisturbed = losses(tmp_path / "killed"), losses(tmp_path / "quiet")
    assert len(undisturbed) == 72
    print(f"largest relative deviation of 72 losses: {max(abs(killed.get(step, 0) / loss - 1) for step, loss in undisturbed.items()):.1e}")
    assert killed == pytest.approx(undisturbed, rel=1e-4)


@pytest.mark.long  # test_failures.py and test_ray_worker.py have its parts
def test_bad_input_of_one_rank_is_not_tried_again(two_nodes, tmp_path):
    job = Command(tmp_path, "stub", "--address", two_nodes.dashboard, "--set", "fail=bad input", env=two_nodes.env)
    code, log = job.wait(), job.said
    assert code == 2, log
    assert "multinode.sh: File faces.tar has no image; give a folder of images." in log
    assert "Traceback" not in log and "Failure" not in log


def test_a_wrong_token_is_bad_input(two_nodes, tmp_path):
    job = Command(tmp_path, "stub", "--address", two_nodes.dashboard, env={**two_nodes.env, "RAY_AUTH_TOKEN": "0" * 32})
    code, log = job.wait(), job.said
    assert code == 2 and log.startswith("multinode.sh: The Ray cluster at http://") and log.count("\n") == 1, log


@pytest.mark.long  # test_failures.py counts them
def test_failures_run_out(two_nodes, tmp_path):
    job = Command(tmp_path, "stub", "--address", two_nodes.dashboard, "--max-failures", "0", "--set", "fail=bug", env=two_nodes.env)
    code, log = job.wait(), job.said
    assert code == 1 and "Failure 1, 0 allowed" in log and "RuntimeError: a bug" in log, log


def test_interrupting_leaves_the_users_cluster_without_the_job(two_nodes, tmp_path):
    note = "my faces [1, 2] 'a' \"b\" $HOME"
    job = Command(
        tmp_path, "stub", "--address", two_nodes.dashboard, "--set", "steps=10000", "pause=0.1", f"run.note={note}", env=two_nodes.env
    )
    try:
        wait_for_step(2, tmp_path, job)
        job.process.send_signal(signal.SIGINT)
        time.sleep(1.2)
        job.process.send_signal(signal.SIGINT)
    finally:
        code = job.wait()
    assert code == 130, job.said
    last = worker(tmp_path, 1)
    assert (last["note"], last["RANK"], last["WORLD_SIZE"], last["MASTER_PORT"].isdigit()) == (note, "1", "2", True)
    deadline = time.monotonic() + 20
    while psutil.pid_exists(last["pid"]):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_cluster_of_its_own_is_closed_to_others_and_stopped_on_sigterm(two_nodes, tmp_path):
    """Nothing listens to other machines, other users see neither files nor token, and nothing is left."""
    job = Command(tmp_path, "stub", "--ranks-per-node", "2", "--set", "steps=10000", "pause=0.1")
    started: list[psutil.Process] = []
    listening, tokens, commands, ranks = set(), set(), [], []
    try:
        wait_for_step(2, tmp_path, job)
        started = psutil.Process(job.process.pid).children(recursive=True)
        for process in started:
            with suppress(psutil.NoSuchProcess):
                listening |= {
                    connection.laddr.ip for connection in process.net_connections("inet") if connection.status == psutil.CONN_LISTEN
                }
                commands += process.cmdline()
                ranks += [process.nice()] * process.cmdline()[0].startswith("ray::RayTrainWorker")
                tokens.add(process.environ().get("RAY_AUTH_TOKEN", ""))
        folders = {Path(*Path(word.partition("=")[2]).parts[:3]) for word in commands if word.startswith("--temp-dir=")}
        below = [path for folder in folders for path in folder.rglob("*")]
        storage = list(tmp_path.glob("run/logs/*/storage-*"))
        modes = [path.stat().st_mode & 0o777 for path in (*folders, *storage)]
        read = [job.log, *(path for path in below if path.is_file() and not path.is_symlink())]
        (token,) = tokens - {""}
        token_modes = [(path / "token").stat().st_mode & 0o777 for path in folders]
        telling = [path for path in read if token.encode() in path.read_bytes()]
    finally:
        job.process.terminate()
        code, log = job.wait(), job.said
    assert "Traceback" not in log, log  # with another cluster on this machine, two_nodes
    assert code == 75 and log.count("multinode.sh: stopped at step ") == 1 and log.count("step 1 total") == 1, log
    assert not (tmp_path / "run" / "stop").exists()
    assert len(started) > 5 and ranks == [os.getpriority(os.PRIO_PROCESS, 0)] * 2
    actors = " ".join(command for command in commands if command.startswith("ray::"))
    assert "TrainController" in actors and not re.search("DatasetManager|Autoscaling|Cleaner", actors), actors
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"} and listening
    assert not any(token in word for word in commands) and token not in log
    assert telling == [path / "token" for path in folders] and token_modes == [0o600]
    assert len(folders) == 1 and len(storage) == 1 and modes == [0o700, 0o700] and len(below) > 5
    _, alive = psutil.wait_procs(started, timeout=5)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert not any(path.exists() for path in (*folders, *storage))
