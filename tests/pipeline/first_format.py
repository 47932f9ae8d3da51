"""Writes checkpoints of format 1 as the last version that had it, on any number of ranks: shards are DTensors."""

from __future__ import annotations

import json
import os
import zlib

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from pipeline import checkpoint, run_checkpoints, same_run
from pipeline.config import as_dict


def write(folder, step, parts, info, identities=None):
    """Every rank calls it with its parts, of which those that are not replicated are rows. The path."""
    path = os.path.join(folder, f"step-{step:08}")
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        os.makedirs(path)
        if identities is not None:
            with open(os.path.join(path, "identities.json"), "w") as file:
                json.dump(list(identities), file)
    barrier()
    state = {name: part.tensor if part.replicated else sharded(part) for name, part in parts.items()}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(path), no_dist=not dist.is_initialized())
    if first:
        files = {}
        for name in sorted(os.listdir(path)):
            with open(os.path.join(path, name), "rb") as file:
                content = file.read()
            files[name] = [len(content), zlib.crc32(content)]
        with open(os.path.join(path, checkpoint.MANIFEST), "w") as file:
            json.dump({"format": 1, "step": step, **info, "files": files}, file, indent=1)
    barrier()
    return path


def sharded(part):
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return part.tensor
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    stride = torch.empty(part.shape, device="meta").stride()
    return DTensor.from_local(part.tensor, mesh, [Shard(0)], run_check=False, shape=torch.Size(part.shape), stride=stride)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def save(run, figures=None):
    """In place of run_checkpoints.save, for a whole run."""
    info = {
        **same_run.identity(run),
        **same_run.order(run),
        "consumed": run.consumed,
        "skipped_steps": run.classifier.skipped_steps,
        "world_size": run.place.world_size,
        "started_from": run.started_from,
        "config": as_dict(run.config),
    }
    write(run.checkpoints, run.step, run_checkpoints.state(run), info, run.source.identities)
