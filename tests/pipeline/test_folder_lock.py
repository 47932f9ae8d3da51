"""A second run is kept out of a run's folder, by whatever name it comes."""

from __future__ import annotations

import os

import pytest
import torch

from pipeline.agreement import Agreement
from pipeline.distributed import FolderLock, Place, join
from pipeline.run_checkpoints import set_aside

PLACE = Place(0, 1, torch.device("cpu"))


def is_free(folder):
    """Whether another one gets the lock, which keeps out the same process too."""
    try:
        FolderLock(str(folder), PLACE).release()
    except ValueError as error:
        assert "another run is writing to" in str(error)
        return False
    return True


@pytest.fixture
def run(tmp_path, monkeypatch):
    join("cpu")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "big" / "run"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "runs").symlink_to(tmp_path / "big")
    return folder


@pytest.mark.parametrize("first", ["big/run", "link", "runs/run"])
def test_the_same_folder_by_another_name(run, first):
    lock = FolderLock(first, PLACE)
    for name in ("big/run", "link", "runs/run", "./big/../link", str(run)):
        assert not is_free(name), name
    lock.release()
    assert is_free("link")


def test_a_folder_that_was_renamed_is_still_locked_and_so_is_its_name(run):
    """As a bind mount would, the new name leads to the same folder."""
    lock = FolderLock(str(run), PLACE)
    os.rename(run, run.with_name("renamed"))
    assert not is_free(run.with_name("renamed")) and not is_free(run)
    lock.release()


def test_a_run_that_is_set_aside_is_free_again_and_the_new_one_locked(run):
    (run / "metrics.jsonl").touch()
    lock = FolderLock("link", PLACE)
    set_aside("link", Agreement())  # which keeps the link, and does not move the new run to the disk on which the link lies
    lock.follow()
    assert os.path.islink("link") and os.listdir("link") == [] and os.listdir(f"{run}.1") == ["metrics.jsonl"]
    assert is_free(f"{run}.1") and not is_free("link")
    lock.release()


def test_a_link_to_a_folder_that_does_not_exist_yet(run):
    run.rmdir()
    FolderLock("link", PLACE).release()
    assert run.is_dir()


def test_a_folder_that_cannot_be_made(run):
    run.rmdir()
    run.touch()
    with pytest.raises(ValueError, match=r"run\.folder=link cannot be written \(File exists\): choose another folder"):
        FolderLock("link", PLACE)
