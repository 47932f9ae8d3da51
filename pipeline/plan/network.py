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
from pipeline.engine.parameters import freeze

IN_FLIGHT = 3  # tensors as large as an activation, or as its gradient: the one that comes in, the one that goes out, and a shortcut's


class Footprint(NamedTuple):
    """Bytes."""

    weights: int  # in float32
    moving: int  # of these, what is not frozen: as much again are gradients, and each number of the optimizer's state
    buffers: int
    largest: int  # of the weights' tensors
    activations: int  # what forward leaves to backward, casts of the weights included
    work: int  # what forward and backward take beyond them at their peak


@functools.cache
def footprint(config: backbones.BackboneConfig, image_size: int, batch: int, *, in_half: bool, frozen: tuple[str, ...] = ()) -> Footprint:
    """Of a backbone with `batch` images, trained under autocast, in bfloat16 or float16, if in_half. frozen: as optimizer.frozen"""
    with FakeTensorMode():
        network = backbones.build(replace(config, checkpoint_activations=False), image_size)
        freeze(network, frozen)
        # As the trainer's loader gives them, but for the precision, which autocast rounds.
        images = torch.empty(batch, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
        saved = _Saved(itertools.chain(network.parameters(), network.buffers(), [images]))
        for part in network.modules():
            if not list(part.children()):
                part.register_forward_hook(saved.leave_layer)
        if config.checkpoint_activations:
            for part in network.modules():
                if isinstance(part, Block):
                    part.register_forward_pre_hook(saved.enter_block)
                    part.register_forward_hook(saved.leave_block)
        # A GPU's autocast casts the same operations; fake tensors of a GPU need a build of torch for it.
        with torch.autocast("cpu", torch.bfloat16, enabled=in_half), torch.autograd.graph.saved_tensors_hooks(saved.note, lambda x: x):
            network(images)
        weights = [weight.nbytes for weight in network.parameters()]
        moving = sum(weight.nbytes for weight in network.parameters() if weight.requires_grad)
        buffers = sum(buffer.nbytes for buffer in network.buffers())
        kept, peak = saved.kept(), max(saved.peak(), saved.forward)
    return Footprint(sum(weights), moving, buffers, max(weights), kept, peak - kept)


@functools.cache
def operations(config: backbones.BackboneConfig, image_size: int) -> float:
    """Of the products of one image's forward pass: a multiplication and an addition each count."""
    from torch.utils.flop_counter import FlopCounterMode

    batch = 2  # the least that batch statistics take
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        backbones.build(replace(config, checkpoint_activations=False), image_size)(torch.empty(batch, 3, image_size, image_size))
    return counter.get_total_flops() / batch


class _Saved:
    """What forward leaves to backward, in the order of forward. A checkpointed block leaves its input; backward computes the rest again,
    before it goes through the block."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self.known = {tensor.untyped_storage()._cdata for tensor in own}
        self.held: list[torch.UntypedStorage] = []  # so that no address comes twice
        self.sizes: list[int | list[int]] = []  # a list: of a block's inside
        self.inside: list[int] | None = None
        self.forward = 0  # its peak

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

    def leave_layer(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.forward = max(self.forward, self.kept() + sum(self.inside or ()) + IN_FLIGHT * output.nbytes)

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
