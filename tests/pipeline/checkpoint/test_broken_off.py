"""A save that is broken off or fails at any of its calls: earlier checkpoints stay, the run goes on, the next save tries again; and the
order of calls, which a power loss puts to the test."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from pipeline import checkpoint
from pipeline.checkpoint import saving
from tests.pipeline.checkpoint.breaking import KilledError, breaking, broken, full, watched
from tests.pipeline.checkpoint.states import shared, state
from tests.pipeline.checkpoint.threads import on_threads


def save(folder, step, ranks=2, keep=2, asynchronous=False):
    """The saver of each rank, after a save."""

    def write(agreement):
        saver = checkpoint.Saver(str(folder), checkpoint.CheckpointConfig(asynchronous=asynchronous, keep=keep), agreement)
        saver.start(step, state(step, of=(agreement.rank, agreement.ranks)), {"consumed": step}, ["a", "b"])
        saver.finish()
        return saver

    return on_threads(ranks, write)


def is_sound(folder, step):
    found = checkpoint.newest(str(folder))
    assert found is not None and found.info["step"] == step
    assert all(torch.equal(found.whole(name), tensor) for name, tensor in shared(step).items())
    return True


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two")
    save(folder, 1), save(folder, 2)
    return folder


def test_killed_at_any_call(two, tmp_path):
    """Two checkpoints are there, and a third one is on its way, which replaces both."""
    for number in itertools.count():
        shutil.rmtree(tmp_path)
        shutil.copytree(two, tmp_path)
        try:
            with breaking(number, KilledError, lasts=True) as calls:
                save(tmp_path, 3, keep=1)
        except KilledError:
            committed = "step-00000003" in os.listdir(tmp_path)
            assert committed == ("rename" in calls[:-1])
            assert is_sound(tmp_path, 3 if committed else 2)
            # The next start goes on from there, clears away what is left, and saves again.
            for saver in save(tmp_path, 4, keep=1):
                assert saver.trouble is None and saver.committed == 4
            assert is_sound(tmp_path, 4)
            assert os.listdir(tmp_path) == ["step-00000004"]
        else:
            break
    assert number > 30


def _child(folder):
    """Of the next test: ends at each call in turn."""
    for number in itertools.count():
        save(folder, 2, ranks=1)
        child = os.fork()
        if child == 0:
            with breaking(number, lambda: os._exit(3)):
                save(folder, 3, ranks=1, keep=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert is_sound(folder, 3 if is_there(folder, 3) else 2)
        shutil.rmtree(folder)
        if status == 0:
            return number


def test_a_process_that_ends_at_any_call(tmp_path):
    """As before, in real processes, from which no line of Python runs on."""
    code = f"from tests.pipeline.checkpoint.test_broken_off import _child; assert _child({str(tmp_path / 'x')!r}) > 15"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("error", "asynchronous"), [(full, True), (broken, False)])
def test_any_call_fails_and_the_run_goes_on(two, tmp_path, error, asynchronous):
    """Either the save succeeds in spite of it, or it is said, on every rank, and the earlier ones stay. The next one tries again."""
    for number in itertools.count():
        shutil.rmtree(tmp_path)
        shutil.copytree(two, tmp_path)
        with breaking(number, error) as calls:
            savers = save(tmp_path, 3, asynchronous=asynchronous)
        if len(calls) <= number:
            break
        troubles = {saver.trouble for saver in savers}
        assert len(troubles) == 1
        (trouble,) = troubles
        if trouble is not None:
            assert trouble == (f"step 3 could not be saved to {tmp_path} ({error().strerror}); earlier checkpoints are untouched")
            assert {"step-00000001", "step-00000002"} <= set(os.listdir(tmp_path))
            assert {saver.committed for saver in savers} == {None}
        else:
            assert is_sound(tmp_path, 3)
        committed = is_there(tmp_path, 3)  # also where the folder could not be synced after the rename
        assert is_sound(tmp_path, 3 if committed else 2)
        assert all(saver.trouble is None for saver in save(tmp_path, 4))
        assert is_sound(tmp_path, 4) and not [name for name in os.listdir(tmp_path) if name.endswith((".partial", ".removed"))]
    assert number > 30


def is_there(folder, step):
    return f"step-{step:08d}" in os.listdir(folder)


def test_the_same_saver_tries_again(tmp_path, caplog):
    saver = checkpoint.Saver(str(tmp_path), checkpoint.CheckpointConfig())
    for step, is_full in ((1, False), (2, True), (3, True), (4, False)):
        with breaking(0 if is_full else -1, full, names=("write",)), caplog.at_level(logging.WARNING):
            saver.start(step, state(step), {})
            saver.finish()
        if is_full:
            assert saver.trouble.startswith(f"step {step} could not be saved") and saver.committed == 1
            assert f"step {step} could not be saved to {tmp_path} (No space left on device)" in caplog.text
            assert os.listdir(tmp_path) == ["step-00000001"]  # nothing is left of it
        else:
            assert saver.trouble is None and saver.committed == step
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000004"]


def test_one_rank_s_disk_is_full(tmp_path):
    save(tmp_path, 1)

    def write_fails(name, arguments):
        if name == "open" and "rank-00001" in str(arguments[0]):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with watched(write_fails):
        savers = save(tmp_path, 2)
    for saver in savers:
        assert saver.trouble == f"step 2 could not be saved to {tmp_path} (Disk quota exceeded); earlier checkpoints are untouched"
    assert os.listdir(tmp_path) == ["step-00000001"] and is_sound(tmp_path, 1)


def test_numbers_that_are_not_finite_on_one_rank_end_it_on_all(tmp_path):
    def write(agreement):
        saver = checkpoint.Saver(str(tmp_path), checkpoint.CheckpointConfig(asynchronous=False), agreement)
        bad = torch.tensor([1.0, float("nan") if agreement.rank else 2.0])
        with pytest.raises(checkpoint.NotFiniteError, match="shard is not finite at step 1"):
            saver.start(1, {"shard": checkpoint.rows(bad, 2 * agreement.rank, 4)}, {})
        return os.listdir(tmp_path)

    assert on_threads(2, write)[0] == []


def test_an_old_one_that_cannot_be_removed_does_not_fail_the_save(tmp_path, caplog):
    save(tmp_path, 1, keep=1)

    def no_removal(name, arguments):
        if name == "rename" and str(arguments[1]).endswith(".removed"):
            raise PermissionError(errno.EPERM, "Operation not permitted")

    with watched(no_removal), caplog.at_level(logging.WARNING):
        savers = save(tmp_path, 2, keep=1)
    assert all(saver.trouble is None and saver.committed == 2 for saver in savers)
    assert f"an old checkpoint in {tmp_path} cannot be removed (Operation not permitted)" in caplog.text
    save(tmp_path, 3, keep=1)
    assert os.listdir(tmp_path) == ["step-00000003"]


def test_the_order_in_which_things_reach_the_disk(tmp_path):
    """Data, then the manifest that vouches for them, then the folder, then its name; what is old goes after all that."""
    folder = tmp_path / "runs" / "one" / "checkpoints"
    save(folder, 1, keep=1)
    calls = []

    def note(name, arguments):
        what = arguments[0]
        if name in ("write", "fsync"):
            what = os.readlink(f"/proc/self/fd/{what}")
        calls.append((name, os.path.relpath(what, folder) if not isinstance(what, int) else what))

    with watched(note):
        save(folder, 2, keep=1)
    partial = "step-00000002.partial"
    data = [f"{partial}/{name}" for name in ("rank-00000.safetensors", "rank-00001.safetensors", "identities.json")]
    manifest = f"{partial}/protoshard.json"
    at = {call: number for number, call in enumerate(calls)}  # the last time that it came
    for file in data:
        assert at["write", file] < at["fsync", file] < at["open", manifest]
    assert at["write", manifest] < at["fsync", manifest] < at["fsync", partial] < at["rename", partial] < at["fsync", "."]
    assert at["fsync", "."] < min(number for number, (name, _) in enumerate(calls) if name in ("remove", "unlink", "rmdir"))
    assert at["fsync", "."] < at["rename", "step-00000001"]
    # Folders around it, which may be new, are on the disk before anything is in them.
    for around in ("..", "../..", "../../.."):
        assert at["fsync", around] < at["open", data[0]]


def test_file_systems_that_cannot_sync_folders(tmp_path):
    def refuse(name, arguments):
        if name == "fsync" and os.path.isdir(f"/proc/self/fd/{arguments[0]}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with watched(refuse):
        assert all(saver.trouble is None for saver in save(tmp_path, 1))


def test_nobody_else_may_write_files_of_a_run(tmp_path):
    before = os.umask(0)
    try:
        save(tmp_path / "checkpoints", 1)
    finally:
        os.umask(before)
    for folder, _, files in os.walk(tmp_path / "checkpoints"):
        for path in (folder, *(os.path.join(folder, file) for file in files)):
            assert os.stat(path).st_mode & 0o022 == 0, path


def test_a_read_only_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "below", "Not a directory"), ("/proc/nothing", "")):
        for saver in save(folder, 1):
            assert saver.trouble.startswith(f"step 1 could not be saved to {folder} (") and reason in saver.trouble


def test_a_disk_that_gives_no_answer_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(saving, "PATIENCE", 0.05)
    answers = threading.Event()
    saver = checkpoint.Saver(str(tmp_path), checkpoint.CheckpointConfig())
    with watched(lambda name, _: name != "fsync" or threading.current_thread() is threading.main_thread() or answers.wait(20)):
        saver.start(1, state(1), {})
        threading.Timer(0.5, answers.set).start()
        with caplog.at_level(logging.WARNING):
            saver.finish()
    assert "still waiting until the checkpoint of step 1 is written" in caplog.text and is_sound(tmp_path, 1)


def test_what_is_in_the_way_is_not_written_over(tmp_path):
    os.makedirs(tmp_path / "step-00000001")
    (saver,) = save(tmp_path, 1, ranks=1)
    assert "(there is a step-00000001 already)" in saver.trouble and os.listdir(tmp_path / "step-00000001") == []
    save(tmp_path, 2)
    saver = save(tmp_path, 2, ranks=1)[0]
    assert "there is a step-00000002 already" in saver.trouble and is_sound(tmp_path, 2)


def test_a_step_is_saved_once(tmp_path):
    saver = checkpoint.Saver(str(tmp_path), checkpoint.CheckpointConfig())
    for _ in range(2):
        saver.start(1, state(1), {})
    saver.finish()
    assert saver.trouble is None and saver.committed == 1 and os.listdir(tmp_path) == ["step-00000001"]


def on_a_small_disk(folder):
    """Run below in a mount namespace of its own: a tmpfs of 64 KB, of which a checkpoint takes a third."""
    big = {"weight": checkpoint.whole(torch.ones(5_000))}
    saver = checkpoint.Saver(folder, checkpoint.CheckpointConfig(keep=9))
    for step in range(1, 5):
        saver.start(step, big, {})
        saver.finish()
    assert "No space left on device" in saver.trouble
    names = sorted(os.listdir(folder))
    assert names and names[0] == "step-00000001" and all(name.startswith("step-0000000") and "." not in name for name in names)
    assert checkpoint.newest(folder).info["step"] == len(names) == saver.committed
    shutil.rmtree(f"{folder}/step-00000001")  # somebody makes room
    saver.start(5, big, {})
    saver.finish()
    assert saver.trouble is None and checkpoint.newest(folder).info["step"] == 5


def test_a_disk_that_is_full(tmp_path):
    mount = f"mount -t tmpfs -o size=64k none {tmp_path} && exec "
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount + "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    code = f"from tests.pipeline.checkpoint.test_broken_off import on_a_small_disk as run; run({str(tmp_path)!r})"
    command = ["unshare", "-rm", "sh", "-c", mount + '"$0" -c "$1"', sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
