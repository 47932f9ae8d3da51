"""The data-parallel backbone behind one small interface: DeepSpeed ZeRO 1-2, or DDP. The class shard never enters it, because
everything inside an engine is broadcast from rank 0 and averaged over ranks."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.checkpoint import Part, Saved
from pipeline.distributed import Place
from pipeline.engine.config import EngineConfig, has_bfloat16
from pipeline.engine.ddp import DDPEngine, FrozenEngine
from pipeline.engine.deepspeed import BUCKET, DeepSpeedEngine
from pipeline.engine.module_state import average_buffers
from pipeline.schedule import OptimizerConfig

__all__ = ["BUCKET", "Engine", "EngineConfig", "average_buffers", "build_engine", "has_bfloat16"]


class Engine(Protocol):
    """One step: for each micro-batch `forward`, then `backward`; then `step`. `is_last` marks the micro-batch after which gradients
    are averaged over ranks. Gradients of micro-batches add up, so the caller divides the loss by their number."""

    module: nn.Module

    def forward(self, images_bCHW: Tensor, is_last: bool) -> Tensor:
        """Features float32 [b, D]."""
        ...

    def backward(self, features_bD: Tensor, grad_bD: Tensor, is_last: bool) -> None: ...

    def step(self, lr: float) -> None: ...

    def skip(self) -> None:
        """Called instead of `step`: forgets the gradients, leaves weights and optimizer state as they are, and goes on to the next step."""
        ...

    def gradient_norm(self) -> float:
        """2-norm of the last step's averaged gradient before clipping. Waits for the device."""
        ...

    def state(self) -> dict[str, Part]:
        """Weights, buffers and optimizer state, under names that depend neither on the engine nor on the number of ranks: backbone.NAME and
        optimizer.NAME.KEY. Every rank must call it."""
        ...

    def load(self, saved: Saved) -> None:
        """Takes over what `state` gave, on this or another number of ranks or engine. The optimizer's part may be absent."""
        ...


def build_engine(config: EngineConfig, optimizer: OptimizerConfig, module: nn.Module, place: Place, accumulation: int) -> Engine:
    torch.backends.cudnn.allow_tf32 = config.precision != "float32"
    torch.backends.cudnn.benchmark = True  # all batches of a run have one shape
    module = module.to(place.device)
    if config.compile:
        module.compile()  # in place: names of weights stay
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return FrozenEngine(config, module, place)
    if config.name == "deepspeed":
        if optimizer.clip_jointly:
            raise ValueError("optimizer.clip_jointly needs engine.name=ddp: DeepSpeed clips the backbone alone, within its own step")
        return DeepSpeedEngine(config, optimizer, module, place, accumulation)
    return DDPEngine(config, optimizer, module, place)
