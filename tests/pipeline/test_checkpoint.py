"""Checkpoints: any number of ranks, verified, atomic, the newest good one chosen."""

from __future__ import annotations

import logging
import os

import pytest
import torch
import torch.distributed as dist

from partial_fc.shards import ClassShard
from pipeline import checkpoint

ROWS, WIDTH = 10, 3  # over 4 ranks: 3, 3, 3, 1


def local_part(rows):
    """This rank's rows of a matrix with that many."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    shard = ClassShard.of_rank(rows, rank, size)
    return torch.arange(rows * WIDTH, dtype=torch.float32).view(rows, WIDTH)[shard.first : shard.first + shard.rows].clone()


def save(folder, step=1, keep=3, rows=ROWS):
    state = {"prototypes": checkpoint.sharded(local_part(rows), rows), "backbone.weight": torch.ones(4) * step}
    return checkpoint.save(folder, step, state, {"consumed": step, "num_classes": rows}, keep)


def load(folder, rows=ROWS):
    local = torch.zeros_like(local_part(rows))
    path = checkpoint.locate(folder)
    checkpoint.load(path, {"prototypes": checkpoint.sharded(local, rows)})
    return bool(torch.equal(local, local_part(rows))), checkpoint.load_replicated(path, "backbone.")["backbone.weight"].tolist()


@pytest.mark.parametrize("rows", [1, 2, ROWS])  # also where ranks are empty
@pytest.mark.parametrize(("before", "after"), [(1, 4), (2, 3), (4, 1), (3, 2), (4, 2), (4, 3)])
def test_saved_on_some_ranks_loads_on_others(ranks, tmp_path, before, after, rows):
    ranks(before).run(save, str(tmp_path), 1, 3, rows)
    assert ranks(after).run(load, str(tmp_path), rows) == [(True, [1.0] * 4)] * after


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        save(str(tmp_path), step, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000015", "step-00000020"]
    assert checkpoint.newest(str(tmp_path)).endswith("step-00000020")
    assert checkpoint.newest(str(tmp_path / "missing")) is None


def truncate(path):
    file = next(os.path.join(path, name) for name in os.listdir(path) if name.endswith(".distcp"))
    os.truncate(file, os.path.getsize(file) // 2)


def flip_a_bit(path):
    file = next(os.path.join(path, name) for name in os.listdir(path) if name.endswith(".distcp"))
    with open(file, "r+b") as handle:
        handle.seek(os.path.getsize(file) // 2)
        byte = handle.read(1)
        handle.seek(-1, 1)
        handle.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (truncate, "bytes instead of"),
        (flip_a_bit, "have changed since it was written"),
        (lambda path: os.remove(os.path.join(path, ".metadata")), ".metadata is missing"),
        (lambda path: os.remove(os.path.join(path, checkpoint.INFO)), "cannot be read"),
        (lambda path: os.truncate(os.path.join(path, checkpoint.INFO), 20), "cannot be read"),
        (lambda path: os.rename(path, path + checkpoint.PARTIAL), None),  # cut off before it was complete
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage, fault, caplog):
    first, second = save(str(tmp_path), 1), save(str(tmp_path), 2)
    damage(second)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.newest(str(tmp_path)) == first
    if fault:
        assert second in caplog.text and fault in caplog.text
        if os.path.isfile(os.path.join(second, checkpoint.INFO)):
            with pytest.raises(ValueError, match=r"cannot be (used|read)"):
                checkpoint.locate(second)


def test_saving_again_after_an_interruption(tmp_path):
    """What a broken-off save leaves under the temporary name does not disturb the next one."""
    os.makedirs(tmp_path / ("step-00000003" + checkpoint.PARTIAL))
    (tmp_path / ("step-00000003" + checkpoint.PARTIAL) / "rubbish").write_text("x")
    path = save(str(tmp_path), 3)
    assert checkpoint.verify(path) is None and os.listdir(tmp_path) == ["step-00000003"]
    assert "rubbish" not in checkpoint.read_info(path)["files"]


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(ValueError, match="there is no complete checkpoint at"):
        checkpoint.locate(str(tmp_path))
