"""Weights and buffers of a backbone, as engines give and take them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def weights_in(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A module's state dict, in what `Engine.state` gave."""
    return {name.removeprefix("backbone."): tensor for name, tensor in state.items() if name.startswith("backbone.")}


def average_buffers(module: nn.Module) -> None:
    """Averages floating buffers over ranks. Batch statistics are taken per rank while training; their running averages are linear in
    them, so averaging now or at every step gives the same numbers. Those of layers in eval mode, which are frozen, stay as they are: the
    average of equal numbers may be rounded. 1 all-reduce."""
    moving = [part for part in module.modules() if part.training]
    buffers = [buffer for part in moving for buffer in part.buffers(recurse=False) if buffer.is_floating_point()]
    if dist.get_world_size() > 1 and buffers:
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for buffer, average in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(average.view_as(buffer))
