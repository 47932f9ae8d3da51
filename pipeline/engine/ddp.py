"""The backbone in DistributedDataParallel, which holds everything on every rank; and a backbone of which nothing moves."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from pipeline.checkpoint import Part, Saved, whole
from pipeline.distributed import Place
from pipeline.engine.config import EngineConfig
from pipeline.engine.module_state import OF_RANKS, averaged_buffers, fill, load_module, module_parts
from pipeline.engine.optimizer import build_optimizer, make_state, set_rate
from pipeline.schedule import OptimizerConfig


class _Replicated:
    """A backbone that every rank has all of."""

    def __init__(self, config: EngineConfig, module: nn.Module, place: Place) -> None:
        # As images lie. DeepSpeed's flat copies of weights cannot, so there every convolution rearranges its own.
        self.module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        dtype = config.autocasts(place.device)
        self.autocast = torch.autocast(place.device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    @contextmanager
    def for_evaluation(self) -> Iterator[nn.Module]:
        with averaged_buffers(self.module):
            yield self.module

    def state(self) -> dict[str, Part]:
        return module_parts(self.module, "backbone.", OF_RANKS)

    def load(self, saved: Saved) -> None:
        load_module(self.module, saved, "backbone.", OF_RANKS)


class DDPEngine(_Replicated):
    def __init__(
        self, config: EngineConfig, optimizer: OptimizerConfig, module: nn.Module, place: Place, deterministic: bool = False
    ) -> None:
        super().__init__(config, module, place)
        self.parallel: nn.Module = self.module
        if place.world_size > 1:
            devices = [place.device] if place.device.type == "cuda" else None
            # torch 2.13 calls this argument forward_sync_buffers and warns; 2.11 knows only the old name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)  # 1x1 kernels, channels last
            warnings.filterwarnings("ignore", "find_unused_parameters=True was specified", UserWarning)
            # Gradients become views of the buckets that travel: one copy in, none out, and no second memory.
            parallel = nn.parallel.DistributedDataParallel(
                self.module,
                devices,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                # After its first step DDP makes other buckets, in which 3 ranks or more add up in another order: a run that resumes would
                # round that step otherwise. With this option it keeps those it has.
                find_unused_parameters=deterministic,
            )
            if config.compress:
                # Under its own name DDP admits the hook with NCCL only.
                parallel.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
            self.parallel = parallel
        self.optimizer = build_optimizer(optimizer, self.module)
        for parameter in self._moving().values():
            self.optimizer.state[parameter] = make_state(optimizer, parameter)
        self.max_norm = (not optimizer.clip_jointly and optimizer.clip) or float("inf")
        self.norm = torch.zeros(())

    def _moving(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}

    def _maybe_local(self, is_last: bool) -> Any:
        return nullcontext() if is_last or self.parallel is self.module else self.parallel.no_sync()  # type: ignore[operator]

    def forward(self, images_bCHW: Tensor, is_last: bool) -> Tensor:
        with self._maybe_local(is_last), self.autocast:
            return self.parallel(images_bCHW).float()

    def backward(self, features_bD: Tensor, grad_bD: Tensor, is_last: bool) -> None:
        with self._maybe_local(is_last):
            features_bD.backward(grad_bD)

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]

    def clip(self) -> list[Tensor]:
        self.norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.max_norm)
        return [self.norm]

    def step(self, lr: float, left_out: Tensor) -> None:
        set_rate(self.optimizer, lr)
        if self.optimizer.defaults["fused"]:  # as on every CPU and GPU: these look at it on the device, as for a GradScaler
            self.optimizer.found_inf, self.optimizer.grad_scale = left_out, None  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def skip(self) -> None:
        self.norm = torch.tensor(torch.inf)
        self.optimizer.zero_grad()

    def gradient_norm(self) -> float:
        return float(self.norm)

    def state(self) -> dict[str, Part]:
        parts = super().state()
        for name, parameter in self._moving().items():
            parts |= {f"optimizer.{name}.{key}": whole(value) for key, value in self.optimizer.state[parameter].items()}
        return parts

    @torch.no_grad()
    def load(self, saved: Saved) -> None:
        super().load(saved)
        for name, parameter in self._moving().items():
            for key, value in self.optimizer.state[parameter].items():
                if f"optimizer.{name}.{key}" in saved:  # else it did not move before: a ViT's mask token
                    fill(saved, f"optimizer.{name}.{key}", value)


class FrozenEngine(_Replicated):
    """A backbone of which nothing moves: only the classifier is trained."""

    def __init__(self, config: EngineConfig, module: nn.Module, place: Place) -> None:
        super().__init__(config, module, place)
        self.gradient = torch.zeros(0, device=place.device)  # of the last features, which nobody needs, but tells of others

    def forward(self, images_bCHW: Tensor, is_last: bool) -> Tensor:
        with torch.no_grad(), self.autocast:
            return self.module(images_bCHW).float()

    def backward(self, features_bD: Tensor, grad_bD: Tensor, is_last: bool) -> None:
        self.gradient = grad_bD

    def gradients(self) -> list[Tensor]:
        return []

    def clip(self) -> list[Tensor]:
        return [self.gradient]

    def step(self, lr: float, left_out: Tensor) -> None:
        pass

    def skip(self) -> None:
        pass

    def gradient_norm(self) -> float:
        return 0.0
