"""What a backbone keeps in memory while it trains, from one forward pass on fake tensors: they have shapes but no data, so that any network
of any size takes less than a second and no memory."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline import backbones
from pipeline.backbones.recompute import Block

IN_FLIGHT = 3  # gradients as large as an activation: the one that comes in, the one that goes out, and that of a shortcut


class Footprint(NamedTuple):
    """Bytes."""

    weights: int  # in float32; as much again are gradients, and each number of the optimizer's state
    buffers: int
    activations: int  # what forward leaves to backward, casts of the weights included
    backward: int  # what backward takes beyond them at its peak


@functools.cache
def footprint(config: backbones.BackboneConfig, image_size: int, batch: int, *, in_half: bool) -> Footprint:
    """Of a backbone with `batch` images, trained under autocast, in bfloat16 or float16, if in_half."""
    with FakeTensorMode():
        network = backbones.build(replace(config, checkpoint_activations=False), image_size)
        # As the trainer's loader gives them, but for the precision, which autocast rounds.
        images = torch.empty(batch, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
        saved = _Saved(itertools.chain(network.parameters(), network.buffers(), [images]))
        if config.checkpoint_activations:
            for part in network.modules():
                if isinstance(part, Block):
                    part.register_forward_pre_hook(saved.enter_block)
                    part.register_forward_hook(saved.leave_block)
        # A GPU's autocast casts the same operations; fake tensors of a GPU need a build of torch for it.
        with torch.autocast("cpu", torch.bfloat16, enabled=in_half), torch.autograd.graph.saved_tensors_hooks(saved.note, lambda x: x):
            network(images)
        weights, buffers = (sum(tensor.nbytes for tensor in tensors) for tensors in (network.parameters(), network.buffers()))
        kept, peak = saved.kept(), saved.peak()
    return Footprint(weights, buffers, kept, peak - kept)


class _Saved:
    """What forward leaves to backward, in the order of forward. A checkpointed block leaves its input; backward computes the rest again,
    before it goes through the block."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self.known = {tensor.untyped_storage()._cdata for tensor in own}
        self.held: list[torch.UntypedStorage] = []  # so that no address comes twice
        self.sizes: list[int | list[int]] = []  # a list: of a block's inside
        self.inside: list[int] | None = None

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.held.append(storage)
            (self.sizes if self.inside is None else self.inside).append(storage.nbytes())
        return tensor

    def enter_block(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.note(*inputs)
        self.inside = []
        self.sizes.append(self.inside)

    def leave_block(self, block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.inside = None

    def kept(self) -> int:
        return sum(size for size in self.sizes if isinstance(size, int))

    def peak(self) -> int:
        """Backward frees from the last to the first."""
        before = peak = 0
        for entry in self.sizes:
            left = before
            for size in [entry] if isinstance(entry, int) else entry:
                left += size
                peak = max(peak, left + IN_FLIGHT * size)
            if isinstance(entry, int):
                before = left
        return peak
