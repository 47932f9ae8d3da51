"""Tiny labelled image sets, made afresh for each test."""

import tarfile
from pathlib import Path

import pytest
import torch
from pictures import write_folder

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """6 identities with 4 images each."""
    return write_folder(tmp_path / "set", identities=6, images=4)


@pytest.fixture
def tar(folder: Path) -> Path:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as out:
        for file in sorted(folder.rglob("*.*"), reverse=True):
            out.add(file, file.relative_to(folder).as_posix())
    return path
