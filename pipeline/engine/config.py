"""Options of the data-parallel backbone, and whether a processor computes in bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class EngineConfig:
    name: Literal["deepspeed", "ddp"] = "deepspeed"
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: GPUs if every rank can have one
    zero_stage: Literal[1, 2] = 1  # 1 shards the optimizer's state over ranks, 2 its gradients too
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of the backbone's products; auto: bfloat16 where the hardware has it
    compress: bool = False  # gradients travel between ranks in bfloat16: half the bytes, and a rounding per rank
    compile: bool = False  # torch.compile of the backbone: half a minute or more at the start, and a C++ compiler on a CPU

    def __post_init__(self) -> None:
        if self.name not in ("deepspeed", "ddp"):
            raise ValueError(f"engine.name is {self.name!r}, but must be deepspeed or ddp")
        if self.zero_stage not in (1, 2):
            raise ValueError(f"engine.zero_stage is {self.zero_stage}, but must be 1 or 2 (without sharding, use engine.name=ddp)")
        if self.device not in ("auto", "cuda", "cpu"):
            raise ValueError(f"engine.device is {self.device!r}, but must be auto, cuda or cpu")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"engine.precision is {self.precision!r}, but must be auto, float32 or bfloat16")

    def autocasts(self, device: torch.device) -> bool:
        """Whether the backbone runs in bfloat16; "auto" is decided by all ranks together, so every rank must call it. 1 all-reduce."""
        if self.precision != "auto":
            return self.precision == "bfloat16"
        everywhere = torch.tensor(int(has_bfloat16(device)), device=device)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        return bool(everywhere)


def has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 run on units of their own; emulated ones are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
