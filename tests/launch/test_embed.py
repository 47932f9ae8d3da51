"""launch/embed.py: the numbers of `protoshard embed`, in files that are whole or not there, whatever dies."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray

from dali_loaders.sources import open_source
from launch import cluster, connecting, embed, embed_worker
from launch.embed_worker import Task, Worker, name_of
from launch.node_processes import NODE
from pipeline.evaluation.evaluator import EvaluationConfig
from pipeline.export import embedding_files
from pipeline.export.embed_set import embed_set
from pipeline.export.model_folder import export
from pipeline.train import train
from tests.pipeline.runs import configuration, faces

SIZE = 24  # of a file, and of a batch of the model


class Made(NamedTuple):
    folder: Path
    model: str
    images: str  # a folder of 78, of which two cannot be read and one has another size
    names: list[str]
    embedding_nD: np.ndarray  # of `protoshard embed`
    unreadable: str  # its account


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("embed")
    data, run, model = faces(str(folder)), str(folder / "run"), str(folder / "model")
    evaluation = EvaluationConfig(data=data, batch_size=SIZE)
    train(configuration(data, run, 2, backbone="small", evaluation=evaluation), "auto")
    export(run, model, say=lambda line: None)
    source, images = open_source(data), folder / "images"
    for number in range(len(source)):
        path = images / f"id{number % 5}" / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read(number))
    (images / "id1" / "01.jpg").write_bytes(b"<html>")
    (images / "id3" / "73.jpg").write_bytes(source.read(73)[:200])
    out = str(folder / "one.parquet")
    embed_set(model, str(images), out, chunk=SIZE)
    read = embedding_files.read(out)
    return Made(folder, model, str(images), list(read.names), read.embedding_nD, Path(f"{out}.unreadable.txt").read_text())


def assert_same(out: Path, made: Made, error: float = 0.0) -> None:
    """As `protoshard embed` made it, and nothing half-written beside it. error: workers of Ray compute in another number of threads."""
    table = pq.read_table(out)
    assert table.column("name").to_pylist() == made.names
    values = table.column("embedding").combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    assert np.abs(values - made.embedding_nD).max() <= error
    assert (out / "_unreadable.txt").read_text() == made.unreadable and made.unreadable.count("\n") == 2
    done = json.loads((out / "_done.json").read_text())
    assert (done["rows"], done["unreadable"], done["files"]) == (76, 2, 4)
    assert {path.name for path in out.iterdir()} == {*map(name_of, range(4)), "_job.json", "_done.json", "_unreadable.txt"}


def command(made: Made, out: Path, *arguments: str) -> list[str]:
    more = ["--images-per-file", str(SIZE + 3), "--cpus-per-worker", "1", *arguments]  # as many whole batches as there are in it
    return [sys.executable, "-m", "launch.embed", made.model, made.images, str(out), *more]


class Leavings:
    """What a command that runs with `env` leaves behind: processes, and folders of a Ray of which no process lives. Tests beside have
    theirs, which come and go."""

    def __init__(self) -> None:
        self.mark = secrets.token_hex(8)
        self.env = {**os.environ, "PROTOSHARD_TEST": self.mark}
        self.before = self.found()

    def found(self) -> set[str]:
        environments = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environments[process.pid] = process.environ()
        nodes = {variables.get(NODE) for variables in environments.values()}
        folders = {*glob.glob("/tmp/protoshard-ray-*"), *glob.glob("/tmp/ray*")} - nodes
        return folders | {f"process {pid}" for pid, variables in environments.items() if variables.get("PROTOSHARD_TEST") == self.mark}

    def assert_none(self) -> None:
        deadline = time.monotonic() + 60  # Ray's node ends itself, and with it workers that still write
        while left := self.found() - self.before:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)


def prepared(made: Made, out: Path, monkeypatch) -> Worker:
    """OUT as a job has begun it, with a worker of it, without Ray."""
    kept: list[Task] = []

    def keep(task, todo, workers, images):
        kept.append(task)
        raise RuntimeError("enough")

    monkeypatch.setattr(embed, "make", keep)
    monkeypatch.setattr(embed, "ray_cluster", lambda address: contextlib.nullcontext())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # the worker sets it
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert embed.main(command(made, out)[3:]) == 1
    return Worker(kept[0])


def test_files_are_whole_or_made_again(made, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    worker = prepared(made, out, monkeypatch)
    assert [worker({"part": number}) for number in range(4)] == [
        {"part": number, "images": images, "fault": ""} for number, images in enumerate((24, 24, 24, 6))
    ]
    job = worker.task.job
    assert [embed_worker.account(str(out), number, job).rows for number in range(4)] == [23, 24, 23, 6]
    whole = (out / name_of(1)).read_bytes()
    for column in range(3):
        place = pq.ParquetFile(out / name_of(1)).metadata.row_group(0).column(column)
        at = place.data_page_offset + place.total_compressed_size - 5
        (out / name_of(1)).write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        assert embed_worker.account(str(out), 1, job) is None, column
        (out / name_of(1)).write_bytes(whole)
    (out / name_of(1)).write_bytes(whole[:-100])
    assert embed_worker.account(str(out), 1, job) is None and embed_worker.account(str(out), 7, job) is None
    assert embed_worker.account(str(out), 2, {**job, "flip": not job["flip"]}) is None
    assert worker({"part": 1})["fault"] == "" and (out / name_of(1)).read_bytes() == whole
    (out / f".{name_of(2)}.host-7").write_bytes(b"half")  # of one that was killed
    assert embed.main(command(made, out)[3:]) == 1  # nothing is left to make, but to account for
    assert_same(out, made)
    assert embed.main([*command(made, out)[3:], "--no-flip"]) == 2
    assert "holds a part of other embeddings (another model, set or option)" in capsys.readouterr().err


def test_a_worker_that_sees_something_else_says_so(made, tmp_path, monkeypatch):
    task = prepared(made, tmp_path / "out", monkeypatch).task
    fault = Worker(task._replace(job={**task.job, "set": "other"}))({"part": 0})["fault"]
    assert fault.startswith(made.images) and fault.endswith("is another one than where the job was started")
    assert "nowhere" in Worker(task._replace(model=str(tmp_path / "nowhere")))({"part": 0})["fault"]
    assert "cannot be written on" in Worker(task._replace(out="/proc/nowhere"))({"part": 0})["fault"]


def test_bad_input_ends_in_a_sentence_before_ray_starts(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embed, "make", None)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([str(tmp_path), made.images, "out"], "there is no complete checkpoint at"),
        ([made.model, made.images, str(tmp_path / "file")], "is a file, but OUT is a folder of Parquet files"),
        ([made.model, made.images, str(made.folder)], "holds other things than embeddings that this command has begun"),
        ([made.model, str(tmp_path / "empty"), str(tmp_path / "o")], "empty"),
        ([made.model, made.images, str(tmp_path / "o"), "--images-per-file", "0"], "--images-per-file is 0, but must be at least 1"),
        ([made.model, made.images, str(tmp_path / "o"), "--address", "head"], "give its host:port, such as node1:6379"),
        ([made.model, made.images, str(tmp_path / "o"), "--address", "http://h:8265"], "give its host:port, such as node1:6379"),
        ([made.model, made.images, str(tmp_path / "o"), "--address", "127.0.0.1:1"], "No Ray cluster answers at 127.0.0.1:1"),
    ):
        assert embed.main(arguments) == 2, arguments
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("embed: ") and words in error, error
    with pytest.raises(SystemExit) as end:
        embed.main([made.model, made.images, str(tmp_path / "o"), "--workers", "3:2"])
    assert end.value.code == 2 and "'3:2' is not MIN:MAX" in capsys.readouterr().err


@pytest.mark.parametrize(("greeting", "words"), [(b"", "says nothing for 1 s"), (b"SSH-2.0-OpenSSH_9.2\r\n", "it says 'SSH-2.0-Open")])
def test_what_is_no_head_is_not_waited_for(monkeypatch, greeting, words):
    monkeypatch.setattr(connecting, "ANSWER_SECONDS", 1)
    monkeypatch.setattr(ray, "init", None)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept = []

        def greet():
            while True:
                kept.append(server.accept()[0])
                kept[-1].sendall(greeting)

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(ValueError, match=words), embed.ray_cluster(f"127.0.0.1:{server.getsockname()[1]}"):
            pass


@pytest.mark.parametrize(
    "error", [ray.exceptions.AuthenticationError("Token is missing.\nMore."), ConnectionError("Token is missing"), SystemExit(1)]
)
def test_a_head_that_refuses(monkeypatch, error):
    """As without its token. Ray ends the process where a control store does not answer."""

    def init(*arguments, **options):
        raise error

    monkeypatch.setattr(embed, "look_at", lambda address: None)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    reason = "no control store answers there" if isinstance(error, SystemExit) else "Token is missing"
    with pytest.raises(ValueError, match=rf"head:6379 cannot be used \({reason}.*\): run this on"), embed.ray_cluster("head:6379"):
        pass


@pytest.mark.parametrize(
    ("nodes", "cpus", "workers", "room"),
    [
        ([{"CPU": 3.0}, {"CPU": 3.0}], 4, None, 0),
        ([{"CPU": 16.0, "GPU": 8.0}], 4, (8, 8), 4),
        ([{"CPU": 64.0}, {"CPU": 7.0, "GPU": 2.0}], 4, (2, 2), 1),
    ],
)
def test_a_worker_needs_a_place_on_one_node(monkeypatch, nodes, cpus, workers, room):
    """Ray Data would wait for it for ever."""
    monkeypatch.setattr(
        ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes] + [{"Alive": False, "Resources": {"CPU": 99.0}}]
    )
    task = Task("model", "images", "out", {}, False, None, cpus)
    with pytest.raises(ValueError, match=f"the Ray cluster has room for {room} workers of 4 processors"):
        embed.make(task, [0], workers, 1)


def test_a_full_disk_ends_in_a_sentence(made, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(embed, "finish", full)
    monkeypatch.setattr(embed, "make", lambda *arguments: None)
    monkeypatch.setattr(embed, "ray_cluster", lambda address: contextlib.nullcontext())
    assert embed.main(command(made, tmp_path / "out")[3:]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"embed: {tmp_path}/out cannot be read or written (No space left on device)"


def test_a_ray_that_does_not_start_is_no_bad_input(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "HELLO_SECONDS", 0.0)
    assert embed.main(command(made, tmp_path / "out")[3:]) == 1
    assert "did not say hello in time" in capsys.readouterr().err and not (tmp_path / "out" / "_done.json").exists()


@pytest.mark.slow
def test_on_a_private_ray_it_goes_on_with_what_is_missing(made, tmp_path, monkeypatch):
    out, leavings = tmp_path / "out", Leavings()
    worker = prepared(made, out, monkeypatch)
    worker({"part": 2})
    done = (out / name_of(2)).stat().st_mtime_ns
    ended = subprocess.run(command(made, out), env=leavings.env, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 1 and "1 of 4 files are there" in ended.stderr, ended.stderr
    assert "76 embeddings of 16 numbers in 4 files" in ended.stdout and "2 images cannot be read and are left out" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert_same(out, made, 1e-6)
    assert (out / name_of(2)).stat().st_mtime_ns == done
    leavings.assert_none()


@pytest.mark.long
def test_whatever_dies_it_goes_on(made, tmp_path):
    """A worker and then the job itself: before the first file, at a file, and at one of a worker's successor. The last start loses a worker
    alone."""
    out, leavings = tmp_path / "out", Leavings()
    for at_worker, at_job in ((0, 0), (1, 1), (0, 1), (0, None)):  # new files after which they are killed
        had, is_killed = whole(out), False
        job = subprocess.Popen(command(made, out, "--workers", "1:2"), env=leavings.env, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while job.poll() is None and not (is_killed and at_job is not None and whole(out) >= had + at_job):
            assert time.monotonic() < deadline
            if not is_killed:
                workers = workers_below(job.pid)
                if workers and whole(out) >= had + at_worker:
                    is_killed = True
                    for worker in workers:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            worker.kill()
            time.sleep(0.01)
        job.kill()
        job.wait()
        leavings.assert_none()
        if job.returncode == 1:
            break
    assert job.returncode == 1
    assert_same(out, made, 1e-6)


def whole(out: Path) -> int:
    return len(list(out.glob("part-*.parquet")))


def workers_below(pid: int) -> list[psutil.Process]:
    """Of Ray's node that the job has started; they stand in sessions of their own."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "Worker" in process.cmdline()[0] and process.cmdline()[0].startswith("ray::"):
                found.append(process)
        except (psutil.Error, IndexError):
            pass
    return found
