"""A second run is kept out of a run's folder, by whatever name, from whatever host it comes, and a run that lost its folder knows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from pipeline import checkpoint, lease, lease_files
from pipeline.distributed import Place, join
from pipeline.lease import Lease, LostError

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


def leases(folder):
    return {name: json.loads((folder / name).read_text()) for name in os.listdir(folder) if name.startswith("lease-")}


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
    checkpoint.set_aside("link")  # which keeps the link, and does not move the new run to the disk on which the link lies
    held.follow()
    assert os.path.islink("link") and set(os.listdir("link")) == {"lease-1.json", "checkpoints"}
    assert (run.with_name("run.1") / "metrics.jsonl").exists()
    assert is_free(f"{run}.1") and not is_free("link")
    held.check()
    held.release()


def test_a_new_folder_is_not_set_aside(run):
    held = Lease("link", PLACE)
    checkpoint.set_aside("link")
    assert os.listdir("big") == [".run.lock", "run"] or sorted(os.listdir("big")) == [".run.lock", "run"]
    held.release()


def test_a_link_to_a_folder_that_does_not_exist_yet(run):
    run.rmdir()
    Lease("link", PLACE).release()
    assert run.is_dir()


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
