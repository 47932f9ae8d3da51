"""The backbone in DeepSpeed ZeRO 1 to 3: optimizer state, with 2 gradients and with 3 weights too, sharded over ranks."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dali_loaders.extras import extra
from pipeline.checkpoint import Part, Saved, whole
from pipeline.distributed import Place
from pipeline.engine.config import EngineConfig
from pipeline.engine.module_state import OF_RANKS, averaged_buffers, fill, load_module, module_parts
from pipeline.engine.optimizer import build_optimizer, make_state, set_rate
from pipeline.schedule import OptimizerConfig

BUCKET = 1 << 23  # numbers: 32 MB in float32, as DDP's 25 MB; DeepSpeed's default of 5e8 would wait for the whole network, in 2 GB
LIVE = 1 << 25  # numbers of weights that ZeRO 3 puts together ahead or keeps for later: 128 MB; by default whole networks of 4 GB


@dataclass(frozen=True)
class _Fragment:
    """Elements [start, start + size) of a parameter, which this rank's optimizer moves: those from `offset` on of a flat tensor."""

    name: str
    shape: tuple[int, ...]
    start: int
    size: int
    flat: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.detach().narrow(0, self.offset, self.size)


class DeepSpeedEngine:
    def __init__(self, config: EngineConfig, optimizer: OptimizerConfig, module: nn.Module, place: Place, accumulation: int) -> None:
        on_cpu = place.device.type == "cpu"
        os.environ["DS_ACCELERATOR"] = place.device.type  # it would look for a GPU itself
        with extra("train"):
            import deepspeed

        if on_cpu:  # otherwise the first collective compiles an extension for half a minute and needs g++
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # It imports Muon only to ask whether an optimizer is that, and Muon, which is not among ours, torch's compiler: 3 s of each start.
        deepspeed.runtime.compiler.compile = lambda: deepspeed.runtime.compiler.dummy_decorator
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of every optimizer but its own
        warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)  # its own calls
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        self.module, self.place, self.shards_weights = module, place, config.shards_weights
        if self.shards_weights:
            self.shapes = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(remove_duplicate=False)}
            self.twin = copy.deepcopy(module).to("meta")  # for evaluation: DeepSpeed's hooks free weights after each use
        os.environ["LOCAL_RANK"] = str(place.device.index or 0)  # it insists on one, and takes it for the device
        dtype = config.autocasts(place.device)
        deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED = False  # it would remember that of an earlier engine
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
                    "stage3_prefetch_bucket_size": BUCKET,
                    "stage3_max_live_parameters": LIVE,
                    "stage3_max_reuse_distance": LIVE,
                },
                "torch_autocast": {
                    "enabled": dtype is not None,
                    "dtype": str(dtype or torch.bfloat16).removeprefix("torch."),
                    # Kinds of layers whose gradients travel in bfloat16; if it is not told, DeepSpeed takes linear ones and convolutions.
                    **({} if config.compress else {"lower_precision_safe_modules": []}),
                },
                "timers": {"throughput": {"enabled": False}},  # it waits for the device at every forward pass
                "steps_per_print": 10**9,
            },
        )
        self.zero: Any = self.engine.optimizer
        self.zero.torch_autocast_gradscaler = None  # of float16: a second one, with a decision of its own on each rank
        self.fragments = list(self._fragments_of_weights() if self.shards_weights else self._fragments_of_state())
        for flat in self._flats():
            self._inner.state[flat] = make_state(optimizer, flat)

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return self.zero.optimizer

    def _flats(self) -> list[Tensor]:
        """This rank's parts of the weights as its optimizer sees them, one for each group of parameters."""
        return self.zero.fp32_partitioned_groups_flat if self.shards_weights else self.zero.single_partition_of_fp32_groups

    def _fragments_of_state(self) -> Iterator[_Fragment]:
        """ZeRO 1 and 2 divide all weights of a group, one behind the other."""
        for name, parameter in self.module.named_parameters():
            mapping = getattr(parameter, "_hp_mapping", None)  # None where nothing of it is here
            if mapping is not None:
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                flat = self._flats()[mapping.param_group_index]
                yield _Fragment(name, tuple(parameter.shape), here.start, here.numel, flat, there.start)

    def _fragments_of_weights(self) -> Iterator[_Fragment]:
        """ZeRO 3 divides each of them, rounded up, so that the last ranks may have less of it, or nothing."""
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
                start, count = self._range(parameter)
                if count:
                    yield _Fragment(name, self.shapes[name], start, count, self._flats()[group], offset)

    def _range(self, parameter: Any) -> tuple[int, int]:
        """(first, count) of this rank's elements of a parameter that ZeRO 3 divides."""
        size = parameter.partition_numel()
        start = min(self.place.rank * size, parameter.ds_numel)
        return start, min(size, parameter.ds_numel - start)

    def forward(self, images_bCHW: Tensor, is_last: bool) -> Tensor:
        return self.engine(images_bCHW).float()

    def backward(self, features_bD: Tensor, grad_bD: Tensor, is_last: bool) -> None:
        # A scalar whose gradient is grad_bD, so that the classifier's part of the graph stays out of the engine. The caller divides.
        self.engine.backward((features_bD * grad_bD).sum(), scale_wrt_gas=False)
        if not is_last:
            self.engine.step()  # only counts

    def gradients(self) -> list[Tensor]:
        groups = self.zero.averaged_gradients.values()
        return [gradient for gradients in groups for gradient in gradients or [] if gradient is not None]

    def clip(self) -> list[Tensor]:
        return self.gradients()  # it clips within its own step

    def step(self, lr: float, left_out: Tensor) -> None:
        if left_out.item():
            self.skip()
            return
        set_rate(self.engine.optimizer, lr)
        self.engine.step()

    def skip(self) -> None:
        # DeepSpeed leaves out, on all ranks, a step whose gradient is not finite, and would take one whose gradient is: so make it NaN.
        for gradient in self.gradients():
            gradient.fill_(torch.nan)
        self.engine.step()
        if self.shards_weights:  # the next gradients overwrite it only where this rank has something
            self.zero.grad_partitions_flat_buffer.zero_()

    def gradient_norm(self) -> float:
        return float(self.engine.get_global_grad_norm() or 0.0)

    @contextmanager
    def for_evaluation(self) -> Iterator[nn.Module]:
        if not self.shards_weights:
            with averaged_buffers(self.module):
                yield self.module
            return
        from deepspeed.runtime.zero import GatheredParameters

        twin = self.twin.to_empty(device=self.place.device)
        with averaged_buffers(self.module), torch.no_grad():
            for (_, ours), theirs in zip(self.module.named_buffers(), twin.buffers(), strict=True):
                theirs.copy_(ours)
        with torch.no_grad():
            for ours, theirs in zip(self.module.parameters(), twin.parameters(), strict=True):
                with GatheredParameters([ours]):  # one at a time: the whole is in memory once
                    theirs.copy_(ours)
        try:
            yield twin
        finally:
            twin.to("meta")

    def state(self) -> dict[str, Part]:
        if self.shards_weights:
            parts = module_parts(self.module, "backbone.", OF_RANKS, self._buffers())
            for name, parameter in self.module.named_parameters(remove_duplicate=False):
                start, count = self._range(parameter)
                if count:
                    parts[f"backbone.{name}"] = Part(_local(parameter).detach()[:count], self.shapes[name], start)
        else:
            parts = module_parts(self.module, "backbone.", OF_RANKS)
        for fragment in self.fragments:
            for key, value in self._inner.state[fragment.flat].items():
                if value.ndim:
                    parts[f"optimizer.{fragment.name}.{key}"] = Part(fragment.of(value), fragment.shape, fragment.start)
        for step in self._steps()[:1]:  # they are equal
            moving = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
            parts |= {f"optimizer.{name}.step": whole(step) for name in moving}
        return parts

    def _buffers(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.module.state_dict().items() if name not in self.shapes}

    def _steps(self) -> list[Tensor]:
        return [values["step"] for flat in self._flats() if "step" in (values := self._inner.state[flat])]

    @torch.no_grad()
    def load(self, saved: Saved) -> None:
        if self.shards_weights:
            self._load_weights(saved)
        else:
            load_module(self.module, saved, "backbone.", OF_RANKS)
        for fragment in self.fragments:
            fill(saved, f"backbone.{fragment.name}", fragment.of(fragment.flat), fragment.start, fragment.shape)
            for key, value in self._inner.state[fragment.flat].items():
                if value.ndim and f"optimizer.{fragment.name}.{key}" in saved:  # else it did not move before: a ViT's mask token
                    fill(saved, f"optimizer.{fragment.name}.{key}", fragment.of(value), fragment.start, fragment.shape)
        steps = [name for name in saved if name.startswith("optimizer.") and name.endswith(".step")]
        for step in self._steps() if steps else []:
            fill(saved, steps[0], step)

    def _load_weights(self, saved: Saved) -> None:
        self.zero._partition_all_parameters()  # frees the small ones, which stay whole between steps
        load_module(self.module, saved, "backbone.", OF_RANKS, self._buffers())
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            start, count = self._range(parameter)
            fill(saved, f"backbone.{name}", _local(parameter)[:count], start, self.shapes[name])
        if persistent := self.zero.persistent_parameters:
            persistent[0].all_gather(persistent)


def _local(parameter: Any) -> Tensor:
    """This rank's elements of a parameter that ZeRO 3 divides, and padding."""
    return parameter.ds_tensor
