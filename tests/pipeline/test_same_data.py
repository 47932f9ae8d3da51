"""All ranks of a job see one data set, and so does a run before and after an interruption; or it stops in a sentence."""

from __future__ import annotations

import os
import shutil
import socket
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch.distributed as dist

from dali_loaders import open_source, pack
from dali_loaders.sources import FolderSource
from pipeline import checkpoint
from pipeline.same_data import open_on_all_ranks
from tests.pipeline.checkpoint.states import edit_manifest
from tests.pipeline.runs import configuration, faces, train_losses, train_until


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of 13 identities x 6 images."""
    folder = tmp_path_factory.mktemp("faces")
    with tarfile.open(faces(str(folder))) as tar:
        tar.extractall(folder / "set", filter="data")
    return str(folder / "set")


@pytest.fixture
def copy(data, tmp_path):
    return shutil.copytree(data, tmp_path / "copy")


def opened(paths: list[str]) -> str:
    """The sentence that this rank gives when every rank opens its own path; or what it sees."""
    try:
        path = paths[dist.get_rank()]
        return repr(sorted(open_on_all_ranks(path, lambda: open_source(path))[1].items()))
    except ValueError as error:
        return str(error)


def test_ranks_that_see_the_same(ranks, data, copy):
    seen = ranks(2).run(opened, [data, str(copy)])
    assert seen[0] == seen[1] and "('images', 78)" in seen[0]


def test_the_rank_that_sees_less_is_named(ranks, data, copy):
    shutil.rmtree(next(copy.iterdir()))
    seen = ranks(2).run(opened, [data, str(copy)])
    host = socket.gethostname()
    expected = f"is not the same for all ranks: rank 1 on {host} sees 12 identities instead of 13, 72 images instead of 78, which is what"
    assert all(expected in sentence for sentence in seen)


def test_a_file_under_another_name_or_identity_is_noticed(ranks, data, copy):
    one, two = sorted(copy.iterdir())[:2]
    file = sorted(one.iterdir())[0]
    os.rename(file, one / "zzz.png")
    seen = ranks(2).run(opened, [data, str(copy)])
    assert all("sees other images, or the same in another order, which is what" in sentence for sentence in seen)
    os.rename(one / "zzz.png", two / "zzz.png")
    assert "other labels" in ranks(2).run(opened, [data, str(copy)])[0]
    os.rename(two, two.with_name("renamed"))
    assert "other names of identities" in ranks(2).run(opened, [data, str(copy)])[0]


def test_a_rank_that_cannot_open_the_data_does_not_leave_the_others_waiting(ranks, data):
    seen = ranks(2).run(opened, [data, "gone"], timeout=20)
    assert seen[1].startswith("gone does not exist")
    assert seen[0] == f"rank 1 on {socket.gethostname()} cannot open the data: {seen[1]}"


@pytest.fixture
def run(ranks, copy, tmp_path):
    """resume(steps, **data): goes on with a run of 2 steps on `copy` to `steps`; the losses, or the sentence that refuses it."""
    config = configuration(str(copy), str(tmp_path / "run"), 2)
    assert len(ranks(1).run(train_losses, config)[0]) == 2

    def resume(steps: int, seed: int = 5, **options):
        changed = configuration(str(copy), str(tmp_path / "run"), steps, run={"seed": seed})
        return ranks(1).run(losses_or_sentence, replace(changed, data=replace(changed.data, **options)))[0]

    return resume


def losses_or_sentence(config):
    try:
        return train_losses(config)
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_a_set_that_changed_is_refused_or_admitted(run, copy, tmp_path):
    one, two = sorted(copy.iterdir())[:2]
    first = sorted(one.iterdir())[0]
    kept = tmp_path / first.name
    shutil.copy(first, kept)

    os.rename(first, one / "zzz.png")
    sentence = run(3)
    assert "the data has changed since checkpoint" in sentence and "step-00000002: other images, or the same in another order. " in sentence
    assert "data.changed=continue" in sentence
    os.rename(one / "zzz.png", two / "zzz.png")
    assert "step-00000002: other labels, other images" in run(3)
    os.remove(two / "zzz.png")
    assert "step-00000002: 77 images instead of 78. " in run(3)
    shutil.copy(kept, first)
    shutil.copy(kept, one / "more.png")
    assert "79 images instead of 78" in run(3)
    shutil.copytree(one, copy / "new")
    assert "has num_classes 13, but this run has 14" in run(3, changed="continue")
    shutil.rmtree(copy / "new")
    assert len(run(3, changed="continue")) == 4  # a little over 3 steps of what is now an epoch
    assert len(run(4)) == 5  # its checkpoint holds what the data are now
    (tmp_path / "list").write_text("0\n")
    assert "78 images instead of 79" in run(5, exclude=str(tmp_path / "list"))
    assert "another run.seed" in run(5, seed=6)


@pytest.mark.slow
def test_what_may_change_and_what_earlier_versions_did_not_say(run, copy, tmp_path):
    moved = copy.with_name("moved")
    os.rename(copy, moved)
    assert len(run(3, train=str(moved))) == 3
    saved = checkpoint.newest(str(tmp_path / "run" / "checkpoints"))
    assert saved.info["images"] == 78 and saved.info["weights"] == [] and saved.info["seed"] == 5
    edit_manifest(saved.path, lambda values: [values.pop(key) for key in ("images", "labels", "image_order", "weights", "seed")])
    (next(moved.iterdir()) / "more.png").write_bytes(next(moved.rglob("*.*")).read_bytes())
    assert len(run(4, train=str(moved))) == 5


@pytest.mark.slow
def test_weights_train_resume_and_may_not_change(ranks, data, tmp_path):
    """Two sets of 4 and 9 identities, each half of the stream."""
    sets = [tmp_path / "a", tmp_path / "b.rec"]
    for number, identity in enumerate(sorted(os.listdir(data))):
        shutil.copytree(os.path.join(data, identity), tmp_path / ("a" if number < 4 else "b") / identity)
    pack(FolderSource(str(tmp_path / "b")), str(sets[1]))
    base = configuration(f"{sets[0]},{sets[1]}", str(tmp_path / "run"), 5, save_every=2)
    config = replace(base, data=replace(base.data, weights=(1.0, 1.0)))
    whole = ranks(1).run(train_losses, replace(config, run=replace(config.run, folder=str(tmp_path / "whole"))))[0]
    ranks(2).run(train_until, config, 3)
    for sentence, options in (
        ("other data.weights, or other sizes of the sets", {"weights": (1.0, 2.0)}),
        ("has identity names with the checksum", {"identities": "joined"}),
    ):
        assert sentence in ranks(1).run(losses_or_sentence, replace(config, data=replace(config.data, **options)))[0]
    np.testing.assert_allclose(ranks(1).run(train_losses, config)[0], whole, rtol=1e-4)
