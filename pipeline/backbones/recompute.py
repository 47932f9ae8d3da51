"""Activation checkpointing: a block forgets what it computed, and computes it again when backward needs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """Part of a network, from one tensor to another, that subclasses write as `compute`. If `checkpointed`, training keeps only its input.

    Losses, gradients and buffers are bit-equal to those without: random numbers are drawn again as they were, and batch statistics are
    counted once.
    """

    checkpointed = False

    def compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if not (self.checkpointed and self.training and torch.is_grad_enabled()):
            return self.compute(x)
        if torch.compiler.is_compiling():  # it keeps buffers out of what it computes again, and knows no context of ours
            return checkpoint(self.compute, x, use_reentrant=False)
        return checkpoint(self.compute, x, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _without_counting(self)


@contextmanager
def _without_counting(module: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the batch, as in training, but leave their running statistics as they are."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


def checkpoint_blocks(network: nn.Module, checkpointed: bool) -> None:
    for part in network.modules():
        if isinstance(part, Block):
            part.checkpointed = checkpointed
