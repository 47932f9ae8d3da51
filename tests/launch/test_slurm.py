"""launch/slurm.sbatch on a stand-in for Slurm (slurm.py): its directives, its ranks, and when it queues itself again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dali_loaders.faces import FacesConfig, write_faces
from launch import slurm_rank
from tests.launch import slurm

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "launch" / "slurm.sbatch")


@pytest.fixture
def environment(tmp_path):
    """Of a shell that has Slurm, in a folder that looks like a checkout."""
    (tmp_path / "bin").mkdir()
    slurm.install(tmp_path / "bin")
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return variables | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_STUB": str(tmp_path),
        "PROTOSHARD_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


def submit(environment, *arguments):
    """(exit code, the job's log, calls of srun and scontrol)"""
    folder = Path(environment["SLURM_STUB"])
    done = subprocess.run(["sbatch", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return (
        done.returncode,
        read(folder / "slurm-4711.log") + done.stderr,
        [json.loads(line) for line in read(folder / "calls").splitlines()],
    )


def read(path):
    return path.read_text() if path.exists() else ""


def test_directives_are_those_of_slurm():
    found = slurm.directives(SCRIPT)
    assert found["signal"] == "B:USR1@180" and "requeue" in found and found["open-mode"] == "append"
    lines = Path(SCRIPT).read_text().splitlines()
    assert sum(line.startswith("#SBATCH") for line in lines) == len(found), "one of them stands below a command, where Slurm ignores it"


@pytest.mark.parametrize(
    ("codes", "code", "requeues", "words"),
    [
        ("0", 0, 0, ""),
        ("2", 2, 0, ""),
        ("137refused", 2, 0, ""),  # by one rank, after which others were killed
        ("75", 75, 0, ""),  # of FOLDER/stop or scancel: nobody wants it to go on
        ("76 0", 0, 1, "failure 1, 3 allowed (exit code 76)"),
        ("1 137 76 1", 1, 3, "failure 4, 3 allowed (exit code 1): giving up"),
    ],
)
def test_what_is_queued_again(environment, codes, code, requeues, words):
    folder = Path(environment["SLURM_STUB"])
    (folder / "codes").write_text(codes)
    ended, log, calls = submit(environment, SCRIPT, "stub")
    assert ended == code and calls.count(["scontrol", "requeue", "4711"]) == requeues and words in log, log
    assert not (folder / "codes").read_text()
    assert {path.name for path in folder.iterdir() if path.name.startswith("slurm-")} == {"slurm-4711.log"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([SCRIPT], "no recipe is given"),
        (["--nodes", "0", SCRIPT, "stub"], "invalid --nodes"),
        (["--gpu-per-node", "8", SCRIPT, "stub"], "unrecognized option"),
    ],
)
def test_bad_submissions_end_in_a_sentence(environment, arguments, words):
    code, log, calls = submit(environment, *arguments)
    assert code in (1, 2) and words in log and not calls


def test_without_an_environment_or_slurm_it_says_so(environment):
    environment["PROTOSHARD_PYTHON"] = "/nowhere"
    code, log, _ = submit(environment, SCRIPT, "stub")
    assert code == 2 and "is no checkout with a .venv" in log
    alone = subprocess.run(["bash", SCRIPT, "stub"], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert alone.returncode == 2 and "this script is for sbatch" in alone.stderr


@pytest.mark.slow
def test_two_ranks_train_stop_before_their_time_is_up_and_go_on(environment):
    folder = Path(environment["SLURM_STUB"])
    write_faces(str(folder / "faces.tar"), FacesConfig(identities=9, images_per_identity=6, size=32), workers=1)
    recipe = [str(ROOT / "tests/pipeline/moments.py")]
    environment["RUN"], sets = str(folder / "run"), ["run.epochs=30", "evaluation.data=", "checkpoint.every_steps=0"]
    tasks = ["--ntasks-per-node", "2"]
    # A rank ends although something aborts at the end of its interpreter, as threads of gloo may do.
    (folder / "sitecustomize.py").write_text("import atexit, os\nif 'SLURM_PROCID' in os.environ:\n    atexit.register(os.abort)\n")
    environment["PYTHONPATH"] = f"{folder}:{ROOT}"
    job = subprocess.Popen(["sbatch", *tasks, SCRIPT, *recipe, "--set", *sets], cwd=folder, env=environment)
    try:
        wait_for(lambda: '"loss"' in read(folder / "run/metrics.jsonl"), job, folder)
        (folder / "tell").touch()
        assert job.wait(120) == 0, read(folder / "slurm-4711.log")
    finally:
        job.kill()
        job.wait()
    log = read(folder / "slurm-4711.log")
    assert "stopped by SIGUSR1" in log and "queueing the job again" in log and "resumed from" in log and "ranks: 2 on cpu" in log, log
    steps = [json.loads(line)["step"] for line in read(folder / "run/metrics.jsonl").splitlines() if '"loss"' in line]
    assert steps == list(range(1, len(steps) + 1))


def test_a_rank_leaves_word_of_bad_input(monkeypatch, tmp_path, capfd):
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.setenv(slurm_rank.REFUSED, str(tmp_path / "refused"))
    assert slurm_rank.main(["stub"]) == 2 and (tmp_path / "refused").exists()
    assert "SLURM_PROCID is not set: this module is started by launch/slurm.sbatch" in capfd.readouterr().err


def wait_for(condition, job, folder, seconds=100):
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline, read(folder / "slurm-4711.log")
        time.sleep(0.05)


SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "12",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2(x2)",
    "SLURM_JOB_ID": "1000123",
    "PROTOSHARD_NODES": "a1 a2 a3 a4",
}


def test_the_place_of_a_rank(monkeypatch):
    asked = []
    monkeypatch.setattr(slurm_rank, "address_towards", lambda name: asked.append(name) or "10.0.0.3")
    monkeypatch.setattr(slurm_rank, "card_of", lambda address: f"eth-{address}")
    assert slurm_rank.place(SLURM) == {
        "RANK": "9",
        "WORLD_SIZE": "12",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "a1",
        "MASTER_PORT": "20123",
        "GLOO_SOCKET_IFNAME": "eth-10.0.0.3",
    }
    first = slurm_rank.place(SLURM | {"SLURM_NODEID": "0", "GLOO_SOCKET_IFNAME": "ib0"})
    assert asked == ["a1", "a2"]  # its own name may be 127.0.1.1
    assert "GLOO_SOCKET_IFNAME" not in first
    with pytest.raises(ValueError, match="a3 has 8 GPUs for 2 ranks, and each rank takes one: submit with --ntasks-per-node 8"):
        slurm_rank.place(SLURM | {"SLURM_GPUS_ON_NODE": "8"})
    with pytest.raises(ValueError, match=r"SLURM_NTASKS is not set: this module is started by launch/slurm\.sbatch"):
        slurm_rank.place({"SLURM_PROCID": "0"})
    with pytest.raises(ValueError, match="no list of counts"):
        slurm_rank.tasks_of_nodes("two")
