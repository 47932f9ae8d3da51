"""What a backbone keeps in memory while it trains, from one forward pass on fake tensors: they have shapes but no data, so that any network
of any size takes less than a second and no memory."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline import backbones

IN_FLIGHT = 3  # gradients as large as an activation: the one that comes in, the one that goes out, and that of a shortcut


class Footprint(NamedTuple):
    """Bytes."""

    weights: int  # in float32; as much again are gradients, and each number of the optimizer's state
    buffers: int
    activations: int  # what forward leaves to backward, casts of the weights included
    backward: int  # what backward takes beyond them at its peak


@functools.cache
def footprint(name: str, width: int, image_size: int, batch: int, *, in_bfloat16: bool) -> Footprint:
    """Of the backbone `name` with `batch` images, trained under autocast if in_bfloat16."""
    with FakeTensorMode():
        network = backbones.build(backbones.BackboneConfig(name, width), image_size)
        # As the trainer's loader gives them, but for the precision, which autocast rounds.
        images = torch.empty(batch, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
        own = {tensor.untyped_storage()._cdata for tensor in itertools.chain(network.parameters(), network.buffers(), [images])}
        saved: dict[int, torch.UntypedStorage] = {}  # in the order of forward; held, so that no address comes twice

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved.setdefault(storage._cdata, storage)
            return tensor

        # A GPU's autocast casts the same operations; fake tensors of a GPU need a build of torch for it.
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            network(images)
        sizes = [storage.nbytes() for storage in saved.values()]
        weights, buffers = (sum(tensor.nbytes for tensor in tensors) for tensors in (network.parameters(), network.buffers()))
    # Backward frees them from the last to the first.
    left = itertools.accumulate(sizes)
    peak = max((before + IN_FLIGHT * size for before, size in zip(left, sizes, strict=True)), default=0)
    return Footprint(weights, buffers, sum(sizes), peak - sum(sizes))
