"""Reads that block, as those of a dead server do, in everything that reads images; and the end of a process in which one still does."""

import itertools
import os
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from pictures import picture

from dali_loaders import DataConfig, TrainLoader, check, evaluation_batches, fetching, open_source, pack, readers, set_cache
from dali_loaders.account import StorageError
from dali_loaders.preview import write_preview
from dali_loaders.sources import FolderSource, RecordSource
from dali_loaders.sources import folder as folder_module
from dali_loaders.waiting import waits

pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")

REASON = "no answer within 0.5 s"
HANGING = "person02/01.jpg"


@pytest.fixture
def pipe(tmp_path, monkeypatch):
    """A pipe that nobody writes into; opening it hangs until the end of the test."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    monkeypatch.setattr(readers, "_GRACE", 0.5)
    yield path
    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))  # whoever waits for a writer has one, for a moment
    for thread in threading.enumerate():
        if thread.name == "protoshard-read":
            thread.join(10)


@pytest.fixture
def blocked(folder, pipe, monkeypatch):
    """The reads of these images of `folder` hang in the system."""
    names = {HANGING}
    read = folder_module.read_regular

    def hang(path, *most):
        if any(os.fsdecode(path).endswith(name) for name in names):
            with open(pipe, "rb") as file:
                file.read()
        return read(path, *most)

    monkeypatch.setattr(folder_module, "read_regular", hang)
    return names


def loader_of(folder, path, **options):
    config = DataConfig(image_size=32, threads=2, timeout=0.5)
    return TrainLoader(open_source(str(folder)), config, seed=1, global_batch=8, skipped_path=str(path / "skipped.txt"), **options)


@pytest.mark.timeout(60)
def test_training_goes_on_without_the_image(folder, blocked, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("dali_loaders.skipped.MAX_SKIPPED", 0.1)
    loader = loader_of(folder, tmp_path)
    seen = np.concatenate([next(loader).indices for _ in range(9)])  # three epochs
    loader.close()
    assert sorted(set(range(24)) - set(seen.tolist())) == [9]
    assert (tmp_path / "skipped.txt").read_text() == f"{folder}/{HANGING}\t{REASON}\n"
    assert f"skipping unreadable image {folder}/{HANGING}: {REASON}" in caplog.text


@pytest.mark.timeout(60)
def test_images_that_hang_count_towards_the_1_percent(folder, blocked, tmp_path):
    with pytest.raises(ValueError, match=rf"1 unreadable images among .* are more than 1%: 1 {REASON}; they are listed in .*skipped\.txt"):
        list(loader_of(folder, tmp_path))


@pytest.mark.timeout(60)
def test_a_storage_that_answers_nothing_ends_training(folder, blocked, tmp_path):
    blocked.add(".jpg")
    loader = loader_of(folder, tmp_path)
    begun = time.monotonic()
    with pytest.raises(StorageError, match=rf"^{folder} cannot be read: no answer within 0\.5 s, neither for {folder}/\S+\.jpg nor for "):
        next(loader)
    assert time.monotonic() - begun < 10 and not (tmp_path / "skipped.txt").exists()


@pytest.mark.timeout(60)
def test_evaluation_leaves_it_out(folder, blocked):
    source = open_source(str(folder))
    batches = evaluation_batches(source, DataConfig(image_size=32, threads=1, timeout=0.5), np.arange(24), 8)
    assert np.concatenate([batch.indices for batch in batches]).tolist() == [number for number in range(24) if number != 9]


@pytest.mark.timeout(60)
def test_check_names_it(folder, blocked, tmp_path):
    report = check(str(folder), threads=2, timeout=0.5, fix=str(tmp_path / "clean.rec"))
    assert report.unreadable == [(f"{folder}/{HANGING}", REASON)] and report.clean.account.used == 23
    assert f"{HANGING}\t{REASON}\n" in (tmp_path / "clean.left_out.txt").read_text()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("out", ["out.rec", "out.tar"])
def test_pack_leaves_it_out(folder, blocked, tmp_path, out):
    report = pack(open_source(str(folder)), str(tmp_path / out), workers=2, timeout=0.5)
    assert report.account.used == 23 and list(report.account.passed_over) == [REASON]
    assert (tmp_path / "out.left_out.txt").read_text() == f"{folder}/{HANGING}\t{REASON}\n"


@pytest.mark.timeout(60)
def test_preview_goes_on_without_it(folder, blocked, tmp_path):
    config = DataConfig(image_size=32, threads=1, timeout=0.5)
    names = write_preview(str(tmp_path / "sheet.png"), open_source(str(folder)), config, images=24, versions=1)
    assert len(names) == 23 and not any(name.endswith(HANGING) for name in names)


@pytest.mark.timeout(60)
def test_files_whose_names_tell_nothing_are_looked_at_with_a_limit(folder, blocked, monkeypatch):
    monkeypatch.setattr(folder_module, "TIMEOUT", 0.5)
    for name in ("a", "b"):
        (folder / "person00" / name).write_bytes(picture(1))
    blocked.add("/b")
    source = FolderSource(str(folder))
    assert len(source) == 25 and source.account.passed_over[REASON].examples == ["person00/b"]


@pytest.mark.timeout(60)
def test_one_record_of_a_file_that_is_read_in_one_call(folder, tmp_path, monkeypatch, pipe):
    pack(open_source(str(folder)), str(tmp_path / "set.rec"))
    source, gather, read = RecordSource(str(tmp_path / "set.rec")), RecordSource._gather, RecordSource.read
    at = int(source._offsets[9])

    def hang():
        with open(pipe, "rb") as file:
            file.read()

    monkeypatch.setattr(RecordSource, "_gather", lambda self, offsets, sizes: hang() if at in offsets else gather(self, offsets, sizes))
    monkeypatch.setattr(RecordSource, "read", lambda self, index: hang() if index == 9 else read(self, index))
    batches = evaluation_batches(source, DataConfig(image_size=32, threads=2, timeout=0.5), np.arange(24), 24)
    assert np.concatenate([batch.indices for batch in batches]).tolist() == [number for number in range(24) if number != 9]


@pytest.mark.timeout(60)
def test_a_piece_of_a_remote_file_ends_its_copy(pipe, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").pipe("/hanging/a.tar", b"x" * 1000)

    def hang(*_):
        with open(pipe, "rb") as file:
            file.read()

    monkeypatch.setattr(fetching, "_read_piece", hang)
    monkeypatch.setattr(fetching, "TIMEOUT", 0.5)
    with pytest.raises(ValueError, match=r"^memory://hanging/a\.tar cannot be read: no answer within 0\.5 s; check the connection"):
        fetching.fetch("memory://hanging/a.tar", str(tmp_path / "cache"))
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.timeout(60)
def test_who_waits_for_a_lock_says_so(tmp_path):
    found = []

    def enter():
        with set_cache.alone_on_this_host(str(tmp_path / "set.tar")):
            found.append("inside")

    with set_cache.alone_on_this_host(str(tmp_path / "set.tar")):
        other = threading.Thread(target=enter)
        other.start()
        time.sleep(0.3)
        assert not found and any(re.search(r"another process that looks at the same set and holds /\S+\.lock$", wait) for wait in waits())
    other.join(10)
    assert found


@pytest.mark.timeout(60)
def test_a_folder_that_cannot_be_listed_is_named_while_it_is_waited_for(folder, monkeypatch):
    listed, scandir = [], os.scandir

    def slow(path="."):
        listed.extend(waits())
        return scandir(path)

    monkeypatch.setattr(os, "scandir", slow)
    open_source(str(folder))
    assert f"waiting 0 s for the data set {folder} to be opened" in listed
    assert f"waiting 0 s for the names in the folder {folder}/person03" in listed


@pytest.mark.timeout(60)
def test_a_loader_says_what_it_waits_for(folder, blocked, tmp_path):
    config = DataConfig(image_size=32, threads=1, timeout=60)
    blocked.add(".jpg")
    loader = TrainLoader(open_source(str(folder)), config, seed=1, global_batch=8)
    waiting = threading.Thread(target=lambda: list(itertools.islice(loader, 1)), daemon=True)
    waiting.start()
    time.sleep(0.5)
    doing, waited = loader.doing(), waits()
    begun = time.monotonic()
    loader.close()
    assert re.fullmatch(rf"reading {folder}/\S+\.jpg for \d s", doing)
    assert any(re.match(rf"waiting \d s for data: reading {folder}/", wait) for wait in waited)
    waiting.join(10)
    assert time.monotonic() - begun < 8 and loader.doing() == "ended"


def test_a_loader_says_what_it_has_ready(folder):
    loader = TrainLoader(open_source(str(folder)), DataConfig(image_size=32, threads=1, prefetch=2), seed=1, global_batch=8)
    next(loader)
    for _ in range(100):
        time.sleep(0.0 if loader.doing() == "2 ahead" else 0.05)
    assert loader.doing() == "2 ahead"
    loader.close()


END = """
import sys
from dali_loaders.sources import FolderSource
def hang(self, index):
    with open({pipe!r}, "rb") as file:
        file.read()
FolderSource.read = hang
from pipeline import cli
{then}
"""
TRAIN = """
from dali_loaders import DataConfig, TrainLoader, open_source
loader = TrainLoader(open_source({folder!r}), DataConfig(image_size=32, threads=2, timeout={timeout}), seed=1, global_batch=8)
"""
ENDS = {
    "check": ("sys.exit(cli.main(['data', 'check', {folder!r}, '--timeout', '1']))", 2, "no answer within 1 s"),
    "pack": ("sys.exit(cli.main(['data', 'pack', {folder!r}, {folder!r} + '.rec', '--timeout', '1']))", 2, "no answer within 1 s"),
    "training": (TRAIN + "next(loader)", 1, "no answer within 1 s"),
    "an error elsewhere": (TRAIN.replace("{timeout}", "600") + "import time; time.sleep(1); raise KeyError('elsewhere')", 1, "elsewhere"),
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("what", [pytest.param(what, marks=[pytest.mark.long] * (what in ("pack", "training"))) for what in ENDS])
def test_a_process_ends_although_a_read_hangs_in_it(folder, tmp_path, what):
    """By itself, with its sentence, whatever its threads are in."""
    os.mkfifo(tmp_path / "pipe")
    then, code, said = ENDS[what]
    text = END.format(pipe=str(tmp_path / "pipe"), then=then.format(folder=str(folder), timeout=1))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=150, check=False)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert code == 1 or "Traceback" not in done.stderr
