"""The data-parallel backbone behind one small interface: DeepSpeed ZeRO 1 to 3, or DDP. The class shard never enters it, because
everything inside an engine is broadcast from rank 0 and averaged over ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.checkpoint import Part, Saved
from pipeline.distributed import Place
from pipeline.engine.config import EngineConfig, has_bfloat16
from pipeline.engine.ddp import DDPEngine, FrozenEngine
from pipeline.engine.deepspeed import BUCKET, LIVE, DeepSpeedEngine
from pipeline.schedule import OptimizerConfig

__all__ = ["BUCKET", "LIVE", "Engine", "EngineConfig", "build_engine", "has_bfloat16"]


class Engine(Protocol):
    """One step: for each micro-batch `forward`, then `backward`; then `clip` and `step`, or `skip`. `is_last` marks the micro-batch after
    which gradients are averaged over ranks. Gradients of micro-batches add up, so the caller divides the loss by their number."""

    module: nn.Module  # with ZeRO 3 without its weights

    def forward(self, images_bCHW: Tensor, is_last: bool) -> Tensor:
        """Features float32 [b, D]."""
        ...

    def backward(self, features_bD: Tensor, grad_bD: Tensor, is_last: bool) -> None: ...

    def gradients(self) -> list[Tensor]:
        """The averaged gradients of the step, of which this rank holds all or a part. Writing to them changes them."""
        ...

    def clip(self) -> list[Tensor]:
        """Clips the averaged gradients (or leaves it to `step`), and returns tensors of this rank that are all finite if they are."""
        ...

    def step(self, lr: float, left_out: Tensor) -> None:
        """left_out: float32 number on the device, equal on every rank; if it is 1, the step is as `skip`. DeepSpeed waits for it."""
        ...

    def skip(self) -> None:
        """Forgets the gradients, leaves weights and optimizer state as they are, and goes on to the next step."""
        ...

    def gradient_norm(self) -> float:
        """2-norm of the last step's averaged gradient before clipping. Waits for the device."""
        ...

    def for_evaluation(self) -> AbstractContextManager[nn.Module]:
        """Within it a module with whole weights and with batch statistics averaged over ranks, which communicates nothing; what training
        goes on with stays as it is, to the bit. Every rank must enter it. 1 all-reduce, with ZeRO 3 also an all-gather per parameter."""
        ...

    def state(self) -> dict[str, Part]:
        """This rank's parts of weights, buffers and optimizer state under names that depend neither on the engine nor on the number of
        ranks: backbone.NAME, optimizer.NAME.KEY, and buffers_of_ranks with a row of every rank's own batch statistics, from which the same
        number of ranks goes on exactly. What training goes on with stays as it is. Every rank must call it. 1 all-reduce."""
        ...

    def load(self, saved: Saved) -> None:
        """Takes over what `state` gave, on this or another number of ranks or engine, and reads only this rank's parts. Optimizer state may
        be absent, all of it or of some weights, and then stays as it is."""
        ...


def build_engine(
    config: EngineConfig, optimizer: OptimizerConfig, module: nn.Module, place: Place, accumulation: int, deterministic: bool = False
) -> Engine:
    torch.backends.cudnn.allow_tf32 = config.precision != "float32"
    torch.backends.cudnn.benchmark = not deterministic  # all batches of a run have one shape
    module = module.to(place.device)
    if config.compile:
        module.compile()  # in place: names of weights stay
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return FrozenEngine(config, module, place)
    if config.name == "deepspeed":
        if optimizer.clip_jointly:
            raise ValueError("optimizer.clip_jointly needs engine.name=ddp: DeepSpeed clips the backbone alone, within its own step")
        return DeepSpeedEngine(config, optimizer, module, place, accumulation)
    if config.zero_stage != 1:
        raise ValueError(f"engine.zero_stage={config.zero_stage} is of DeepSpeed, but engine.name is ddp: set it to 1, or choose deepspeed")
    return DDPEngine(config, optimizer, module, place, deterministic)
