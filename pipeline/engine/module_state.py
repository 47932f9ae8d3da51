"""Weights and buffers of a backbone as parts of a checkpoint, and its batch statistics, of which every rank has its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.checkpoint import Part, Saved, rows, whole

OF_RANKS = "buffers_of_ranks"  # in a checkpoint: a row of each rank's own batch statistics, from which the same number of ranks goes on


def statistics_of(module: nn.Module) -> dict[str, Tensor]:
    """By name, buffers that differ between ranks: floating ones of layers in training mode. Those of layers in eval mode are frozen, and
    equal everywhere."""
    parts = [(name, part) for name, part in module.named_modules() if part.training]
    return {
        f"{name}.{key}" if name else key: buffer
        for name, part in parts
        for key, buffer in part.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }


@torch.no_grad()
def averages_of(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their averages over ranks, equal on every rank. Batch statistics are taken per rank while training; running averages are linear in
    them, so averaging now or at every step gives the same numbers. 1 all-reduce."""
    if dist.get_world_size() == 1 or not buffers:
        return dict(buffers)
    flat = _flat(buffers)
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([buffer.numel() for buffer in buffers.values()])
    return {name: part.view_as(buffer).to(buffer.dtype) for (name, buffer), part in zip(buffers.items(), parts, strict=True)}


@contextmanager
def averaged_buffers(module: nn.Module) -> Iterator[None]:
    """Within it batch statistics are the averages over ranks; afterwards every rank has its own again, to the bit."""
    buffers = statistics_of(module)
    own = {name: buffer.clone() for name, buffer in buffers.items()}
    try:
        _copy(averages_of(buffers), buffers)
        yield
    finally:
        _copy(own, buffers)


def module_parts(module: nn.Module, prefix: str, of_ranks: str, tensors: dict[str, Tensor] | None = None) -> dict[str, Part]:
    """Weights and buffers, equal on every rank: batch statistics as averages, and each rank's own as a row of `of_ranks`. The module stays
    as it is. 1 all-reduce.

    tensors: by the names of the module's state dict, what is given in its place"""
    tensors = dict(module.state_dict()) if tensors is None else tensors
    statistics = {name: tensors[name] for name in statistics_of(module) if name in tensors}
    averages = averages_of(statistics)
    parts = {f"{prefix}{name}": whole(averages.get(name, tensor)) for name, tensor in tensors.items()}
    if statistics:
        parts[of_ranks] = rows(_flat(statistics)[None], dist.get_rank(), dist.get_world_size())
    return parts


@torch.no_grad()
def load_module(module: nn.Module, saved: Saved, prefix: str, of_ranks: str, tensors: dict[str, Tensor] | None = None) -> None:
    """Takes over what `module_parts` gave; batch statistics of its own rank if there were as many ranks, else averages. ValueError for a
    name that is missing or has another shape."""
    tensors = dict(module.state_dict()) if tensors is None else tensors
    for name, tensor in tensors.items():
        fill(saved, f"{prefix}{name}", tensor)
    statistics = {name: tensors[name] for name in statistics_of(module) if name in tensors}
    count = sum(buffer.numel() for buffer in statistics.values())
    if count and of_ranks in saved and saved.shape(of_ranks) == (dist.get_world_size(), count):
        row = torch.empty(count, dtype=_flat(statistics).dtype)
        saved.fill(of_ranks, row, dist.get_rank() * count)
        parts = row.split([buffer.numel() for buffer in statistics.values()])
        _copy(dict(zip(statistics, parts, strict=True)), statistics)


def fill(saved: Saved, name: str, out: Tensor, start: int = 0, shape: tuple[int, ...] | None = None) -> None:
    """`saved.fill`, once the saved tensor was found to be there and of this shape (by default that of `out`)."""
    wanted = tuple(out.shape) if shape is None else shape
    found = saved.shape(name) if name in saved else None
    if found != wanted:
        what = "no tensor" if found is None else f"a tensor of shape {list(found)}"
        raise ValueError(f"the checkpoint has {what} {name}, but this run's has shape {list(wanted)}: it is of another backbone")
    saved.fill(name, out, start)


def _flat(buffers: dict[str, Tensor]) -> Tensor:
    return torch.cat([buffer.flatten() for buffer in buffers.values()])


@torch.no_grad()
def _copy(values: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        if buffer is not values[name]:
            buffer.copy_(values[name].view_as(buffer))
