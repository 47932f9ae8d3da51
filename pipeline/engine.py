"""The data-parallel backbone behind one small interface: DeepSpeed ZeRO 1-2, or DDP. The class shard never enters it, because
everything inside an engine is broadcast from rank 0 and averaged over ranks."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from dali_loaders.extras import extra
from pipeline.distributed import Place
from pipeline.schedule import OptimizerConfig, build_optimizer

BUCKET = 1 << 23  # numbers: 32 MB in float32, as DDP's 25 MB; DeepSpeed's default of 5e8 would wait for the whole network, in 2 GB


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

    def state(self) -> dict[str, Tensor]:
        """Weights, buffers and optimizer state in full, under names that depend neither on the engine nor on the number of ranks:
        backbone.NAME and optimizer.NAME.KEY. Every rank must call it."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` gave, on this or another number of ranks or engine. The optimizer's part may be absent."""
        ...


def build_engine(config: EngineConfig, optimizer: OptimizerConfig, module: nn.Module, place: Place, accumulation: int) -> Engine:
    torch.backends.cudnn.allow_tf32 = config.precision != "float32"
    torch.backends.cudnn.benchmark = True  # all batches of a run have one shape
    module = module.to(place.device)
    if config.compile:
        module.compile()  # in place: names of weights stay
    kind = DeepSpeedEngine if config.name == "deepspeed" else DDPEngine
    return kind(config, optimizer, module, place, accumulation)


def average_buffers(module: nn.Module) -> None:
    """Averages floating buffers over ranks. Batch statistics are taken per rank while training; their running averages are linear in
    them, so averaging now or at every step gives the same numbers. 1 all-reduce."""
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    if dist.get_world_size() > 1 and buffers:
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for buffer, average in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(average.view_as(buffer))


class DDPEngine:
    def __init__(self, config: EngineConfig, optimizer: OptimizerConfig, module: nn.Module, place: Place, accumulation: int) -> None:
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
        self.clip = optimizer.clip or float("inf")
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
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def skip(self) -> None:
        self.norm = torch.tensor(torch.inf)
        self.optimizer.zero_grad()

    def gradient_norm(self) -> float:
        return float(self.norm)

    def state(self) -> dict[str, Tensor]:
        average_buffers(self.module)
        state = {f"backbone.{name}": tensor for name, tensor in self.module.state_dict().items()}
        for name, parameter in self.module.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{name}.{key}"] = value
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        self.module.load_state_dict({name[len("backbone.") :]: tensor for name, tensor in state.items() if name.startswith("backbone.")})
        for name, parameter in self.module.named_parameters():
            prefix = f"optimizer.{name}."
            values = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
            if values:
                self.optimizer.state[parameter] = {key: _like(parameter, value) for key, value in values.items()}


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A copy of an optimizer's state on the parameter's device, where fused optimizers have even the step, and with the parameter's
    strides, which they take for granted."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value.to(parameter, copy=True)


class DeepSpeedEngine:
    def __init__(self, config: EngineConfig, optimizer: OptimizerConfig, module: nn.Module, place: Place, accumulation: int) -> None:
        on_cpu = place.device.type == "cpu"
        os.environ["DS_ACCELERATOR"] = place.device.type  # it would look for a GPU itself
        with extra("train"):
            import deepspeed

        if on_cpu:  # otherwise the first collective compiles an extension for half a minute and needs g++
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of every optimizer but its own
        warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)  # its own calls
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        self.module = module
        os.environ["LOCAL_RANK"] = str(place.device.index or 0)  # it insists on one, and takes it for the device
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(optimizer, module),
            config={
                "train_micro_batch_size_per_gpu": 1,  # without effect: the loader decides
                "gradient_accumulation_steps": accumulation,
                "gradient_clipping": optimizer.clip,  # its own default is 1.0
                "zero_allow_untested_optimizer": True,
                "communication_data_type": "bf16" if config.compress else "fp32",  # without autocast
                "zero_optimization": {
                    "stage": config.zero_stage,
                    "reduce_bucket_size": BUCKET,
                    "overlap_comm": not on_cpu,  # gradients travel during backward; a CPU has no streams for it
                },
                "torch_autocast": {
                    "enabled": config.autocasts(place.device),
                    "dtype": "bfloat16",
                    # Kinds of layers whose gradients travel in bfloat16; if it is not told, DeepSpeed takes linear ones and convolutions.
                    **({} if config.compress else {"lower_precision_safe_modules": []}),
                },
                "timers": {"throughput": {"enabled": False}},  # it waits for the device at every forward pass
                "steps_per_print": 10**9,
            },
        )

    def forward(self, images_bCHW: Tensor, is_last: bool) -> Tensor:
        return self.engine(images_bCHW).float()

    def backward(self, features_bD: Tensor, grad_bD: Tensor, is_last: bool) -> None:
        # A scalar whose gradient is grad_bD, so that the classifier's part of the graph stays out of the engine. The caller divides.
        self.engine.backward((features_bD * grad_bD).sum(), scale_wrt_gas=False)
        if not is_last:
            self.engine.step()  # only counts

    def step(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()

    def skip(self) -> None:
        # DeepSpeed leaves out, on all ranks, a step whose gradient is not finite, and would take one whose gradient is: so make it NaN.
        for gradients in self.engine.optimizer.averaged_gradients.values():
            for gradient in gradients or []:
                gradient.fill_(torch.nan)
        self.engine.step()

    def gradient_norm(self) -> float:
        return float(self.engine.get_global_grad_norm() or 0.0)

    def _optimizer_keys(self) -> list[str]:
        """Names of the per-parameter state of the optimizer: momentum_buffer, or exp_avg and exp_avg_sq; none before the first step."""
        states = self.engine.optimizer.optimizer.state.values()
        return sorted({key for state in states for key, value in state.items() if isinstance(value, Tensor) and value.ndim > 0})

    def state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        average_buffers(self.module)
        state = {f"backbone.{name}": tensor for name, tensor in self.module.state_dict().items()}
        steps = [state["step"] for state in self.engine.optimizer.optimizer.state.values() if "step" in state]
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                for key in self._optimizer_keys():
                    state[f"optimizer.{name}.{key}"] = safe_get_full_optimizer_state(parameter, key)
                if steps:
                    state[f"optimizer.{name}.step"] = steps[0]
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        has_optimizer = any(name.startswith("optimizer.") for name in state)
        if has_optimizer and not self._optimizer_keys():
            self._make_optimizer_state()
        self.module.load_state_dict({name[len("backbone.") :]: tensor for name, tensor in state.items() if name.startswith("backbone.")})
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            safe_set_full_fp32_param(parameter, state[f"backbone.{name}"].to(parameter))
            if has_optimizer:
                for key in self._optimizer_keys():
                    safe_set_full_optimizer_state(parameter, state[f"optimizer.{name}.{key}"].to(parameter), key)
        steps = [value for name, value in state.items() if name.startswith("optimizer.") and name.endswith(".step")]
        if steps:
            for values in self.engine.optimizer.optimizer.state.values():
                values["step"] = steps[0].to(values["step"], copy=True)

    def _make_optimizer_state(self) -> None:
        """Takes one step without gradient at rate 0, after which every entry exists that `load` overwrites."""
        for _ in range(self.engine.gradient_accumulation_steps()):
            zero = sum((parameter.sum() for parameter in self.module.parameters() if parameter.requires_grad), torch.zeros(())) * 0
            self.engine.backward(zero, scale_wrt_gas=False)
            for group in self.engine.optimizer.param_groups:
                group["lr"] = 0.0
            self.engine.step()
