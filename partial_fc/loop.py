"""What a training loop needs around a PartialFC whose prototypes are on many ranks: kept out of DDP, one norm and one decision for all."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from partial_fc import collectives
from partial_fc.classifier import PartialFC
from partial_fc.collectives import Group


def keep_out_of_ddp(module: nn.Module) -> None:
    """Makes DistributedDataParallel leave alone every PartialFC inside `module`, which you or a framework will wrap in it. DDP reads the
    names that it leaves out from the module that it wraps, and from no other. Call it on every rank, once the classifier is made."""
    names = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    for prefix, part in module.named_modules():
        if isinstance(part, PartialFC):
            own = [f"{prefix}.{name}" for name, _ in [*part.named_parameters(), *part.named_buffers()]]
            names |= {*own, *(f"_orig_mod.{name}" for name in own)}  # within torch.compile(module)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


@torch.no_grad()
def clip_grad_norm_(backbone: nn.Module | Iterable[Tensor], classifier: PartialFC | Sequence[PartialFC], max_norm: float) -> Tensor:
    """Scales all gradients down by one factor if their joint 2-norm is larger than max_norm, and returns the norm before, equal on every
    rank. Each rank of torch's function of this name would see another part of the classifier and take another factor, so that the replicas
    of the backbone drift apart.

    backbone    whose gradients are equal on every rank, as DDP leaves them, or in parts of torch's FSDP2; a module or its parameters
    classifier  or all of several

    Call it between backward and the optimizers' steps, and with a GradScaler after `unscale_` of all optimizers. 1 all-reduce of a number
    for each classifier."""
    classifiers = [classifier] if isinstance(classifier, PartialFC) else list(classifier)
    parameters = list(backbone.parameters() if isinstance(backbone, nn.Module) else backbone)
    if isinstance(backbone, nn.Module) and any(isinstance(part, PartialFC) and part not in classifiers for part in backbone.modules()):
        raise ValueError(
            "the module holds a PartialFC that is not among the classifiers: give all, as clip_grad_norm_(module, [a, b], 1.0)"
        )
    own = {parameter for each in classifiers for parameter in each.parameters()}
    everywhere = [parameter.grad for parameter in parameters if parameter.grad is not None and parameter not in own]
    scaled, square = [], _square([], classifiers[0].prototypes)
    for each in classifiers:
        if each.consumer is not None:
            raise ValueError("in_backward=True has moved prototypes before the norm of their gradient is known: use in_backward=False")
        by_class = each.loss.learned_by_class(each.shard.num_classes)
        here = [each.gradient_values()]
        for name, parameter in each.learned.items():
            if parameter.grad is not None:
                (here if name in by_class else everywhere).append(parameter.grad)
        square = square + collectives.sum_packed([_square(here, each.prototypes)], each.group)[0].to(square)
        scaled += here
    norm = (square + _square(everywhere, classifiers[0].prototypes)).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    for gradient in [*scaled, *everywhere]:
        part = _call_of_dtensor(gradient, "to_local")
        part.mul_(factor.to(part.device))
    return norm


@torch.no_grad()
def found_non_finite(gradients: Iterable[Tensor], classifier: PartialFC) -> Tensor:
    """1.0 on every rank if one of these gradients, or one of the classifier's, is NaN or infinite on any rank, else 0.0: a float32 number
    on the device, as fused optimizers of torch take it (`found_inf`). A norm may stand for the gradients it is of. 1 all-reduce of a
    number."""
    device = classifier.prototypes.device
    own = [parameter.grad for parameter in classifier.learned.values() if parameter.grad is not None]
    sizes = [_square([gradient], classifier.prototypes) for gradient in [*gradients, classifier.gradient_values(), *own]]
    found = torch.stack(sizes).isfinite().all().logical_not().to(device, torch.float32)
    if collectives.world_size(classifier.group) > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX, group=classifier.group)
    return found


def _square(gradients: list[Tensor], like: Tensor) -> Tensor:
    """The square of their joint norm, in float32 or wider, on the device of `like`."""
    wide = torch.promote_types(like.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, wide)) for gradient in gradients]
    norms = [_call_of_dtensor(norm, "full_tensor") for norm in norms]
    return torch.stack([norm.to(like.device, wide) for norm in norms]).square().sum() if norms else like.new_zeros((), dtype=wide)


def _call_of_dtensor(tensor: Tensor, method: str) -> Tensor:
    """What a method of torch's DTensor gives, or the tensor itself if it is none. Importing DTensor would double the time of our import."""
    return getattr(tensor, method)() if hasattr(tensor, method) else tensor


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler with one decision and one scale for all ranks: an overflow in one rank's shard makes every rank leave the step
    out. Optimizers whose gradients were unscaled before the first of them makes its step are left out together. Arguments are torch's, and

    group  of the classifier

    1 all-reduce of a number for each optimizer."""

    def __init__(self, *arguments: Any, group: Group = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.group = group

    def _unscale_grads_(self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Any:
        """Both `unscale_` and the optimizers that skip a step by themselves get their finding here."""
        found = sum(super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16).values(), torch.zeros_like(found_inf))
        if collectives.world_size(self.group) > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return {found.device: found}

    def unscale_gradients_(self, gradients: Iterable[Tensor]) -> None:
        """`unscale_` of gradients that an engine keeps for itself, such as DeepSpeed's, of which each rank may have another part."""
        self.unscale_(_Holder(gradients))  # type: ignore[arg-type]

    def step(self, optimizer: torch.optim.Optimizer, *arguments: Any, **options: Any) -> float | None:
        if not self.is_enabled():
            return super().step(optimizer, *arguments, **options)
        findings = [found for state in self._per_optimizer_states.values() for found in state["found_inf_per_device"].values()]
        if len(findings) > 1:
            together = torch.stack(findings).amax(dim=0)
            for found in findings:
                found.copy_(together)
        optimizer.is_judged_on_all_ranks = True  # type: ignore[attr-defined]
        return super().step(optimizer, *arguments, **options)


class _Holder:
    """What a GradScaler looks at in an optimizer."""

    def __init__(self, gradients: Iterable[Tensor]) -> None:
        parameters = []
        for gradient in gradients:
            parameters.append(gradient.detach())
            parameters[-1].grad = gradient
        self.param_groups = [{"params": parameters}]
