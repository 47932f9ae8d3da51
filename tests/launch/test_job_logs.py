from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import job, job_logs, log_file
from pipeline import lease_files, run_checkpoints
from pipeline.agreement import Agreement

ROOT = Path(__file__).resolve().parents[2]
CLOCK = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "


def printing(path: Path, program: str, prefix: str = "", everything: bool = True) -> tuple[int, list[str]]:
    """Exit code and console of a program that is kept."""
    script = f"import os, sys\nfrom launch import job_logs\njob_logs.keep({str(path)!r}, {prefix!r}, {everything})\n{program}"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True, timeout=60)
    return done.returncode, done.stdout.splitlines()


def test_the_first_rank_is_shown_and_kept(tmp_path):
    path = tmp_path / "logs" / "job" / "rank-0.log"
    program = """
print("2026-11-26 14:11:12  step 1")
print("a line", file=sys.stderr)
print("[W1126 socket.cpp:464] [c10d] The hostname of the client socket cannot be retrieved.", file=sys.stderr)
print("(RayTrainWorker pid=12, ip=10.0.0.2) 2026-11-26 14:11:13  step 2")
print("(TrainController pid=13) said")
os.system("echo of a child")
os.write(1, b"in ")
import time; time.sleep(0.2)
os.write(1, b"parts")
"""
    code, console = printing(path, program)
    lines = path.read_text().splitlines()
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert code == 0 and len(lines) == 7 and [line for line in lines if "c10d" not in line] == console
    said = [re.sub(CLOCK, "", line) for line in console]
    assert sorted(said) == sorted(["step 1", "a line", "step 2", "said", "of a child", "in parts"]) and all(
        re.match(CLOCK, line) for line in console
    )


def test_what_ray_says_of_its_own_parts_is_in_the_file_alone():
    shown = log_file.Shown(b"", everything=True)
    clock = b"2026-11-26 23:57:27  "
    noise = [
        clock + b"(raylet) Raylet is terminated. Last 20 lines of the Raylet logs:\n",
        b"    *** StackTrace Information ***\n",
        b"    raylet(+0xff770a) [0x55fa1bb8c70a] ray::operator<<()\n",
        b"\n",
        clock + b"(raylet, ip=10.77.0.3) node_manager.cc:519: GCS consider this node to be dead.\n",
        clock + b"- (ip=10.77.0.3, pid=12) world_rank=0\n",
    ]
    assert [shown.of(line) for line in noise] == [None] * len(noise)
    for line in (clock + b"(raylet) 1 Workers killed due to memory pressure (OOM)\n", b"    of it\n", clock + b"step 1\n"):
        assert shown.of(line) == line


def test_other_ranks_are_shown_where_they_warn(tmp_path):
    program = """
print("step 1")
print("2026-11-26 14:11:12  rank 1 on b is still in a training step")
for number in range(30):
    print("UserWarning: of many", number)
"""
    code, console = printing(tmp_path / "rank-1.log", program, "rank 1 on b: ", everything=False)
    assert code == 0 and console[0] == "2026-11-26 14:11:12  rank 1 on b: rank 1 on b is still in a training step"
    assert len(console) <= 2 * (log_file.MOST_SHOWN + 1) and "rank 1 on b: UserWarning: of many 0" in console[1]
    assert any(line.endswith("rank 1 on b: more such lines are in its log") for line in console)
    assert len((tmp_path / "rank-1.log").read_text().splitlines()) == 32


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_last_words_are_kept(tmp_path, number):
    """Also where the signal goes to the whole group, as that of a job that is stopped."""
    program = f"print('last words', flush=True)\nos.kill(os.getpid(), {int(number)})"
    code, console = printing(tmp_path / "rank-0.log", program)
    assert code == -number and console[0].endswith("last words")
    assert "last words" in (tmp_path / "rank-0.log").read_text()


def test_a_crash_in_c_is_kept(tmp_path):
    code, _ = printing(tmp_path / "rank-0.log", "import faulthandler\nfaulthandler.enable()\nos.abort()")
    assert code == -signal.SIGABRT and "Fatal Python error: Aborted" in (tmp_path / "rank-0.log").read_text()


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "file").touch()
    code, console = printing(tmp_path / "file" / "rank-0.log", "print('goes on')")
    assert code == 0 and console[0].endswith("goes on")


def test_the_kernel_tells_that_memory_ran_out(tmp_path):
    (tmp_path / "vmstat").write_text("nr_free_pages 5\noom_kill 3\nzswpin 0\n")
    assert log_file.out_of_memory(str(tmp_path / "vmstat")) == 3
    assert log_file.out_of_memory(str(tmp_path / "none")) == 0 and log_file.out_of_memory() >= 0


def test_logs_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(log_file, "LARGEST", 100)
    file = log_file.File(str(tmp_path / "rank-0.log"))
    for number in range(40):
        file.write(b"line %d\n" % number)
    first, second = (tmp_path / "rank-0.log").read_text(), (tmp_path / "rank-0.log.1").read_text()
    assert len(first) <= 110 and len(second) <= 110 and (second + first).endswith("line 38\nline 39\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-0.log", "rank-0.log.1"]


def test_the_newest_jobs_of_a_run_are_kept(tmp_path):
    for number in range(job_logs.KEPT + 3):
        (tmp_path / "logs" / f"job-{number}").mkdir(parents=True)
        os.utime(tmp_path / "logs" / f"job-{number}", (number, number))
    folder = job_logs.begin(str(tmp_path), "new")
    assert Path(folder).stat().st_mode & 0o777 == 0o700 and len(list((tmp_path / "logs").iterdir())) == job_logs.KEPT
    assert not (tmp_path / "logs" / "job-0").exists() and (tmp_path / "logs" / f"job-{job_logs.KEPT + 2}").exists()
    (tmp_path / "file").touch()
    job_logs.begin(str(tmp_path / "file"), "new")  # cannot be made, which is for the run to say


def test_logs_of_a_job_stay_with_its_run(tmp_path, monkeypatch):
    """--resume none renames the folder in which they were begun. Nothing but logs is no earlier run."""
    monkeypatch.setenv(job.OF_JOB, "job-2")
    assert (job.OF_JOB, job_logs.FOLDER) == (run_checkpoints.OF_JOB, lease_files.LOGS)
    run = tmp_path / "run"
    for name in ("job-1", "job-2"):
        job_logs.begin(str(run), name)
    with (run / "logs" / "job-2" / "rank-0.log").open("w") as file:
        run_checkpoints.set_aside(str(run), Agreement())
        assert not (tmp_path / "run.1").exists()
        (run / "metrics.jsonl").touch()
        run_checkpoints.set_aside(str(run), Agreement())
        file.write("goes on")
    assert (run / "logs" / "job-2" / "rank-0.log").read_text() == "goes on"
    assert [path.name for path in (tmp_path / "run.1" / "logs").iterdir()] == ["job-1"]


def test_logs_of_ray_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(job_logs, "LARGEST_OF_RAY", 100)
    monkeypatch.setattr(job_logs, "ALL_OF_RAY", 250)
    logs = tmp_path / "session" / "logs"
    (logs / "events").mkdir(parents=True)
    for number, name in enumerate(["old.log", "events/event.log", "gcs.out", "empty.log"]):
        (logs / name).write_text("" if "empty" in name else "a\n" * 75 + f"end of {name}")
        os.utime(logs / name, (number, number))
    job_logs.keep_those_of_ray(str(tmp_path / "session"), str(tmp_path / "kept"))
    kept = {str(path.relative_to(tmp_path / "kept")): path.read_text() for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    assert kept.keys() == {"gcs.out", "events/event.log"} and kept["gcs.out"].endswith("end of gcs.out") and len(kept["gcs.out"]) == 98
    job_logs.keep_those_of_ray(str(tmp_path / "nothing"), str(tmp_path / "kept"))


def test_logs_of_ray_keep_secrets_to_the_user(tmp_path):
    """The values of --env are in what Ray says of environments, also in the end of a line that is cut."""
    logs = tmp_path / "session" / "logs"
    logs.mkdir(parents=True)
    (logs / "agent.log").write_text('INFO Creating runtime env: {"KEY": "secret"}\nstarted\nINFO {"env_vars": {"KEY": "secret"}}\n')
    (logs / "raylet.out").write_text("x" * job_logs.LARGEST_OF_RAY + "secret\n--serialized-runtime-env-context=secret\nready\n")
    kept = Path(job_logs.begin(str(tmp_path / "run"), "job")) / "ray-a"
    job_logs.keep_those_of_ray(str(tmp_path / "session"), str(kept))
    assert {path.name: path.read_text() for path in kept.iterdir()} == {"agent.log": "started\n", "raylet.out": "ready\n"}
    assert kept.stat().st_mode & 0o777 == 0o700 and {path.stat().st_mode & 0o777 for path in kept.iterdir()} == {0o600}


def test_logs_of_ray_make_no_folder_of_a_run(tmp_path):
    """The job began none on this host: its run folder was refused, or a host lacks the folder in which the launcher was called."""
    (tmp_path / "session" / "logs").mkdir(parents=True)
    (tmp_path / "session" / "logs" / "raylet.out").write_text("ready\n")
    job_logs.keep_those_of_ray(str(tmp_path / "session"), str(tmp_path / "none" / "run" / "logs" / "job" / "ray-a"))
    assert not (tmp_path / "none").exists()


def test_the_driver_waits_for_its_last_line(tmp_path):
    program = f"from launch import job_logs\nwith job_logs.kept({str(tmp_path / 'driver.log')!r}):\n    print('inside')\nprint('after')"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert [re.sub(CLOCK, "", line) for line in done.stdout.splitlines()] == ["inside", "after"], time.monotonic() - began
    assert (tmp_path / "driver.log").read_text().endswith("inside\n")
