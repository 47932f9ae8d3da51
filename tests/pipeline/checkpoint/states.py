"""A state to save: a matrix sharded by rows, a flat fragment on each rank, tensors that all have, of several types."""

from __future__ import annotations

import json
import os

import torch
import torch.distributed as dist

from partial_fc.shards import ClassShard
from pipeline import checkpoint
from pipeline.checkpoint import checksum

ROWS, WIDTH = 10, 3  # over 4 ranks: 3, 3, 3, 1


def place():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def matrix(rows=ROWS):
    return torch.arange(rows * WIDTH, dtype=torch.float32).view(rows, WIDTH)


def shared(step=1):
    """What every rank has."""
    return {
        "backbone.weight": torch.ones(4) * step,
        "backbone.kernel": torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last),
        "backbone.half": torch.arange(5, dtype=torch.bfloat16),
        "backbone.count": torch.tensor(step),
        "backbone.mask": torch.tensor([True, False, True]),
    }


def fragment(rank, size, whole):
    """This rank's range of a flat tensor, which no rank's share divides."""
    ends = [len(whole) * at // size for at in range(size + 1)]
    return checkpoint.Part(whole[ends[rank] : ends[rank + 1]].clone(), (len(whole),), ends[rank])


def state(step=1, rows=ROWS, of=None):
    """of: (rank, ranks), else as the process group says."""
    rank, size = of or place()
    shard = ClassShard.of_rank(rows, rank, size)
    mine = matrix(rows)[shard.first : shard.first + shard.rows].clone()
    parts = {name: checkpoint.whole(tensor) for name, tensor in shared(step).items()}
    parts["optimizer.weight.exp_avg"] = fragment(rank, size, torch.arange(7.0))
    return {**parts, "prototypes": checkpoint.rows(mine, shard.first, rows)}


def save(folder, step=1, keep=3, rows=ROWS):
    info = {"consumed": step, "num_classes": rows}
    return checkpoint.save(folder, step, state(step, rows), info, keep, [f"name {n}" for n in range(rows)])


def load(folder, rows=ROWS, step=1):
    """Whether all is as it was, read in parts as this number of ranks needs them."""
    rank, size = place()
    saved = checkpoint.locate(folder)
    shard = ClassShard.of_rank(rows, rank, size)
    mine = torch.zeros(shard.rows, WIDTH)
    saved.fill("prototypes", mine, shard.first * WIDTH)
    assert torch.equal(mine, matrix(rows)[shard.first : shard.first + shard.rows])
    part = fragment(rank, size, torch.zeros(7))
    saved.fill("optimizer.weight.exp_avg", part.tensor, part.start)
    assert torch.equal(part.tensor, torch.arange(7.0)[part.start : part.start + len(part.tensor)])
    for name, tensor in shared(step).items():
        out = torch.zeros_like(tensor)
        saved.fill(name, out)
        assert torch.equal(out, tensor) and torch.equal(saved.whole(name), tensor) and saved.whole(name).dtype == tensor.dtype
    assert saved.identities() == [f"name {n}" for n in range(rows)] and saved.info["consumed"] == step
    return True


def edit_manifest(path, change, texts=None):
    """change(values) alters what a manifest says, of which the checksum is then right again.

    texts: what is written, by the string that stands for it, where that cannot be a value"""
    name = os.path.join(path, checkpoint.MANIFEST)
    with open(name) as file:
        values = json.load(file)
    change(values)
    del values["checksum"]
    text = json.dumps(values, indent=1).removeprefix("{\n")
    for word, instead in (texts or {}).items():
        text = text.replace(f'"{word}"', instead)
    rest = text.encode()
    with open(name, "wb") as file:
        file.write(b'{"checksum": "' + checksum.of(rest).encode() + b'",\n' + rest)
