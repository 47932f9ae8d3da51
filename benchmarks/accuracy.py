"""How far bfloat16 gradients are from float64 ones, from the first steps (loss 20) to convergence (2e-8): PartialFC in bfloat16 and in
float32, and beside them the dense computation under torch.autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from partial_fc import PartialFC, losses

SCALE, MARGIN = 64.0, 0.4
LOSSES = (20.0, 3.0, 6e-3, 2e-8)
HARDEST = 0.25  # cosine with the hard negative: e^(64 x 0.25) outweighs 10,000 random classes, and a target of 0.93 leaves room for it


def rows(classes: int, batch: int, width: int) -> Iterator[dict[str, Any]]:
    """Relative errors |g - g64| / |g64| of the gradients of all features, and of all prototypes; one row per kind of negatives and loss."""
    if classes < 2 or batch < 1 or width < 4:
        raise ValueError(f"--classes, --batch and --width are {classes}, {batch} and {width}, but must be at least 2, 1 and 4")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for negatives in ("easy", "hard"):
        for wanted in LOSSES:
            features_BD, prototypes_CD, labels_B = (x.to(device) for x in batch_of(wanted, negatives, classes, batch, width))
            loss, *exact = _autograd(_dense, features_BD.double(), prototypes_CD.double(), labels_B)
            row: dict[str, Any] = {"classes": classes, "batch": batch, "width": width, "negatives": negatives, "loss": float(f"{loss:.3g}")}
            for name, computation in COMPUTATIONS.items():
                _, *gradients = computation(features_BD, prototypes_CD, labels_B)
                for what, gradient, truth in zip(("features", "prototypes"), gradients, exact, strict=True):
                    row[f"{name}_{what}"] = float(f"{float((gradient.double() - truth).norm() / truth.norm()):.3g}")
            yield row


def batch_of(
    loss: float, negatives: Literal["easy", "hard"], classes: int, batch: int, width: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(features, prototypes, labels) whose mean CosFace loss is `loss`: each feature mixes its own prototype, noise, and with "hard"
    negatives one wrong prototype; the share of its own is found by bisection. Neither features nor prototypes are normalised."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    units_CD = functional.normalize(normal(classes, width))
    labels_B = torch.randint(0, classes, (batch,), generator=generator)
    wrong_B = (labels_B + torch.randint(1, classes, (batch,), generator=generator)) % classes
    own_BD, wrong_BD = units_CD[labels_B], units_CD[wrong_B]
    between_B1 = (own_BD * wrong_BD).sum(dim=1, keepdim=True)
    wrong_BD = _apart(wrong_BD, own_BD)
    parts_3BD = torch.stack([own_BD, wrong_BD, _apart(normal(batch, width), own_BD, wrong_BD)])
    cosines_3BC = parts_3BD @ units_CD.T

    def shares(own: float) -> Tensor:
        """The shares of the parts that give a result of norm 1 with the cosines `own` and, if there is one, HARDEST."""
        wrong_B1 = (HARDEST - own * between_B1) / (1 - between_B1**2).sqrt() if negatives == "hard" else torch.zeros_like(between_B1)
        return torch.stack([torch.full_like(wrong_B1, own), wrong_B1, (1 - own**2 - wrong_B1**2).clamp(min=0).sqrt()])

    low, high = -0.9, (1 - HARDEST**2) ** 0.5
    for _ in range(40):
        middle = (low + high) / 2
        if _cosface((shares(middle) * cosines_3BC).sum(dim=0), labels_B) > loss:
            low = middle
        else:
            high = middle
    lengths_B1, lengths_C1 = (torch.rand(rows, 1, generator=generator) + 0.5 for rows in (batch, classes))
    features_BD = (shares(high) * parts_3BD).sum(dim=0).float() * lengths_B1
    return features_BD, units_CD.float() * lengths_C1, labels_B


def _apart(x_BD: Tensor, *units: Tensor) -> Tensor:
    """The directions of x without their components along the orthonormal `units`."""
    for unit_BD in units:
        x_BD = x_BD - (x_BD * unit_BD).sum(dim=1, keepdim=True) * unit_BD
    return functional.normalize(x_BD)


def _autograd(computation: Callable[..., Tensor], features_BD: Tensor, prototypes_CD: Tensor, labels_B: Tensor) -> tuple[Tensor, ...]:
    """(loss, gradient of features, gradient of prototypes)"""
    features_BD, prototypes_CD = features_BD.clone().requires_grad_(), prototypes_CD.clone().requires_grad_()
    loss = computation(features_BD, prototypes_CD, labels_B)
    return loss.detach(), *torch.autograd.grad(loss, [features_BD, prototypes_CD])


def _partial_fc(dtype: Literal["bfloat16", "float32"], features_BD: Tensor, prototypes_CD: Tensor, labels_B: Tensor) -> tuple[Tensor, ...]:
    loss = losses.build("cosface", scale=SCALE, margin=MARGIN)
    classes, width = prototypes_CD.shape
    classifier = PartialFC(classes, width, loss, dtype=dtype, device=features_BD.device)
    with torch.no_grad():
        classifier.prototypes.copy_(prototypes_CD)
    features_BD = features_BD.clone().requires_grad_()
    value = classifier(features_BD, labels_B)
    value.backward()
    assert features_BD.grad is not None and classifier.prototypes.grad is not None
    return value.detach(), features_BD.grad, classifier.prototypes.grad


def _cosface(cosines_BC: Tensor, labels_B: Tensor) -> Tensor:
    margins_B1 = cosines_BC.new_full((len(labels_B), 1), -MARGIN)
    return functional.cross_entropy(SCALE * cosines_BC.scatter_add(1, labels_B[:, None], margins_B1), labels_B)


def _dense(features_BD: Tensor, prototypes_CD: Tensor, labels_B: Tensor) -> Tensor:
    return _cosface(functional.normalize(features_BD) @ functional.normalize(prototypes_CD).T, labels_B)


def _autocast(features_BD: Tensor, prototypes_CD: Tensor, labels_B: Tensor) -> Tensor:
    """Product and logits in bfloat16, softmax in float32."""
    with torch.autocast(features_BD.device.type, torch.bfloat16):
        return _dense(features_BD, prototypes_CD, labels_B)


def as_text(row: dict[str, Any]) -> str:
    errors = [f"{name.replace('_', ' ')} {row[f'{name}_features']:.2g} and {row[f'{name}_prototypes']:.2g}" for name in COMPUTATIONS]
    return f"{row['negatives']} negatives, loss {row['loss']:g}: relative error of feature and prototype gradients {', '.join(errors)}"


COMPUTATIONS = {
    "bfloat16": partial(_partial_fc, "bfloat16"),
    "float32": partial(_partial_fc, "float32"),
    "dense_bfloat16": partial(_autograd, _autocast),
}
