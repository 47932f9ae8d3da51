"""Several steps of training against a dense float64 one, for what remembers earlier steps: losses, gradients of features, prototypes, what
is learned and the bank, on 1 to 4 ranks with uneven batches, at sample rate 1 and below, with a step that is skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc import PartialFC, RowSGD, losses, sampling
from partial_fc.shards import ClassShard, initial_prototypes
from tests.partial_fc.losses.parity import CLASSES, ROWS, WIDTH, error, normalize

STEPS, SKIPPED = 6, (0, 3)  # the features of these hold a NaN
LR, MOMENTUM, DECAY = 0.3, 0.9, 1e-3


@dataclass
class Memory:
    """What an oracle gets beside a batch."""

    step: int
    prototypes: Tensor  # [C, D], with gradient
    included: Tensor  # bool [C]
    learned: dict[str, Tensor]
    bank: dict[int, tuple[Tensor, int]]  # by class: unit feature, step that brought it
    own: dict[str, Any] = field(default_factory=dict)  # the oracle's

    def fresh(self, staleness: float) -> dict[int, Tensor]:
        return {label: feature for label, (feature, step) in self.bank.items() if self.step - step <= staleness}


Oracle = Callable[[Tensor, Tensor, Memory], Tensor]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    labels = torch.randint(0, CLASSES, (13,), generator=generator)
    labels[[3, 9]] = int(labels[0])  # three samples of one class, on several ranks
    features = torch.randn(13, WIDTH, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 3, 13, dtype=torch.float64)[:, None]
    if step in SKIPPED:
        features[7, 2] = torch.nan
    return features, labels


def train(name: str, parameters: dict[str, Any], dtype: torch.dtype, rate: float, options: dict[str, Any]) -> list[dict[str, Tensor]]:
    """Runs on every rank: what each step gave, and what there is after it."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    options = {"uneven_batches": True, "feature_gradient": "global", "non_finite": "skip"} | options
    in_backward = options.pop("in_backward", False)
    classifier = PartialFC(CLASSES, WIDTH, losses.build(name, **parameters), rate, seed=3, **options).to(dtype)
    optimizer = RowSGD(classifier, LR, MOMENTUM, DECAY, in_backward=in_backward)
    found = []
    for step in range(STEPS):
        features, labels = (x.split(ROWS[size])[rank] for x in batch(step))
        features = features.to(dtype).clone().requires_grad_()
        loss = classifier(features, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step < 2:
            with torch.no_grad():
                classifier(features, labels)  # a validation loss leaves no trace
        result = {"prototypes": classifier.prototypes.detach().clone()} | {
            f"learned {k}": v.detach().clone() for k, v in learned(classifier)
        }
        if step not in SKIPPED:
            result |= {"loss": loss.detach(), "features": features.grad}
        if classifier.bank is not None:
            result |= {"bank": classifier.bank_features.clone(), "bank steps": classifier.bank_steps.clone()}
        found.append(result)
    return found


def trainings(calls: list[tuple[Any, ...]]) -> list[list[dict[str, Tensor]]]:
    return [train(*call) for call in calls]


def learned(classifier: PartialFC) -> list[tuple[str, Tensor]]:
    return list(classifier.learned.items())


def dense(name: str, parameters: dict[str, Any], oracle: Oracle, dtype: torch.dtype, rate: float) -> list[dict[str, Tensor]]:
    whole = ClassShard.of_rank(CLASSES, 0, 1)
    first = losses.build(name, **parameters).learned(CLASSES)
    names = ["prototypes", *first]
    values = [initial_prototypes(whole, WIDTH, seed=3).to(dtype), *(torch.tensor(float(value)).to(dtype) for value in first.values())]
    buffers = [torch.zeros_like(value) for value in values]
    bank: dict[int, tuple[Tensor, int]] = {}
    own: dict[str, Any] = {}
    found = []
    for step in range(STEPS):
        features, labels = batch(step)
        included = torch.ones(CLASSES, dtype=torch.bool)
        if rate < 1:
            sample = sampling.draw(whole, labels, rate, seed=3, step=step)
            included = torch.zeros(CLASSES, dtype=torch.bool).index_fill_(0, sample.rows_K[sample.is_real_K], True)
        result = {}
        if step not in SKIPPED:
            inputs = [features.to(dtype).clone().requires_grad_(), *(value.clone().requires_grad_() for value in values)]
            memory = Memory(step, inputs[1], included, dict(zip(first, inputs[2:], strict=True)), bank, own)
            loss = oracle(inputs[0], labels, memory)
            of_features, *gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
            result |= {"loss": loss.detach(), "features": torch.zeros_like(inputs[0]) if of_features is None else of_features}
            with torch.no_grad():
                for start, value in own.pop("starts", {}).items():
                    values[names.index(start)] = value.clone()
                for place, gradient in enumerate(gradients):
                    if gradient is None:
                        continue
                    moves = included[:, None] if place == 0 else torch.tensor(True)
                    buffer = MOMENTUM * buffers[place] + gradient + DECAY * values[place]
                    buffers[place] = torch.where(moves, buffer, buffers[place])
                    values[place] = torch.where(moves, values[place] - LR * buffer, values[place])
            for feature, label in zip(features.to(dtype), labels.tolist(), strict=True):
                bank[label] = (feature / feature.norm(), step)
        rows = [bank.get(label, (torch.zeros(WIDTH, dtype=dtype), -1)) for label in range(CLASSES)]
        result |= {"prototypes": values[0]} | {f"learned {key}": value for key, value in zip(first, values[1:], strict=True)}
        result |= {"bank": torch.stack([row[0] for row in rows]), "bank steps": torch.tensor([row[1] for row in rows])}
        found.append(result)
    return found


def largest_error(of_ranks: list[list[dict[str, Tensor]]], right: list[dict[str, Tensor]]) -> tuple[float, str]:
    worst = (0.0, "")
    for step, expected in enumerate(right):
        for key in of_ranks[0][step]:
            parts = [found[step][key] for found in of_ranks]
            errors = [error(part, expected[key]) for part in parts] if not parts[0].ndim else [error(torch.cat(parts), expected[key])]
            worst = max(worst, (max(errors), f"{key} of step {step}"))
    return worst


def check_training(
    ranks: Any, name: str, parameters: dict[str, Any], oracle: Oracle, rates: tuple[float, ...] = (1.0, 0.4), **options: Any
) -> None:
    right = {rate: dense(name, parameters, oracle, torch.float64, rate) for rate in rates}
    calls = [(name, parameters, torch.float64, rate, options) for rate in rates]
    for size in (1, 2, 3, 4):
        found = [trainings(calls)] if size == 1 else ranks(size).run(trainings, calls)
        for place, rate in enumerate(rates):
            worst, where = largest_error([of_rank[place] for of_rank in found], right[rate])
            assert worst < 1e-9, f"{name} {parameters} {options} on {size} ranks at rate {rate}: error {worst:.1e} in {where}"
    for rate in rates:
        single, where = largest_error([train(name, parameters, torch.float32, rate, options)], right[rate])
        of_dense, _ = largest_error([dense(name, parameters, oracle, torch.float32, rate)], right[rate])
        assert single < max(1e-5, 4 * of_dense), f"{name} in float32: error {single:.1e} in {where}, of the dense one {of_dense:.1e}"


def before_prototypes(features: Tensor, labels: Tensor, prototypes: Tensor, included: Tensor) -> tuple[Tensor, Tensor]:
    """(target [B], others [B, C] with -inf at targets and at classes that take no part)."""
    cosines = normalize(features) @ normalize(prototypes).T
    is_target = torch.nn.functional.one_hot(labels, len(prototypes)).bool()
    return cosines[is_target], cosines.masked_fill(is_target | ~included, -torch.inf)
