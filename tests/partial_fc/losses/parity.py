"""Every loss against a dense float64 implementation: value and gradients by features, prototypes and learned numbers, on 1 to 4 ranks with
uneven and empty shards and batches (one rank has no row), at rate 1 and below, in float64 and float32, with torch's deterministic
algorithms and without."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from partial_fc import PartialFC, losses, sampling
from partial_fc.device_policy import CPU, GPU, DevicePolicy, forced
from partial_fc.shards import ClassShard, initial_prototypes

CLASSES, WIDTH = 23, 6
ROWS = {1: [13], 2: [8, 5], 3: [6, 0, 7], 4: [5, 4, 0, 4]}  # 13 each
WAYS = {  # by the number of ranks, in the ordinary run
    1: [(CPU, False), (CPU, True), (GPU, True)],
    2: [(CPU, True)],
    3: [(CPU, False), (GPU, True)],
    4: [(CPU, False)],
}
FEW = {1: 5, 2: 1, 3: 4, 4: 5}  # classes that leave the last of 2 to 4 ranks without any; a single class has no non-targets


class Dense(NamedTuple):
    """What an oracle gets, all in one process and one dtype. Cosines and anything else it computes itself."""

    features: Tensor  # [B, D], with gradient
    prototypes: Tensor  # [C, D], with gradient
    labels: Tensor  # [B]
    included: Tensor  # bool [C]: classes that take part in this step
    learned: dict[str, Tensor]  # with gradient; by name, [C] for what is learned by class
    counts: Tensor  # [C] images of each identity


Oracle = Callable[..., Tensor]  # (Dense, **parameters) -> scalar


def normalize(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def cosines(dense: Dense) -> tuple[Tensor, Tensor]:
    """(target [B], all cosines [B, C] with -inf at targets and at classes that take no part); exp(-inf) is 0."""
    found = normalize(dense.features) @ normalize(dense.prototypes).T
    is_target = torch.nn.functional.one_hot(dense.labels, found.shape[1]).bool()
    return found[is_target], found.masked_fill(is_target | ~dense.included, -torch.inf)


def data(kind: str = "random", seed: int = 0, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """(features [13, WIDTH], labels, counts): of all classes, three identities come three times, two twice, three once. kind "right": every
    feature is its prototype's direction, "wrong": the opposite one."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([3, 7, 3, 19, 22, 7, 0, 19, 5, 5, 3, 7, 11]) % classes
    features = torch.randn(13, WIDTH, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 3, 13, dtype=torch.float64)[:, None]
    if kind != "random":
        own = initial_prototypes(ClassShard.of_rank(CLASSES, 0, 1), WIDTH, seed=3).double()[labels]
        features = own * (1000.0 if kind == "right" else -1000.0)
    return features, labels, torch.arange(1, classes + 1) ** 2


def step(
    name: str, parameters: dict[str, Any], dtype: torch.dtype, rate: float, kind: str, options: dict[str, Any], classes: int = CLASSES
) -> dict[str, Any]:
    """On every rank: one step's loss, and gradients of this rank's features and prototypes and of what is learned."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    features, labels, counts = data(kind, classes=classes)
    mine = features.to(dtype).split(ROWS[size])[rank].clone().requires_grad_()
    loss_function = losses.build(name, **parameters)
    classifier = PartialFC(
        classes, WIDTH, loss_function, rate, seed=3, uneven_batches=True, feature_gradient="global", class_counts=counts, **options
    )
    classifier = classifier.to(dtype)
    loss = classifier(mine, labels.split(ROWS[size])[rank])
    loss.backward()
    gradient = classifier.prototypes.grad
    if gradient is None:  # sample-to-sample losses have none
        gradient = torch.zeros_like(classifier.prototypes)
    learned = {key: parameter.grad for key, parameter in classifier.learned.items()}
    tracked = {key: classifier.get_buffer(f"tracked_{key}").clone() for key in classifier.tracked_names}
    return {"loss": loss.detach(), "features": mine.grad, "prototypes": gradient.to_dense(), "learned": learned, "tracked": tracked}


def steps(calls: list[tuple[Any, ...]], policy: DevicePolicy = CPU, is_deterministic: bool = False) -> list[dict[str, Any]]:
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        with forced(policy):
            return [step(*call) for call in calls]
    finally:
        torch.use_deterministic_algorithms(False)


def exact(
    name: str, parameters: dict[str, Any], oracle: Oracle, dtype: torch.dtype, rate: float, classes: int = CLASSES, kind: str = "random"
) -> dict[str, Any]:
    features, labels, counts = data(kind, classes=classes)
    loss_function, whole = losses.build(name, **parameters), ClassShard.of_rank(classes, 0, 1)
    included = torch.ones(classes, dtype=torch.bool)
    if rate < 1:
        sample = sampling.draw(whole, labels, rate, seed=3, step=0)
        included = torch.zeros(classes, dtype=torch.bool).index_fill_(0, sample.rows_K[sample.is_real_K], True)
    learned = {key: torch.tensor(float(value)) for key, value in loss_function.learned(classes).items()}
    learned |= {key: torch.full((classes,), float(value)) for key, value in loss_function.learned_by_class(classes).items()}
    inputs = [features, initial_prototypes(whole, WIDTH, seed=3), *learned.values()]
    features, prototypes, *values = (x.to(dtype).clone().requires_grad_() for x in inputs)
    dense = Dense(features, prototypes, labels, included, dict(zip(learned, values, strict=True)), counts)
    loss = oracle(dense, **parameters)
    found = torch.autograd.grad(loss, [features, prototypes, *values], allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(found, [features, prototypes, *values], strict=True)]
    return {"loss": loss.detach(), "features": filled[0], "prototypes": filled[1], "learned": dict(zip(learned, filled[2:], strict=True))}


def error(value: Tensor, right: Tensor) -> float:
    """Relative; of a scalar below 1 absolute, as those are differences of larger numbers."""
    return float((value.double() - right.double()).norm() / right.double().norm().clamp(min=1e-6 if right.ndim else 1.0))


def largest_error(results: list[dict[str, Any]], right: dict[str, Any]) -> float:
    """Of all ranks' results, relative to the right ones."""
    errors = [error(result["loss"], right["loss"]) for result in results]
    for key in ("features", "prototypes"):
        errors.append(error(torch.cat([result[key] for result in results]), right[key]))
    for key, gradient in right["learned"].items():
        parts = [result["learned"][key] for result in results]
        if gradient.ndim:
            errors.append(error(torch.cat(parts), gradient))
        else:
            errors += [error(part, gradient) for part in parts]  # complete on every rank
    return max(errors)


def check(ranks: Any, name: str, parameters: dict[str, Any], oracle: Oracle, rates: tuple[float, ...] = (1.0, 0.4), **options: Any) -> None:
    """Value and gradients on 1 to 4 ranks, with and without a rank that has no class, with the ways of a CPU and of a GPU, with torch's
    deterministic algorithms and without (each with each in long tests): to 1e-9 in float64, and in float32 to 4 times the dense float32
    computation's own error."""
    right, dense_error = {}, {}
    for rate, classes in itertools.product(rates, {CLASSES, *FEW.values()}):
        if classes > 1:
            dense, single = (exact(name, parameters, oracle, dtype, rate, classes) for dtype in (torch.float64, torch.float32))
        else:  # most oracles know nothing to do without non-targets: one rank takes their place
            dense, single = (step(name, parameters, dtype, rate, "random", options, classes) for dtype in (torch.float64, torch.float32))
        right[rate, classes], dense_error[rate, classes] = dense, largest_error([single], dense)
    for size, (policy, is_deterministic) in itertools.product(WAYS, ((CPU, False), (CPU, True), (GPU, True))):
        if (policy, is_deterministic) not in WAYS[size] and not ranks.long:
            continue
        cases = list(itertools.product((torch.float64, torch.float32), rates, (CLASSES, FEW[size])))
        calls = [(name, parameters, dtype, rate, "random", options, classes) for dtype, rate, classes in cases]
        found = [steps(calls, policy, is_deterministic)] if size == 1 else ranks(size).run(steps, calls, policy, is_deterministic)
        for place, (dtype, *case) in enumerate(cases):
            allowed = 1e-9 if dtype == torch.float64 else max(1e-5, 4 * dense_error[tuple(case)])
            worst = largest_error([of_rank[place] for of_rank in found], right[tuple(case)])
            where = f"{size} ranks in {dtype} at rate, classes {case}{', deterministic' * is_deterministic}"
            assert worst < allowed, f"{name} {parameters} on {where}: error {worst:.1e}"


def check_finite(name: str, parameters: dict[str, Any], **options: Any) -> None:
    """Loss and gradients in float32 of features that lie on their prototypes, or opposite them; and of a batch of one identity."""
    for kind in ("right", "wrong"):
        result = step(name, parameters, torch.float32, 1.0, kind, options)
        assert all(result[key].isfinite().all() for key in ("loss", "features", "prototypes")), f"{name}, all {kind}"
        assert all(gradient is None or gradient.isfinite().all() for gradient in result["learned"].values()), f"{name}, all {kind}"
    classifier = PartialFC(CLASSES, WIDTH, losses.build(name, **parameters), class_counts=data()[2], **options)
    features = data()[0].float().requires_grad_()
    classifier(features, torch.full((13,), 4)).backward()
    assert features.grad.isfinite().all(), f"{name}, one identity"


def check_finite_differences(name: str, parameters: dict[str, Any], **options: Any) -> None:
    """Gradients by features and learned numbers in float64; only for losses whose gradient is the derivative of their value."""
    features, labels, counts = data()
    classifier = PartialFC(CLASSES, WIDTH, losses.build(name, **parameters), seed=3, class_counts=counts, **options).double()
    features.requires_grad_()
    classifier(features, labels).backward()

    def value(x: Tensor) -> float:
        with torch.no_grad():
            return float(classifier(x, labels))

    for row, column in ((0, 0), (4, 3), (9, 5), (12, 1)):
        change = torch.zeros_like(features)
        change[row, column] = 1e-5
        slope = (value(features.detach() + change) - value(features.detach() - change)) / 2e-5
        assert abs(slope - features.grad[row, column]) < 1e-6 * max(1.0, abs(slope)), f"{name} by feature {row}, {column}"
    for key, parameter in classifier.learned.items():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for place in {0, len(flat) - 1}:
            kept = flat[place].clone()
            sides = []
            for sign in (1, -1):
                flat[place] = kept + sign * 1e-5
                sides.append(value(features.detach()))
            flat[place] = kept
            slope = (sides[0] - sides[1]) / 2e-5
            assert abs(slope - gradient[place]) < 1e-6 * max(1.0, abs(slope)), f"{name} by {key}"


def sample_cosines(dense: Dense) -> tuple[Tensor, Tensor, Tensor]:
    """(cosine with the positive [B], 0 where there is none; whether there is one; cosines [B, B] with the first sample of every other
    identity, -inf elsewhere), found sample by sample."""
    units, labels = normalize(dense.features), dense.labels.tolist()
    found = units @ units.T
    first = [labels.index(label) for label in labels]
    positive = [
        next((k for k, other in enumerate(labels) if other == label and k != i), i) if first[i] == i else first[i]
        for i, label in enumerate(labels)
    ]
    has_positive = torch.tensor([p != i for i, p in enumerate(positive)])
    is_other = torch.tensor([[first[k] == k and labels[k] != labels[i] for k in range(len(labels))] for i in range(len(labels))])
    target = found[torch.arange(len(labels)), torch.tensor(positive)].where(has_positive, 0)
    return target, has_positive, found.masked_fill(~is_other, -torch.inf)


def substituted_cosines(dense: Dense, rate: float) -> tuple[Tensor, Tensor]:
    """As `cosines`, with the first sample in place of the prototype of the classes that step 0 of seed 3 replaces."""
    target, others = cosines(dense)
    units, labels = normalize(dense.features), dense.labels.tolist()
    is_replaced = (sampling.uniform(dense.labels, 3, 0, 1) < rate).tolist()
    columns, targets = list(others.unbind(1)), list(target.unbind(0))
    for k, label in enumerate(labels):
        if labels.index(label) == k and is_replaced[k]:
            column = units @ units[k]
            columns[label] = column.masked_fill(dense.labels == label, -torch.inf)
            for i, other in enumerate(labels):
                if other == label and i != k:
                    targets[i] = column[i]
    return torch.stack(targets), torch.stack(columns, dim=1)
