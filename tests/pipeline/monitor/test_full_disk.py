"""A run whose disk is full, whose console is closed or whose folder has gone goes on without what it cannot write, and says so once."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
import textwrap

import matplotlib.figure
import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.distributed import join
from pipeline.evaluation.evaluator import EvaluationConfig
from pipeline.monitor import Monitor, MonitorConfig, event_file, json_lines
from pipeline.monitor.console import Console
from pipeline.monitor.json_lines import JsonLines
from pipeline.summary import summary
from tests.pipeline.runs import configuration, faces, train_losses


class Disk:
    """Stands for os.write. After `room` bytes it is full: of a write that does not fit, a part is written."""

    def __init__(self, patch, room):
        self.write, self.room = os.write, room
        patch.setattr(os, "write", self)

    def __call__(self, descriptor, data):
        fitting = data[: self.room]
        if data and not fitting:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(fitting)
        return self.write(descriptor, fitting)


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses_of(folder):
    return [
        (event.step, event.value) for event in EventAccumulator(str(folder / "tensorboard" / folder.name)).Reload().Scalars("train/loss")
    ]


@settings(max_examples=30, deadline=None)
@given(room=st.integers(0, 1500))
def test_on_a_full_disk_whole_records_stay_and_later_ones_follow(tmp_path_factory, room):
    folder, stream = tmp_path_factory.mktemp("run"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, room)
        monitor = Monitor(folder, total_steps=40, stream=stream)
        for step in range(20):
            monitor.scalars(step, {"loss": float(step)})
        monitor.histogram(20, "genuine", np.ones(1000), np.arange(1001.0))
        disk.room = 10**9  # somebody has made room
        for step in range(20, 40):
            monitor.scalars(step, {"loss": float(step)})
        monitor.close()
    steps = [line["step"] for line in read_lines(folder)]
    assert steps == sorted({*steps, *range(20, 40)})
    assert losses_of(folder)[-20:] == [(step, float(step)) for step in range(20, 40)]
    for name in ("metrics.jsonl", "tensorboard"):
        assert stream.getvalue().count(f"{name} cannot be written (No space left on device): training goes on without it") == 1
        assert stream.getvalue().count(f"{name} is written again;") == 1
    assert f"metrics.jsonl is written again; {40 - len(steps)} records of it are lost" in stream.getvalue()


def test_a_resume_on_a_full_disk_keeps_what_it_repeats_not(tmp_path, monkeypatch):
    first = Monitor(tmp_path, total_steps=10, console=False)
    for step in range(10):
        first.scalars(step, {"loss": 1.0})
    first.close()
    Disk(monkeypatch, 0)
    Monitor(tmp_path, total_steps=10, console=False, first_step=5).close()
    assert [line["step"] for line in read_lines(tmp_path)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("make", ["a link to /dev/full", "a folder", "a pipe without a reader", "a link into nowhere"])
def test_metrics_that_cannot_be_written(tmp_path, make):
    path = tmp_path / "metrics.jsonl"
    {
        "a link to /dev/full": lambda: path.symlink_to("/dev/full"),
        "a folder": path.mkdir,
        "a pipe without a reader": lambda: os.mkfifo(path),
        "a link into nowhere": lambda: path.symlink_to(tmp_path / "nowhere" / "metrics.jsonl"),
    }[make]()
    stream = io.StringIO()
    monitor = Monitor(tmp_path, total_steps=3, stream=stream, first_step=1)
    for step in range(3):
        monitor.scalars(step, {"loss": 1.0})
    monitor.close()
    assert stream.getvalue().count("metrics.jsonl cannot be written (") == 1
    assert len(losses_of(tmp_path)) == 3
    assert "curves" in summary(str(tmp_path))


def test_tensorboard_that_cannot_be_written(tmp_path):
    (tmp_path / "tensorboard").touch()
    stream = io.StringIO()
    monitor = Monitor(tmp_path, total_steps=3, stream=stream)
    monitor.text(0, "config", "text")
    monitor.figure(0, "roc", matplotlib.figure.Figure(figsize=(1, 1)))
    monitor.scalars(0, {"loss": 1.0})
    monitor.close()
    assert stream.getvalue().count("tensorboard cannot be written (") == 1 and len(read_lines(tmp_path)) == 1


def test_a_clock_that_was_set_back_does_not_bring_back_what_a_resume_repeats(tmp_path, monkeypatch):
    for now, first, value in ((2e9, 0, 1.0), (1e9, 2, 2.0)):
        monkeypatch.setattr(event_file.time, "time", lambda now=now: now)
        monitor = Monitor(tmp_path, total_steps=4, console=False, first_step=first)
        for step in range(first, 4):
            monitor.scalars(step, {"loss": value})
        monitor.close()
    assert losses_of(tmp_path) == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)]


def test_nothing_is_written_to_a_folder_that_another_run_has(tmp_path):
    class Lost:
        def is_ours(self):
            return self.ours

    lease = Lost()
    lease.ours = True
    monitor = Monitor(tmp_path, total_steps=3, console=False, lease=lease)
    monitor.scalars(0, {"loss": 1.0})
    lease.ours = False
    monitor.scalars(1, {"loss": 1.0})
    monitor.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [0] and len(losses_of(tmp_path)) == 1


line = st.one_of(
    st.integers(0, 20).map(lambda step: json.dumps({"step": step, "loss": 0.5})),
    st.sampled_from(["", "{", "[]", '{"loss": 1}', '{"step": "x"}', '{"step": null}', "\0" * 50]),
)


@settings(max_examples=200, deadline=None)
@given(
    lines=st.lists(line, max_size=12), rest=st.sampled_from(["", '{"step": 1', "\n\n"]), first=st.integers(0, 21), block=st.integers(1, 64)
)
def test_lines_from_a_step_on_are_cut_off_at_any_size_of_blocks(tmp_path_factory, lines, rest, first, block):
    path = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    path.write_text("".join(one + "\n" for one in lines) + rest)

    def is_earlier(one):
        try:
            return json.loads(one)["step"] < first
        except (ValueError, KeyError, TypeError):
            return False

    keep = max((number + 1 for number, one in enumerate(lines) if is_earlier(one)), default=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "BLOCK", block)
        JsonLines(path, first).begin()
    assert path.read_text() == "".join(one + "\n" for one in lines[:keep])


def test_metrics_of_a_month_are_not_read_whole(tmp_path, monkeypatch):
    """Nor is the time that cutting takes that of the whole file: it is sparse here, of 2 TB, with two lines at its end."""
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        try:
            file.seek(1 << 41)
            file.write(b'\n{"step": 6}\n{"step": 7}\n{"step": 8}\n')
        except OSError:
            pytest.skip("this file system has no files of 2 TB")
    JsonLines(path, 8).begin()
    assert path.stat().st_size == (1 << 41) + len(b'\n{"step": 6}\n{"step": 7}\n')
    assert json_lines.last_step(path) == 7


class Broken(io.StringIO):
    """A log on a disk that is full at times."""

    broken = True

    def write(self, text):
        if self.broken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(text)


def test_a_console_that_cannot_be_written(tmp_path):
    stream = Broken()
    console = Console(stream, total_steps=10)
    console.say("lost")
    console.progress(1, {"loss": 1.0})
    stream.broken = False
    console.say("said")
    console.close()
    assert re.fullmatch(r"2 lines may be missing here, which could not be written\n[-0-9]{10} [:0-9]{8}  said\n", stream.getvalue())
    closed = io.StringIO()
    closed.close()
    Console(closed, total_steps=10).say("nobody hears")


def test_a_process_without_a_console_goes_on(tmp_path):
    """Standard error is closed, full, or a pipe without a reader: three copies of one process, whose imports take seconds."""
    code = """
        import os, sys
        from pipeline.monitor import Monitor
        for place in ("closed", "full", "pipe"):
            if os.fork() == 0:
                if place == "closed":
                    os.close(2)
                    sys.stderr = None  # as Python has it then
                elif place == "full":
                    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
                else:
                    reader, writer = os.pipe()
                    os.close(reader)
                    os.dup2(writer, 2)
                m = Monitor(f"{sys.argv[1]}/{place}", 2000)
                for step in range(2000):
                    m.say("x" * 100)
                    if step % 500 == 0:
                        m.scalars(step, {"loss": 1.0})
                m.close()
                os._exit(0)
            os.wait()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=True)
    for place in ("closed", "full", "pipe"):
        assert len(read_lines(tmp_path / place)) == 4, place


def test_summary_of_a_run_whose_files_are_damaged_or_missing(tmp_path):
    assert summary(str(tmp_path / "nowhere")) == ""
    (tmp_path / "metrics.jsonl").write_bytes(
        b'\xff\n[]\n{"step": 1, "a/eer": 0.5}\n{"step": 2, "a/eer": null}\n{"step": 2, "a/eer": "x"}\n'
        b'{"step": 3, "a/eer": 0.25, "images_per_second": 7}\n{"st'
    )
    assert "0.5000 at step 1 -> 0.2500 at step 3" in summary(str(tmp_path)) and "7 (median)" in summary(str(tmp_path))
    assert "tensorboard" not in summary(str(tmp_path)), "there is none"


@pytest.fixture
def alone():
    join("cpu")
    yield
    dist.destroy_process_group()


def test_a_run_of_which_only_checkpoints_can_be_written_ends_well(tmp_path, monkeypatch, capfd, alone):
    """In its start, its evaluations and its end."""
    data, folder = faces(str(tmp_path)), tmp_path / "run"
    expected = train_losses(configuration(data, str(tmp_path / "other"), steps=4, save_every=2))
    folder.mkdir()
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    (folder / "tensorboard").touch()
    evaluation = EvaluationConfig(data=data, every_epochs=0.1)
    config = configuration(data, str(folder), steps=4, save_every=2, evaluation=evaluation, monitor=MonitorConfig())
    from pipeline.evaluation import figures
    from pipeline.train import train

    monkeypatch.setattr(figures, "write_png", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    train(config)
    said = capfd.readouterr().err
    for name in ("metrics.jsonl", "tensorboard", "the ROC figure"):
        assert said.count(f"{name} cannot be written") == 1, name
    assert sorted(os.listdir(folder / "checkpoints"))[-2:] == ["step-00000002", "step-00000004"] and len(expected) == 4


MOUNTS = "unshare -rm true"


@pytest.mark.skipif(subprocess.run(MOUNTS.split(), capture_output=True).returncode != 0, reason=f"cannot mount here: {MOUNTS} fails")
def test_a_disk_that_gets_full_in_the_middle_and_is_so_at_the_restart(tmp_path):
    """With its checkpoints on another disk a run goes on; the next one says what is wrong."""
    code = """
        import os, sys
        from pipeline.evaluation.evaluator import EvaluationConfig
        from pipeline.train import train
        from pipeline.trainer import Trainer
        from pipeline.monitor import MonitorConfig
        from tests.pipeline.runs import configuration, faces
        data = faces(".")
        step = Trainer._train_step
        def fill():
            with open("small/fill", "ab", 0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        def filling(self):
            if self.step == 2:
                fill()
            return step(self)
        Trainer._train_step = filling
        os.makedirs("small/run")
        os.makedirs("large")
        os.symlink(os.path.abspath("large"), "small/run/checkpoints")
        config = configuration(data, "small/run", steps=4, save_every=2, evaluation=EvaluationConfig(data=data), monitor=MonitorConfig())
        train(config)
        print(sorted(os.listdir("large"))[1:])
        fill()  # what ranks wrote while they ran is gone by now
        try:
            train(config)
        except ValueError as error:
            print(error)
    """
    (tmp_path / "small").mkdir()
    command = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=256k none small && exec "$0" -c "$1"', sys.executable]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    environment = {**os.environ, "PYTHONPATH": root}
    ended = subprocess.run([*command, textwrap.dedent(code)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.stdout.splitlines() == [
        "['step-00000002', 'step-00000004']",
        "run.folder=small/run cannot be written (No space left on device): make room there, or choose another folder",
    ], ended.stderr
    assert ended.stderr.count("the ROC figure cannot be written (No space left on device): training goes on without it") == 1
    assert ended.stderr.count("tensorboard cannot be written") == 1 and "Traceback" not in ended.stderr


def test_a_picture_that_does_not_fit_leaves_nothing(tmp_path):
    """With a limit on the size of files, which is an OSError of the same kind."""
    code = """
        import resource, signal, sys
        from matplotlib.figure import Figure
        from pipeline.evaluation.figures import write_png
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_png(Figure(), sys.argv[1])
        except OSError as error:
            print("refused", error.errno)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "a.png")], capture_output=True, text=True)
    assert ended.stdout == f"refused {errno.EFBIG}\n" and os.listdir(tmp_path) == []
