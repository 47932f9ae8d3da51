"""Options of the data-parallel backbone, and whether a processor computes in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist

Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class EngineConfig:
    name: Literal["deepspeed", "ddp"] = "deepspeed"  # of the backbone: DeepSpeed's ZeRO, which shards, or whole copies
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: GPUs if every rank can have one
    zero_stage: Literal[1, 2, 3] = 1  # of deepspeed: 1 shards the optimizer's state over ranks, 2 gradients too, 3 weights too
    precision: Precision = "auto"  # of the backbone's products; auto: bfloat16 where the hardware has it. float16 scales the loss
    compress: bool = False  # gradients travel between ranks in bfloat16: half the bytes, and a rounding per rank
    compile: bool = False  # torch.compile of the backbone: half a minute or more at the start, and a C++ compiler on a CPU

    def __post_init__(self) -> None:
        if self.name not in ("deepspeed", "ddp"):
            raise ValueError(f"engine.name is {self.name!r}, but must be deepspeed or ddp")
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(f"engine.zero_stage is {self.zero_stage}, but must be 1, 2 or 3 (without sharding, use engine.name=ddp)")
        if self.device not in ("auto", "cuda", "cpu"):
            raise ValueError(f"engine.device is {self.device!r}, but must be auto, cuda or cpu")
        if self.precision not in get_args(Precision):
            raise ValueError(f"engine.precision is {self.precision!r}, but must be auto, float32, bfloat16 or float16")
        if self.compile and self.shards_weights:
            raise ValueError("engine.compile needs whole weights, which engine.zero_stage=3 shards over ranks: choose one of them")
        if self.compress and self.precision == "float16" and self.name == "deepspeed":
            raise ValueError("engine.compress is for bfloat16, but DeepSpeed would send scaled gradients in float16: choose one of them")

    @property
    def shards_weights(self) -> bool:
        return self.name == "deepspeed" and self.zero_stage == 3

    def autocasts(self, device: torch.device) -> torch.dtype | None:
        """In what the backbone computes instead of float32; "auto" is decided by all ranks together, so every rank must call it. 1
        all-reduce."""
        if self.precision != "auto":
            return {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.precision]
        everywhere = torch.tensor(int(has_bfloat16(device)), device=device)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        return torch.bfloat16 if everywhere else None


def has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 run on units of their own; emulated ones are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
