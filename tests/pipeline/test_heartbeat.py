"""A rank that dies, stops or hangs: the others name it within run.timeout and 10 s, and end with exit code 76 and no traceback."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dali_loaders.faces import FacesConfig, write_faces
from dali_loaders.remote import without_secrets
from pipeline import heartbeat, watch
from pipeline.distributed import Place
from pipeline.heartbeat import BYTES, Beat, Peers, of_error, of_thread, place_in_code
from pipeline.stopping import Stop
from pipeline.watch import Watch, failed_collective
from tests.pipeline.moments import TORCHRUN, run

HERE = re.escape(socket.gethostname())
TIMEOUT = 4  # seconds; of run.timeout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("heartbeat")
    write_faces(str(path / "faces.tar"), FacesConfig(identities=9, images_per_identity=6, size=32), workers=1)
    return path


ONE, WAITED = rf"rank 1 on {HERE}", r"[^;]*; rank 0 waited "
LOST = {  # a moment: the exit code, seconds until all is over, and what is said
    "step 3 1 SIGSTOP": (
        76,
        TIMEOUT,
        rf"{ONE} gives no sign of life for \d+ s; last seen after step \d in{WAITED}for \d+ s \(run",
    ),
    "step 3 1 hang": (76, TIMEOUT, rf"{ONE} [^;]*after step 3 in a training step, _fit"),
    "step 3 1 raise": (1, 0, rf"{ONE} ended after step 3: ArithmeticError: a deed of the test{WAITED}in a training step, \w+ of"),
    "step 3 1 refuse": (2, 0, r"^protoshard: evaluation.batch_size is 0, but must be at least 1$"),
    "batch 8 1 hang": (76, TIMEOUT, rf"{ONE} [^;]*after step \d+ in a training step, waiting for data"),
    "evaluation 2 1 SIGKILL": (76, 0, rf"{ONE} has died; last seen after step .*\n.*was ended by SIGKILL \(out of memory\?\)"),
    "opening 1 1 SIGKILL": (76, 0, rf"{ONE} has died; last seen at the start in{WAITED}in opening the data, all_gather_object"),
}
SMALL = ("step 3 1 SIGSTOP", "step 3 1 raise", "batch 8 1 hang")


@pytest.mark.slow
@pytest.mark.parametrize("moment", [moment if moment in SMALL else pytest.param(moment, marks=pytest.mark.long) for moment in LOST])
def test_the_others_name_the_rank_that_was_lost(folder, moment):
    place = folder / moment.replace(" ", "-")
    code, output = run(place, moment, TIMEOUT=str(TIMEOUT))
    seconds = time.time() - os.stat(f"{place}.deed").st_mtime
    expected, patience, sentence = LOST[moment]
    print(f"{seconds:.1f} s", output)
    assert code == expected and re.search(sentence, output, re.MULTILINE), output
    assert output.count("Traceback") == ("raise" in moment) and output.count("batch_size") == ("refuse" in moment)
    assert seconds < patience + 10
    if code == 76:  # what the first rank that lives has called last
        living = "collectives-00000.json"
        recorded = json.loads((place / heartbeat.FOLDER / living).read_text())["entries"]
        assert recorded[-1]["profiling_name"].startswith("gloo:")
    if moment == SMALL[0]:
        assert run(place)[0] == 0


@pytest.mark.long
def test_torchrun(folder):
    code, output = run(folder / "torchrun", "step 3 1 SIGSTOP", command=TORCHRUN, TIMEOUT=str(TIMEOUT))
    assert code == 1 and re.search(r"exitcode +: 76", output) and f"rank 1 on {socket.gethostname()} gives no sign of life" in output, (
        output
    )


@pytest.mark.long
def test_torchrun_starts_the_ranks_again(folder):
    again = ("-m", "torch.distributed.run", "--max-restarts", "1", *TORCHRUN[3:])
    code, output = run(folder / "again", "step 7 1 SIGKILL", "--resume", "auto", command=(TORCHRUN[0], *again))
    assert code == 1 and output.count("resumed from") == 1, output  # and dies there once more


def test_a_heartbeat_holds_no_secrets(tmp_path):
    heartbeat.write(str(tmp_path), beat(doing="ValueError: s3://me:SECRET@host/a.tar?sig=SECRET is no folder"))
    assert b"SECRET" not in Path(heartbeat.path_of(str(tmp_path), 1)).read_bytes()


def beat(rank=1, count=1, **changes):
    values = {
        "run": "r",
        "rank": rank,
        "count": count,
        "host": "elsewhere",
        "pid": 1,
        "step": 7,
        "doing": "a training step",
        "is_waiting": True,
    }
    return Beat(**{**values, **changes})


@given(st.text(max_size=3000), st.text(max_size=300))
def test_whatever_a_rank_does_fits_its_file(tmp_path_factory, doing, host):
    folder = str(tmp_path_factory.getbasetemp())
    heartbeat.write(folder, beat(doing=doing + "\udcff", host=host))
    assert os.path.getsize(heartbeat.path_of(folder, 1)) == BYTES
    read = heartbeat.read(folder, 1, "r")
    assert read is not None and without_secrets(doing + "\udcff").startswith(read.doing) and host.startswith(read.host)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"[" * 1024, b"\xff" * 1024, json.dumps({"run": "r"}).encode(), b'{"count": 1e999}']
)
def test_a_file_that_is_no_heartbeat_says_nothing(tmp_path, content):
    heartbeat.write(str(tmp_path), beat())
    with open(heartbeat.path_of(str(tmp_path), 1), "r+b") as file:
        file.truncate()
        file.write(content)
    assert heartbeat.read(str(tmp_path), 1, "r") is None


def test_only_heartbeats_of_this_start_of_the_run_count(tmp_path):
    heartbeat.write(str(tmp_path), beat())
    assert heartbeat.read(str(tmp_path), 1, "r") == beat() and heartbeat.read(str(tmp_path), 1, "another") is None
    (tmp_path / heartbeat.FOLDER).rename(tmp_path / "aside")  # as --resume none does
    assert heartbeat.read(str(tmp_path), 1, "r") is None
    heartbeat.write(str(tmp_path), beat(count=2))
    assert heartbeat.read(str(tmp_path), 1, "r") == beat(count=2)
    assert os.stat(heartbeat.path_of(str(tmp_path), 1)).st_mode & 0o002 == 0


def test_silence_is_measured_by_the_own_clock(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock[0])
    peers = Peers(str(tmp_path), "r", rank=0, ranks=4)
    for now in range(6):
        clock[0] = float(now)
        heartbeat.write(str(tmp_path), beat(1, count=now))
        heartbeat.write(str(tmp_path), beat(2, count=min(now, 1)))
        os.utime(heartbeat.path_of(str(tmp_path), 1), (0, 0))  # whatever the clocks of hosts say
        peers.look()
    assert (peers.silent(3), peers.silent_for(2), peers.silent_for(3)) == ([2, 3], 4.0, 5.0)  # the last one has never written
    heartbeat.write(str(tmp_path), beat(2, count=1, end="error", doing="RuntimeError: out of memory"))
    peers.look()
    assert peers.silent(3) == [3] and [end.rank for end in peers.ended("error")] == [2]


def test_a_process_of_this_machine_that_is_gone_is_dead_at_once(tmp_path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    for rank, pid in ((1, done.pid), (2, os.getpid())):
        heartbeat.write(str(tmp_path), beat(rank, pid=pid, host=socket.gethostname()))
    peers = Peers(str(tmp_path), "r", rank=0, ranks=3)
    peers.look()
    assert peers.dead == [1]


def test_where_a_rank_is():
    waiting, go_on = threading.Event(), threading.Event()
    space: dict = {"__name__": "torch.distributed.distributed_c10d", "waiting": waiting, "go_on": go_on}
    exec("def all_reduce():\n    waiting.set()\n    go_on.wait()", space)
    caller = {"__name__": "pipeline.agreement", "all_reduce": space["all_reduce"]}
    exec(compile("def highest():\n    all_reduce()", "/x/pipeline/agreement.py", "exec"), caller)
    thread = threading.Thread(target=caller["highest"])
    thread.start()
    waiting.wait()
    assert place_in_code(of_thread(thread.ident)) == ("all_reduce of highest (pipeline/agreement.py:2)", True)
    go_on.set()
    thread.join()
    with pytest.raises(ValueError) as raised:
        json.loads("{")
    assert place_in_code(of_error(raised.value)) == ("", False)  # nothing of ours


def test_what_means_that_a_rank_may_be_lost():
    text = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"
    wrapped = ValueError("a step failed")
    wrapped.__cause__ = RuntimeError(text)
    assert failed_collective(RuntimeError(text)) and failed_collective(wrapped) and failed_collective(dist.DistBackendError("NCCL"))
    assert not failed_collective(RuntimeError("out of memory")) and not failed_collective(ValueError("gloo/"))


@pytest.fixture
def watching(tmp_path, monkeypatch):
    """A Watch of rank 0 of 3 whose thread is not started, with a clock and its lines."""
    clock, lines = [0.0], []
    for module in (heartbeat, watch):
        monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    found = Watch(str(tmp_path), Place(0, 3, torch.device("cpu")), 60, Stop(), "r")
    found.begin(lines.append, None)
    found._peers = Peers(str(tmp_path), "r", 0, 3)

    def look(seconds, *beats):
        clock[0] += seconds
        for peer in beats:
            heartbeat.write(str(tmp_path), peer)
        found._look()

    return found, look, lines


def test_a_long_wait_is_told_with_the_rank_that_is_waited_for(watching, monkeypatch):
    _, look, lines = watching
    monkeypatch.setattr(watch, "place_in_code", lambda frames: ("all_reduce of highest", True))
    for count in range(130):
        look(1, beat(1, count), beat(2, count, is_waiting=False, doing="waiting for data: /x"))
    wait = "at the start rank 0 still waits in starting, all_reduce of highest: rank 2 on elsewhere is after step 7 in waiting for data: /x"
    assert lines == [f"61 s {wait}", f"2 min {wait}"]


def test_steps_that_are_slow_are_not_told_again_and_again(watching):
    found, look, lines = watching
    for step in range(5):
        found.at("a training step", step)
        for count in range(100):
            look(1, beat(1, 100 * step + count), beat(2, 100 * step + count))
    assert len(lines) == 1


def test_a_job_that_was_suspended_as_a_whole_does_not_hang(watching):
    found, look, lines = watching
    look(1, beat(1), beat(2))
    look(100_000, beat(1), beat(2))
    look(1, beat(1, 2), beat(2, 2))
    assert found._stood < 10 and not lines


def test_a_full_disk_is_told_once(watching, monkeypatch):
    _, look, lines = watching

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(heartbeat.os, "pwrite", full)
    look(1)
    look(1)
    assert len(lines) == 1 and "No space left on device): training goes on" in lines[0]
