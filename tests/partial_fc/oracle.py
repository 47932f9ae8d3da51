"""Dense float64 losses in one process, written from the papers' formulas with cross-entropy: independent of partial_fc."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def margin_loss(name: str, features: Tensor, prototypes: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    cosines = functional.normalize(features) @ functional.normalize(prototypes).T
    target = cosines.gather(1, labels[:, None])
    if name == "cosface":
        phi = target - margin
    else:
        theta = torch.arccos(target.clamp(-1 + 1e-15, 1 - 1e-15))
        phi = torch.where(theta < math.pi - margin, torch.cos(theta + margin), target - margin * math.sin(margin))
    return functional.cross_entropy(scale * cosines.scatter(1, labels[:, None], phi), labels)


def loss_and_gradients(name: str, features: Tensor, prototypes: Tensor, labels: Tensor, scale: float, margin: float) -> tuple[Tensor, ...]:
    features, prototypes = features.double().requires_grad_(), prototypes.double().requires_grad_()
    loss = margin_loss(name, features, prototypes, labels, scale, margin)
    return (loss.detach(), *torch.autograd.grad(loss, [features, prototypes]))


def relative_error(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact| over the whole tensor."""
    return float((value.double() - exact).norm() / exact.norm().clamp(min=1e-300))
