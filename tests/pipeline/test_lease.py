"""A second run is kept out of a run's folder, by whatever name, from whatever host it comes, and a run that lost its folder knows it."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
import torch.distributed as dist

from pipeline import lease, lease_files, lease_hold
from pipeline.agreement import Agreement
from pipeline.checkpoint import OwnerError
from pipeline.distributed import Place, join
from pipeline.lease import Lease
from pipeline.run_checkpoints import set_aside

PLACE = Place(0, 1, torch.device("cpu"))
BEAT = 0.04


def is_free(folder):
    """Whether another one gets the lease, which keeps out the same process too."""
    try:
        Lease(str(folder), PLACE).release()
    except ValueError as error:
        assert "another run is writing to" in str(error)
        return False
    return True


def note(folder, number=1):
    return json.loads((folder / f"lease-{number}.json").read_text())


HOLDER = """
    import sys, time
    import torch
    from pipeline import lease_files
    from pipeline.distributed import Place, join
    from pipeline.lease import Lease
    folder, boot, beat = sys.argv[1:]
    if boot != "here":
        lease_files._boot_id = lambda: boot
    join("cpu")
    held = Lease(folder, Place(0, 1, torch.device("cpu")), beat=float(beat))
    print("held", held.token, flush=True)
    time.sleep(300)
"""


@pytest.fixture
def hold():
    """Starts a process that holds a folder, on another host if `boot` is not "here"."""
    processes = []

    def start(folder, boot="here", beat=BEAT):
        command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder), boot, str(beat)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def elsewhere(monkeypatch):
    """This process comes from another host, over a file system whose locks do not reach so far."""
    monkeypatch.setattr(lease_files, "_boot_id", lambda: "another")
    monkeypatch.setattr(lease_files, "lock", lambda descriptor: None)
    monkeypatch.setattr(lease, "lock", lambda descriptor: None)


@pytest.fixture
def run(tmp_path, monkeypatch):
    join("cpu")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "big" / "run"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "runs").symlink_to(tmp_path / "big")
    yield folder
    dist.destroy_process_group()


@pytest.mark.parametrize("first", ["big/run", "link", "runs/run"])
def test_the_same_folder_by_another_name(run, first):
    held = Lease(first, PLACE)
    for name in ("big/run", "link", "runs/run", "./big/../link", str(run)):
        assert not is_free(name), name
    held.release()
    assert is_free("link")


def test_a_folder_that_was_renamed_is_still_held_and_so_is_its_name(run):
    """As a bind mount would, the new name leads to the same folder."""
    held = Lease(str(run), PLACE)
    os.rename(run, run.with_name("renamed"))
    assert not is_free(run.with_name("renamed")) and not is_free(run)
    held.release()
    assert is_free(run.with_name("renamed")) and is_free(run)


def test_a_run_that_is_set_aside_is_free_again_and_the_new_one_held(run):
    (run / "metrics.jsonl").touch()
    held = Lease("link", PLACE)
    set_aside("link", Agreement())  # which keeps the link, and does not move the new run to the disk on which the link lies
    held.follow()
    assert os.path.islink("link") and set(os.listdir("link")) == {"lease-1.json", "checkpoints"}
    assert (run.with_name("run.1") / "metrics.jsonl").exists()
    assert is_free(f"{run}.1") and not is_free("link")
    held.check()
    held.release()


def test_a_new_folder_is_not_set_aside(run):
    held = Lease("link", PLACE)
    set_aside("link", Agreement())
    assert sorted(os.listdir("big")) == [".run.lock", "run"]
    held.release()


def test_a_link_to_a_folder_that_does_not_exist_yet(run):
    run.rmdir()
    lease = Lease("link", PLACE)
    assert run.is_dir()
    lease.release()
    assert not run.exists()  # nothing was done there


def test_a_folder_that_cannot_be_made(run):
    run.rmdir()
    run.touch()
    with pytest.raises(ValueError, match=r"run\.folder=link cannot be written \(File exists\): choose another folder"):
        Lease("link", PLACE)


def test_two_runs_whose_checkpoints_are_the_same_folder(run, tmp_path):
    (tmp_path / "store").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoints").symlink_to(tmp_path / "store")
    held = Lease("a", PLACE)
    assert not is_free("b") and not is_free("store")
    held.release()
    assert is_free("b")
    held = Lease("big/run", PLACE)  # whose own folder they are
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "checkpoints").symlink_to(run / "checkpoints")
    assert not is_free("c") and not is_free("big/run/checkpoints")
    held.release()


def test_a_killed_run_leaves_its_folder_to_the_next_at_once(run, hold, monkeypatch, caplog):
    killed = hold("link")
    assert killed.stdout.readline().startswith("held")
    with pytest.raises(ValueError, match=rf"another run is writing to {run}, a run on \S+ \(process {killed.pid}, since 2"):
        Lease("runs/run", PLACE)
    killed.send_signal(signal.SIGSTOP)  # it lives, and may go on
    time.sleep(4 * BEAT)
    assert not is_free("link")
    killed.kill()
    killed.wait()
    monkeypatch.setattr(lease_hold, "_pause", lambda seconds: pytest.fail("waits"))
    monkeypatch.setattr("socket.gethostname", lambda: "renamed")
    held = Lease("link", PLACE)
    assert [name for name in os.listdir(run) if name.startswith("lease")] == ["lease-2.json"] and note(run, 2)["host"] == "renamed"
    held.release()


def test_of_two_processes_that_start_together_one_wins(run, hold):
    both = [hold("link"), hold("big/../runs/run")]
    said = [process.stdout.readline()[:4] for process in both]
    assert sorted(said) == ["", "held"]
    assert "another run is writing to" in both[said.index("")].stderr.read()


def test_from_another_host_a_living_run_is_seen_and_a_dead_one_followed(run, hold, monkeypatch, caplog):
    holder = hold("link")
    assert holder.stdout.readline().startswith("held")
    elsewhere(monkeypatch)
    monkeypatch.setattr("time.time", lambda: 0.0)  # whatever the clocks say
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match=r"another run is writing to .*\(process \d+, since"):
        Lease("link", PLACE, beat=2 * BEAT)
    assert "waiting 0 s to see whether it lives" in caplog.text and f"{run} belongs to a run on" in caplog.text
    holder.kill()
    holder.wait()
    began = time.monotonic()
    held = Lease("link", PLACE, beat=2 * BEAT)
    waited = time.monotonic() - began
    assert 6 * BEAT < waited < 12 * BEAT, "once for both of its folders"
    held.release()


def test_a_run_that_was_suspended_learns_that_its_folder_was_taken(run, hold, monkeypatch):
    """On another host nobody can tell it from a dead one. What wakes up must not write."""
    suspended = Lease(str(run), PLACE, beat=1000.0)  # no beat is seen
    with monkeypatch.context() as patch:
        elsewhere(patch)
        taker = Lease(str(run), PLACE, beat=BEAT)
    suspended._beat = 0.0  # it wakes up, after many
    assert not suspended.is_ours()
    with pytest.raises(
        OwnerError, match=rf"{run} was taken over by a run on .* while this run did not answer: it ends, and writes no more"
    ):
        suspended.check()
    suspended.release()
    taker.check()
    assert not note(run, 2)["released"]
    taker.release()
    assert note(run, 2)["released"] and note(run / "checkpoints", 2)["token"] == taker.token != suspended.token


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_later_attempt_of_a_job_takes_the_folder_at_once_and_an_earlier_one_writes_no_more(run, monkeypatch, where, caplog):
    """As where ranks were cut off, and others took their place: both live, and hold the lock."""
    beat = 1000.0 if where == "here" else 4.0  # without locks a fourth of it passes before a lease is sure
    if where == "elsewhere":
        elsewhere(monkeypatch)
    monkeypatch.setenv(lease_hold.ATTEMPT, "job 1")
    cut_off = Lease(str(run), PLACE, beat=beat)
    for other in ("job 1", "job 0", "another 2", "", "job x"):
        monkeypatch.setenv(lease_hold.ATTEMPT, other)
        if where == "here":
            assert not is_free(run), other
    caplog.clear()
    monkeypatch.setenv(lease_hold.ATTEMPT, "job 2")
    later = Lease(str(run), PLACE, beat=beat)
    assert "waiting" not in caplog.text
    with pytest.raises(OwnerError, match=r"was taken over by a run on .*: it ends, and writes no more"):
        cut_off.check()
    later.check()
    monkeypatch.setenv(lease_hold.ATTEMPT, "job 1")
    if where == "here":
        assert not is_free(run)
    cut_off.release()
    later.check()
    later.release()
    assert is_free(run)


def test_a_heartbeat_goes_on_through_a_full_disk_and_a_folder_that_vanishes(run, monkeypatch, caplog):
    held = Lease(str(run), PLACE, beat=BEAT)

    def beats():
        before = note(run)["beat"]
        time.sleep(5 * BEAT)
        return note(run)["beat"] > before

    assert beats() and os.path.getsize(run / "lease-1.json") == 512
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        time.sleep(5 * BEAT)
        assert caplog.text.count("cannot be renewed (No space left on device): trying again") == 1
        held.check()
    assert beats()
    os.rename(run, run.with_name("away"))  # as a file system would that is unmounted for a while
    with pytest.raises(OSError, match="No such file or directory"):
        held.check()
    run.mkdir()
    (run / "checkpoints").mkdir()
    with pytest.raises(OSError, match="is another folder now: was it moved, or its disk unmounted"):
        held.check()
    os.rename(run, run.with_name("empty"))
    os.rename(run.with_name("away"), run)
    held.check()
    assert beats()
    (run / "lease-1.json").unlink()  # somebody tidies up
    held.check()
    assert beats() and not is_free(run)
    held.release()


@pytest.mark.parametrize("failing", ["open", "pwrite"])
def test_no_room_for_a_lease(run, monkeypatch, failing):
    def full(path, *_):
        if not isinstance(path, str) or "lease-" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *_)

    real = getattr(os, failing)
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(ValueError, match=r"big/run cannot be written \(No space left on device\): make room there, or choose another"):
            Lease("big/run", PLACE)
    assert os.listdir(run) == []
    (run / "checkpoints").symlink_to("/proc/nowhere")
    with pytest.raises(ValueError, match=r"checkpoint\.folder=\S+/checkpoints cannot be written"):
        Lease("big/run", PLACE)
    (run / "checkpoints").unlink()
    assert is_free(run)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\0" * 512, b"null", b'{"kernel": 5, "pid": "\x1b[31m"}', b"[" * 4096])
def test_a_lease_that_cannot_be_read_belongs_to_somebody_until_it_does_not_move(run, content):
    (run / "lease-7.json").write_bytes(content)
    held = Lease("link", PLACE, beat=BEAT)
    assert [name for name in os.listdir(run) if name.startswith("lease")] == ["lease-8.json"]
    held.release()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_in_place_of_a_lease(run, make):
    make(run / "lease-7.json")
    with pytest.raises(ValueError, match=r"run\.folder=link cannot be written"):
        Lease("link", PLACE, beat=BEAT)


def test_a_child_does_not_keep_the_lock_of_its_killed_parent(run):
    code = """
        import os, sys, time, torch
        from pipeline.distributed import Place, join
        from pipeline.lease import Lease
        join("cpu")
        held = Lease(sys.argv[1], Place(0, 1, torch.device("cpu")))
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        print(child, flush=True)
        os.kill(os.getpid(), 9)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(run)], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        parent.wait()
        assert is_free(run)
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdout.close()


def test_nobody_else_can_write_a_lease(run):
    before = os.umask(0)
    try:
        Lease(str(run), PLACE).release()
    finally:
        os.umask(before)
    for path in (run / "lease-1.json", run / "checkpoints" / "lease-1.json", run.with_name(".run.lock")):
        assert path.stat().st_mode & 0o777 == 0o644


def test_a_store(run):
    held = Lease("link", PLACE, "memory://bucket/run", beat=BEAT)
    (run.parent / "other").mkdir()
    with pytest.raises(ValueError, match="another run is writing to memory://bucket/run, a run on"):
        Lease("big/other", PLACE, "memory://bucket/run", beat=2 * BEAT)
    held.check()
    held.release()
    Lease("big/other", PLACE, "memory://bucket/run", beat=BEAT).release()
    with pytest.raises(ValueError, match="nosuch"):
        Lease("big/other", PLACE, "nosuch://bucket/run", beat=BEAT)
    assert is_free("big/other"), "nothing is kept of a lease that was not had whole"


def on_each_rank(folder):
    place = join("cpu")
    try:
        held = Lease(folder, place)
    except ValueError as error:
        return str(error)
    held.check()
    held.release()
    return held.token


def test_all_ranks_learn_the_token_or_the_fault(run, ranks):
    first, second = ranks(2).run(on_each_rank, str(run))
    assert first == second and len(first) == 32
    held = Lease(str(run), PLACE)
    first, second = ranks(2).run(on_each_rank, str(run))
    assert first == second and first.startswith(f"another run is writing to {run}")
    held.release()


MOUNTS = "unshare -rm true"


@pytest.mark.skipif(subprocess.run(MOUNTS.split(), capture_output=True).returncode != 0, reason=f"cannot mount here: {MOUNTS} fails")
def test_bind_mounts_full_and_read_only_disks(run):
    code = """
        import os, sys, torch
        from pipeline.distributed import Place, join
        from pipeline.lease import Lease
        join("cpu")
        def attempt(folder):
            try:
                Lease(folder, Place(0, 1, torch.device("cpu"))).release()
                print("free", flush=True)
            except ValueError as error:
                print(error, flush=True)
        held = Lease("bound", Place(0, 1, torch.device("cpu")))
        attempt("big/run")
        held.release()
        attempt("big/run")
        with open("small/fill", "wb", 0) as file:
            try:
                while True:
                    file.write(bytes(1024))
            except OSError:
                pass
        attempt("small/run")
        attempt("fixed")
        attempt("fixed/new")
    """
    for name in ("bound", "small", "fixed"):
        (run.parents[1] / name).mkdir()
    mounts = "mount --bind big/run bound && mount -t tmpfs -o size=64k none small && mount -t tmpfs -o ro none fixed"
    command = ["unshare", "-rm", "sh", "-c", f'{mounts} && exec "$0" -c "$1"', sys.executable, textwrap.dedent(code)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0].startswith(f"another run is writing to {run}, a run on")
    assert said[1:] == [
        "free",
        "run.folder=small/run cannot be written (No space left on device): make room there, or choose another folder",
        "run.folder=fixed cannot be written (Read-only file system): choose another folder",
        "run.folder=fixed/new cannot be written (Read-only file system): choose another folder",
    ]
