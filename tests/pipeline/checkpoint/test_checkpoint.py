"""Checkpoints: any number of ranks, verified, atomic, the newest sound one chosen."""

from __future__ import annotations

import logging
import os

import pytest
import torch
from safetensors.torch import load_file

from pipeline import checkpoint
from pipeline.checkpoint import data_file
from tests.pipeline.checkpoint.states import ROWS, edit_manifest, load, matrix, save, shared


@pytest.mark.parametrize("rows", [1, 2, ROWS])  # also where ranks are empty
@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 3), (4, 1), (3, 2), (4, 2), (4, 3)])
def test_saved_on_some_ranks_loads_on_others(ranks, tmp_path, before, after, rows):
    ranks(before).run(save, str(tmp_path), 1, 3, rows)
    assert ranks(after).run(load, str(tmp_path), rows) == [True] * after


def test_the_files_are_safetensors_and_no_rank_writes_all(ranks, tmp_path):
    (path, _) = ranks(2).run(save, str(tmp_path))
    first, second = (load_file(os.path.join(path, f"rank-0000{rank}.safetensors")) for rank in range(2))
    assert torch.equal(torch.cat([first["prototypes"], second["prototypes"]]), matrix())
    for name, tensor in shared().items():
        assert (name in first) != (name in second)
        assert torch.equal({**first, **second}[name], tensor)
    assert any(name in second for name in shared()) and any(name in first for name in shared())


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        save(str(tmp_path), step, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000015", "step-00000020"]
    assert checkpoint.newest(str(tmp_path)).info["step"] == 20
    assert checkpoint.newest(str(tmp_path / "missing")) is None


def data(path):
    return next(os.path.join(path, name) for name in os.listdir(path) if name.endswith(".safetensors"))


def flip_a_bit(file):
    with open(file, "r+b") as handle:
        handle.seek(os.path.getsize(file) // 2)
        byte = handle.read(1)
        handle.seek(-1, 1)
        handle.write(bytes([byte[0] ^ 1]))


def replace_by_a_folder(file):
    os.remove(file)
    os.mkdir(file)


def replace_by_a_pipe(file):
    os.remove(file)
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: os.truncate(data(path), os.path.getsize(data(path)) // 2), "bytes instead of"),
        (lambda path: flip_a_bit(data(path)), "have changed since it was written"),
        (lambda path: os.remove(data(path)), "rank-00000.safetensors is missing"),
        (lambda path: replace_by_a_folder(data(path)), "is not a file"),
        (lambda path: replace_by_a_pipe(data(path)), "is not a file"),
        (lambda path: os.remove(os.path.join(path, checkpoint.MANIFEST)), "cannot be read"),
        (lambda path: os.truncate(os.path.join(path, checkpoint.MANIFEST), 20), "has changed since it was written"),
        (lambda path: flip_a_bit(os.path.join(path, checkpoint.MANIFEST)), "has changed since it was written"),
        (lambda path: replace_by_a_folder(os.path.join(path, checkpoint.MANIFEST)), "cannot be read"),
        (lambda path: os.rename(path, path + ".partial"), None),  # cut off before it was complete
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage, fault, caplog):
    first, second = save(str(tmp_path), 1), save(str(tmp_path), 2)
    damage(second)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(str(tmp_path)).path == first
    if fault:
        assert second in caplog.text and fault in caplog.text
        if os.path.isfile(os.path.join(second, checkpoint.MANIFEST)):
            with pytest.raises(ValueError, match="cannot be used"):
                checkpoint.locate(second)


def test_where_all_are_damaged_nothing_begins_anew_without_a_word(tmp_path):
    for step in (1, 2):
        flip_a_bit(data(save(str(tmp_path), step)))
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints in .* can be used: bring back a copy"):
        checkpoint.newest(str(tmp_path))


def test_a_checkpoint_under_another_step_is_not_taken_for_it(tmp_path):
    save(str(tmp_path), 1)
    os.rename(save(str(tmp_path), 2), tmp_path / "step-00000009")
    assert checkpoint.newest(str(tmp_path)).info["step"] == 1
    os.rename(tmp_path / "step-00000009", tmp_path / "kept")  # by a name of one's own
    assert checkpoint.locate(str(tmp_path / "kept")).info["step"] == 2


def test_saving_again_after_an_interruption(tmp_path):
    """What a broken-off save leaves under the temporary name does not disturb the next one."""
    os.makedirs(tmp_path / "step-00000003.partial")
    (tmp_path / "step-00000003.partial" / "rubbish").write_text("x")
    path = save(str(tmp_path), 3)
    assert checkpoint.newest(str(tmp_path)).path == path and os.listdir(tmp_path) == ["step-00000003"]
    assert not os.path.exists(os.path.join(path, "rubbish"))


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(ValueError, match="there is no complete checkpoint at"):
        checkpoint.locate(str(tmp_path))


def test_a_newer_version_is_neither_read_nor_passed_over(tmp_path):
    save(str(tmp_path), 1)
    path = save(str(tmp_path), 2)
    edit_manifest(path, lambda values: values.update(format=3))
    for find in (checkpoint.newest, checkpoint.locate):
        with pytest.raises(ValueError, match="it is of format 3, and this version reads formats 1 and 2: use a newer version"):
            find(str(tmp_path))


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    good = save(str(tmp_path), 1)
    for value in (torch.nan, torch.inf):
        bad = {"backbone.weight": checkpoint.whole(torch.tensor([1.0, value, 2.0], dtype=torch.bfloat16))}
        with pytest.raises(checkpoint.NotFiniteError, match=r"backbone\.weight is not finite"):
            checkpoint.save(str(tmp_path), 2, bad, {})
    assert os.listdir(tmp_path) == [os.path.basename(good)]


def test_a_tensor_is_judged_and_written_in_pieces_of_its_own_memory():
    for dtype in (torch.float32, torch.bfloat16):
        weights = torch.arange(1 << 23).to(dtype)
        pieces = list(data_file.chunks(weights))
        assert all(piece.untyped_storage().data_ptr() == weights.untyped_storage().data_ptr() for piece in pieces)
        assert max(len(piece) * piece.itemsize for piece in pieces) == data_file.CHUNK and torch.equal(torch.cat(pieces), weights)
