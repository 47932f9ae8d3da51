"""A running average of the backbone's weights, in float32, evaluated and saved beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pipeline.checkpoint import Part, Saved
from pipeline.engine.module_state import averaged_buffers, load_module, module_parts

OF_RANKS = "ema_buffers_of_ranks"


class Ema:
    """After each step: average = d average + (1 - d) weights, with d = min(decay, (1 + steps) / (10 + steps)), so that the random weights
    of the first steps do not weigh on a short run. Running batch statistics are averaged alike, since they belong to the weights of their
    time; counts are those of the present. Each rank has all of it: 4 bytes per weight. It needs no communication, except that batch
    statistics are averaged over ranks when the average is used, which gives what doing so at every step would."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.averages: dict[str, Tensor] = {}

    @torch.no_grad()
    def restart(self, module: nn.Module) -> None:
        """From the weights as they are."""
        self.averages = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, steps: int) -> None:
        """steps: those that were done before this one"""
        weight = 1 - min(self.decay, (1 + steps) / (10 + steps))
        pairs = [(self.averages[name], tensor) for name, tensor in module.state_dict().items()]
        moving = [(average, tensor) for average, tensor in pairs if average.is_floating_point()]
        torch._foreach_lerp_([average for average, _ in moving], [tensor.detach() for _, tensor in moving], weight)
        for average, tensor in pairs:
            if not average.is_floating_point():
                average.copy_(tensor)

    @contextmanager
    def in_place_of(self, weights: nn.Module) -> Iterator[None]:
        """Within it the module computes with the averages; afterwards it has its own weights again, to the bit. Communicates 1
        all-reduce."""
        with self._exchanged(weights), averaged_buffers(weights):
            yield

    @contextmanager
    def _exchanged(self, module: nn.Module) -> Iterator[None]:
        self._exchange(module)
        try:
            yield
        finally:
            self._exchange(module)

    @torch.no_grad()
    def _exchange(self, module: nn.Module) -> None:
        pairs = [(self.averages[name], tensor, tensor.clone()) for name, tensor in module.state_dict().items()]
        for average, tensor, weights in pairs:  # cloned before the first is written: tied weights have two names
            tensor.copy_(average)
            average.copy_(weights)

    def state(self, module: nn.Module) -> dict[str, Part]:
        """What a checkpoint holds of it: ema.NAME of every weight and buffer, as `Engine.state` gives them, and `ema_buffers_of_ranks`.
        Every rank must call it."""
        return module_parts(module, "ema.", OF_RANKS, self.averages)

    def load(self, module: nn.Module, saved: Saved) -> None:
        """Takes over what `state` gave, on this or another number of ranks."""
        load_module(module, saved, "ema.", OF_RANKS, self.averages)
