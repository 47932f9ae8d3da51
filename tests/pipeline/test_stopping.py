"""A run that is asked to stop ends with exit code 75 after one step and a save, and the same command gives the weights of a run that was
never stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time

import pytest
import torch

from dali_loaders.faces import FacesConfig, write_faces
from pipeline import stopping
from pipeline.checkpoint import complete, open_checkpoint
from pipeline.stopping import Asked, Repeats, Stop, Stopped, heeded
from tests.pipeline import moments
from tests.pipeline.moments import PROTOSHARD, STEPS, TORCHRUN, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stopping")
    write_faces(str(path / "faces.tar"), FacesConfig(identities=9, images_per_identity=6, size=32), workers=1)
    return path


@pytest.fixture(scope="module")
def undisturbed(folder):
    assert run(folder / "undisturbed")[0] == 0
    return folder / "undisturbed"


def rows(folder, key="loss"):
    with open(folder / "metrics.jsonl") as file:
        return [(row["step"], row[key]) for row in map(json.loads, file) if key in row]


def assert_same_run(folder, undisturbed):
    assert rows(folder) == rows(undisturbed) and len(rows(folder)) == STEPS
    assert rows(folder, "faces/eer") == rows(undisturbed, "faces/eer")
    one, other = (open_checkpoint(str(path / "checkpoints" / f"step-{STEPS:08d}")) for path in (folder, undisturbed))
    assert set(one) == set(other) and all(torch.equal(one.whole(name), other.whole(name)) for name in one)


def newest(folder):
    return max(complete(str(folder / "checkpoints")), default=None)


STOPS = {  # a moment: what is said, and the step that was saved
    "evaluation 2 1 SIGUSR1": ("SIGUSR1 on rank 1", 3),
    "save 1 0 SIGTERM-parent": (r"SIGTERM on rank \d", 5),
    "step 8 0 SIGKILL-parent": (r"SIGTERM on rank \d", 9),  # that its parent has died
}


@pytest.mark.slow
def test_a_run_stopped_again_and_again_is_that_which_was_not(folder, undisturbed):
    for moment, (request, step) in STOPS.items():
        code, output = run(folder / "stopped", moment)
        assert code == (-signal.SIGKILL if "SIGKILL" in moment else 75), output
        place = re.escape(str(folder / "stopped" / "checkpoints" / f"step-{step:08d}"))
        said = f"protoshard: stopped by {request} (at step {step}, saved as {place}|with nothing to save): the same command continues\n"
        assert re.search(said, output), output
        assert "Traceback" not in output and output.count("stopped by") == 1 and newest(folder / "stopped") == f"step-{step:08d}"
        assert not (folder / "stopped" / "stop").exists()
    code, output = run(folder / "stopped")
    assert code == 0, output
    assert_same_run(folder / "stopped", undisturbed)


@pytest.mark.slow
def test_at_the_start_it_ends_at_once(folder):
    code, output = run(folder / "opening", "opening 1 1 SIGTERM")
    assert code == 75, output
    assert (
        "protoshard: stopped by SIGTERM on rank 1 with nothing to save: the same command continues\n" in output
        and "Traceback" not in output
    )
    assert newest(folder / "opening") is None


@pytest.mark.slow
def test_a_second_ctrl_c_ends_it_without_a_save(folder):
    before = time.monotonic()
    code, output = run(folder / "twice", "step 2 0 twice")
    assert code == 130 and "Traceback" not in output, output
    assert "protoshard: interrupted; --resume auto, the default, continues from the newest checkpoint\n" in output
    assert newest(folder / "twice") is None and time.monotonic() - before < 60


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param("1", marks=pytest.mark.long), "2"])
def test_nothing_that_comes_later_changes_the_exit_code(folder, ranks, tmp_path):
    """A closing terminal or a scheduler sends a signal to all processes of a job, over and over; its log is on a full disk."""
    command = [*PROTOSHARD, "train", moments.__file__, "--ranks", ranks]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RUN": str(folder / f"later-{ranks}"), "ALONE": ranks, "MOMENTS": "step 2 0 touch"}
    with open("/dev/full", "w") as full:
        job = subprocess.Popen(command, env=env, stdout=full, stderr=full, start_new_session=True)
    while not os.path.exists(env["RUN"] + ".deed") and job.poll() is None:
        time.sleep(0.05)
    while job.poll() is None:
        os.killpg(job.pid, signal.SIGUSR1)
        time.sleep(0.05)
    assert job.returncode == 75 and newest(folder / f"later-{ranks}") == "step-00000003"


@pytest.mark.slow
def test_what_a_closing_terminal_sends_to_all_leaves_one_sentence(folder):
    code, output = run(folder / "terminal", "step 2 0 SIGHUP-group", start_new_session=True)
    lines = [line for line in output.splitlines() if not re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line)]  # the log
    assert code == 75 and len(lines) == 1 and "stopped by" in lines[0], output


@pytest.mark.slow
def test_a_rank_alone_is_asked_while_another_one_starts(folder):
    began = time.monotonic()
    code, output = run(folder / "meeting", "joining 1 1 SIGTERM")
    assert code == 75 and "stopped by SIGTERM on rank 1 with nothing to save" in output, output
    assert time.monotonic() - began < 50  # and not after a minute of patience


@pytest.mark.slow
def test_one_rank(folder):
    code, output = run(folder / "alone", "step 1 0 SIGTERM", "--ranks", "1", ALONE="1")
    assert code == 75 and newest(folder / "alone") == "step-00000002", output
    assert "protoshard: stopped by SIGTERM on rank 0 at step 2, saved as" in output


MOMENTS = ["opening 1", "step 0", "step 4", "save 1", "evaluation 1", "evaluation 3", "step 11", "evaluation 20"]
WHOM = ["0 SIGTERM", "1 SIGINT", "all SIGTERM", "0 SIGINT-parent", "1 SIGUSR1", "0 SIGHUP-parent"]


@pytest.mark.long
@pytest.mark.parametrize("moment", [f"{moment} {WHOM[(i + j) % len(WHOM)]}" for i, moment in enumerate(MOMENTS) for j in (0, 2, 5)])
def test_every_moment(folder, undisturbed, moment, tmp_path):
    os.symlink(folder / "faces.tar", tmp_path / "faces.tar")
    code, output = run(tmp_path / "run", moment)
    print(f"{time.time() - os.stat(tmp_path / 'run.deed').st_mtime:.1f} s until all had ended")
    assert code == 75 and "Traceback" not in output, output
    code, output = run(tmp_path / "run")
    assert code == 0, output
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.long
def test_torchrun(folder, undisturbed):
    code, output = run(folder / "torchrun", "step 3 1 SIGTERM", command=TORCHRUN)
    assert code == 1 and re.search(r"exitcode +: 75", output), output
    assert output.count("protoshard: stopped by SIGTERM on rank 1 at step 4, saved as ") == 1
    assert run(folder / "torchrun", command=TORCHRUN)[0] == 0
    assert_same_run(folder / "torchrun", undisturbed)


def test_signals_wait_only_once_there_is_something_to_save():
    with pytest.raises(Stopped, match="stopped by SIGUSR1 on rank 0 with nothing to save"), heeded():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1)
    with heeded() as stop:
        stop.waits = True
        assert stop.asked() == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        with heeded() as same:
            assert same is stop and str(Asked(stop.asked())) == "SIGUSR1 on rank 0"
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_library_that_makes_another_error_of_it():
    with pytest.raises(Stopped), heeded():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except BaseException as error:
            raise ImportError("generic_type: is already registered") from error


def test_signals_that_others_handle_or_ignore_stay_theirs():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with heeded():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_a_thread_the_file_still_stops_it(tmp_path):
    found = []

    def body():
        with heeded() as stop:
            stop.watch(str(tmp_path), rank=0)
            found.append(stop.asked())
            (tmp_path / "stop").touch()
            found.append(str(Asked(stop.asked())))
            (tmp_path / "stop").unlink()
            found.append(str(Asked(stop.asked())))  # once seen it counts, since other ranks may know of it

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [0, "the file stop", "the file stop"]


def test_a_stop_file_from_before_is_removed_unless_it_is_to_be_kept(tmp_path):
    for keep in (True, False):
        (tmp_path / "stop").touch()
        stop = Stop()
        stop.watch(str(tmp_path), 1)
        assert (tmp_path / "stop").exists() and not stop.asked()  # it is the first rank's
        stop.watch(str(tmp_path), 0, keep)
        assert bool(stop.asked()) is keep is (tmp_path / "stop").exists()
    (tmp_path / "stop").mkdir()
    with pytest.raises(ValueError, match="stop asks the run to stop and cannot be removed"):
        Stop().watch(str(tmp_path), 0)


def test_what_comes_twice_at_once_is_one_request(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    repeats = Repeats()
    seen = []
    for at, number in [(0, signal.SIGUSR1), (2, signal.SIGTERM), (2.9, signal.SIGTERM), (3.5, signal.SIGTERM), (9, signal.SIGUSR1)]:
        clock[0] = at
        seen.append(repeats.is_second(number))
    assert seen == [False, False, False, True, False]
