"""The backbone in DeepSpeed ZeRO 1 or 2: optimizer state, and with 2 gradients, sharded over ranks."""

from __future__ import annotations

import logging
import os
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dali_loaders.extras import extra
from pipeline.checkpoint import Part, Saved, whole
from pipeline.distributed import Place
from pipeline.engine.config import EngineConfig
from pipeline.engine.module_state import average_buffers, weights_in
from pipeline.engine.optimizer import build_optimizer, set_rate
from pipeline.schedule import OptimizerConfig

BUCKET = 1 << 23  # numbers: 32 MB in float32, as DDP's 25 MB; DeepSpeed's default of 5e8 would wait for the whole network, in 2 GB


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
        set_rate(self.engine.optimizer, lr)
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
        optimizer = self.engine.optimizer
        states = optimizer.optimizer.state.values()
        keys = sorted({key for state in states for key, value in state.items() if isinstance(value, Tensor) and value.ndim > 0})
        if keys:
            # DeepSpeed 0.19 tells a parameter where its state lies once, after the step of the first group, when others have none yet.
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()
        return keys

    def state(self) -> dict[str, Part]:
        from deepspeed.utils import safe_get_full_optimizer_state

        average_buffers(self.module)
        state = {f"backbone.{name}": tensor for name, tensor in self.module.state_dict().items()}
        keys = self._optimizer_keys()
        steps = [state["step"] for state in self.engine.optimizer.optimizer.state.values() if "step" in state]
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                for key in keys:
                    state[f"optimizer.{name}.{key}"] = safe_get_full_optimizer_state(parameter, key)
                if steps:
                    state[f"optimizer.{name}.step"] = steps[0]
        return {name: whole(tensor) for name, tensor in state.items()}

    def load(self, saved: Saved) -> None:
        state = {name: saved.whole(name) for name in saved if name.startswith(("backbone.", "optimizer."))}
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        has_optimizer = any(name.startswith("optimizer.") for name in state)
        if has_optimizer and not self._optimizer_keys():
            self._make_optimizer_state()
        self.module.load_state_dict(weights_in(state))
        keys = self._optimizer_keys()
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            safe_set_full_fp32_param(parameter, state[f"backbone.{name}"].to(parameter))
            if has_optimizer:
                for key in keys:
                    if (value := state.get(f"optimizer.{name}.{key}")) is not None:  # else it did not move before: a ViT's mask token
                        safe_set_full_optimizer_state(parameter, value.to(parameter), key)
        steps = [value for name, value in state.items() if name.startswith("optimizer.") and name.endswith(".step")]
        if steps:
            for values in self.engine.optimizer.optimizer.state.values():
                values["step"] = steps[0].to(values["step"], copy=True)

    def _make_optimizer_state(self) -> None:
        """Takes one step without gradient at rate 0, after which every entry exists that `load` overwrites."""
        for _ in range(self.engine.gradient_accumulation_steps()):
            zero = sum((parameter.sum() for parameter in self.module.parameters() if parameter.requires_grad), torch.zeros(())) * 0
            self.engine.backward(zero, scale_wrt_gas=False)
            self.step(0.0)
