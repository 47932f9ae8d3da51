"""The backbone in DistributedDataParallel, which holds everything on every rank; and a backbone of which nothing moves."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from pipeline.checkpoint import Part, Saved, whole
from pipeline.distributed import Place
from pipeline.engine.config import EngineConfig
from pipeline.engine.module_state import average_buffers, weights_in
from pipeline.engine.optimizer import build_optimizer, set_rate
from pipeline.schedule import OptimizerConfig


class DDPEngine:
    def __init__(self, config: EngineConfig, optimizer: OptimizerConfig, module: nn.Module, place: Place) -> None:
        # As images lie. DeepSpeed's flat copies of weights cannot, so there every convolution rearranges its own.
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module = module
        self.autocast = torch.autocast(place.device.type, torch.bfloat16, enabled=config.autocasts(place.device))
        self.parallel: nn.Module = module
        if place.world_size > 1:
            devices = [place.device] if place.device.type == "cuda" else None
            # torch 2.13 calls this argument forward_sync_buffers and warns; 2.11 knows only the old name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)  # 1x1 kernels, channels last
            # Gradients become views of the buckets that travel: one copy in, none out, and no second memory.
            parallel = nn.parallel.DistributedDataParallel(module, devices, broadcast_buffers=False, gradient_as_bucket_view=True)
            if config.compress:
                # Under its own name DDP admits the hook with NCCL only.
                parallel.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))
            self.parallel = parallel
        self.optimizer = build_optimizer(optimizer, module)
        self.clip = (not optimizer.clip_jointly and optimizer.clip) or float("inf")
        self.norm = torch.zeros(())

    def _maybe_local(self, is_last: bool) -> Any:
        return nullcontext() if is_last or self.parallel is self.module else self.parallel.no_sync()  # type: ignore[operator]

    def forward(self, images_bCHW: Tensor, is_last: bool) -> Tensor:
        with self._maybe_local(is_last), self.autocast:
            return self.parallel(images_bCHW).float()

    def backward(self, features_bD: Tensor, grad_bD: Tensor, is_last: bool) -> None:
        with self._maybe_local(is_last):
            features_bD.backward(grad_bD)

    def step(self, lr: float) -> None:
        set_rate(self.optimizer, lr)
        self.norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def skip(self) -> None:
        self.norm = torch.tensor(torch.inf)
        self.optimizer.zero_grad()

    def gradient_norm(self) -> float:
        return float(self.norm)

    def state(self) -> dict[str, Part]:
        average_buffers(self.module)
        state = {f"backbone.{name}": tensor for name, tensor in self.module.state_dict().items()}
        for name, parameter in self.module.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{name}.{key}"] = value
        return {name: whole(tensor) for name, tensor in state.items()}

    def load(self, saved: Saved) -> None:
        state = {name: saved.whole(name) for name in saved if name.startswith(("backbone.", "optimizer."))}
        self.module.load_state_dict(weights_in(state))
        for name, parameter in self.module.named_parameters():
            prefix = f"optimizer.{name}."
            values = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
            if values:
                self.optimizer.state[parameter] = {key: _like(parameter, value) for key, value in values.items()}


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of an optimizer's state on the parameter's device, where fused optimizers have even the step, and with the parameter's
    strides, which they take for granted."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value.to(parameter, copy=True)


class FrozenEngine:
    """A backbone of which nothing moves: only the classifier is trained."""

    def __init__(self, config: EngineConfig, module: nn.Module, place: Place) -> None:
        self.module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.autocast = torch.autocast(place.device.type, torch.bfloat16, enabled=config.autocasts(place.device))

    def forward(self, images_bCHW: Tensor, is_last: bool) -> Tensor:
        with torch.no_grad(), self.autocast:
            return self.module(images_bCHW).float()

    def backward(self, features_bD: Tensor, grad_bD: Tensor, is_last: bool) -> None:
        pass

    def step(self, lr: float) -> None:
        pass

    def skip(self) -> None:
        pass

    def gradient_norm(self) -> float:
        return 0.0

    def state(self) -> dict[str, Part]:
        average_buffers(self.module)
        return {f"backbone.{name}": whole(tensor) for name, tensor in self.module.state_dict().items()}

    def load(self, saved: Saved) -> None:
        state = {name: saved.whole(name) for name in saved if name.startswith(("backbone.", "optimizer."))}
        self.module.load_state_dict(weights_in(state))
