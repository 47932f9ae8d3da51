"""What a loop of one's own does with gradients on several ranks: one norm, one scale, one decision, so that replicas stay bit-equal."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from partial_fc import GradScaler, PartialFC, RowSGD, clip_grad_norm_, found_non_finite, losses
from tests.partial_fc.test_classifier import batch

CLASSES, INPUTS, WIDTH, SAMPLES = 201, 32, 64, 60  # uneven shards


def mine(samples=SAMPLES):
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return rank, size, slice(rank * samples // size, (rank + 1) * samples // size)


def backbone_of(compiles=False):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(INPUTS, 128), nn.ReLU(), nn.Linear(128, WIDTH))
    if compiles:
        network.compile()
    return network


def clipped(rate, loss, max_norm):
    """Runs on every rank, after two micro-batches: (norm, gradients of the backbone, of the prototypes, of what is learned)."""
    _, size, part = mine()
    classifier = PartialFC(CLASSES, WIDTH, losses.build(loss), rate, seed=3)
    RowSGD(classifier, lr=0.1)
    network = backbone_of()
    inputs, labels = batch(CLASSES, INPUTS, SAMPLES)
    classifier.begin_step(labels[part].repeat(2))
    for _ in range(2):
        classifier(network(inputs[part]), labels[part]).backward()
    for parameter in network.parameters():
        if size > 1:
            dist.all_reduce(parameter.grad)
            parameter.grad /= size
    norm = clip_grad_norm_(network, classifier, max_norm)
    backbone = [parameter.grad for parameter in network.parameters()]
    return norm, backbone, classifier.prototypes.grad.to_dense(), {name: x.grad for name, x in classifier.learned.items()}


@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("loss", ["cosface", "uce", "sum"])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_one_norm_of_all_gradients_on_any_number_of_ranks(ranks, rate, loss, max_norm):
    norm, backbone, prototypes, learned = clipped(rate, loss, max_norm)
    everything = [*backbone, prototypes, *learned.values()]
    assert torch.stack([x.norm() for x in everything]).norm().item() == pytest.approx(min(max_norm, norm.item()), rel=1e-4)
    results = ranks(3).run(clipped, rate, loss, max_norm)
    for found in results:
        assert found[0] == results[0][0] and found[0].item() == pytest.approx(norm.item(), rel=1e-5)
        for gradient, first, right in zip(found[1], results[0][1], backbone, strict=True):
            assert torch.equal(gradient, first)
            assert (gradient - right).norm() < 1e-4 * right.norm()
        torch.testing.assert_close(found[3], learned, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.cat([found[2] for found in results]), prototypes, rtol=1e-4, atol=1e-6)


def test_gradients_that_are_used_in_backward_cannot_be_clipped():
    classifier = PartialFC(CLASSES, WIDTH, "cosface")
    RowSGD(classifier, lr=0.1, in_backward=True)
    with pytest.raises(ValueError, match="use in_backward=False"):
        clip_grad_norm_(nn.Linear(2, 2), classifier, 1.0)


def two_heads():
    """Runs on every rank: the norm over a module with two classifiers, and over its parts."""
    heads = [PartialFC(CLASSES, WIDTH, "cosface", seed=seed) for seed in (3, 4)]
    whole = nn.ModuleList([backbone_of(), *heads])
    _, size, part = mine()
    inputs, labels = batch(CLASSES, INPUTS, SAMPLES)
    features = whole[0](inputs[part])
    sum(head(features, labels[part]) for head in heads).backward()
    for parameter in whole[0].parameters():
        if size > 1:
            dist.all_reduce(parameter.grad)
            parameter.grad /= size
    with pytest.raises(ValueError, match="not among the classifiers"):
        clip_grad_norm_(whole, heads[0], 1e6)
    return clip_grad_norm_(whole, heads, 1e6).item()


def test_two_classifiers_share_one_norm(ranks):
    assert ranks(3).run(two_heads) == pytest.approx([two_heads()] * 3, rel=1e-5)


def sharded_backbone():
    """Runs on every rank: the norm of a classifier with a backbone in FSDP2, and the backbone's gradient after clipping, whole."""
    _, size, part = mine()
    network, classifier = backbone_of(), PartialFC(CLASSES, WIDTH, "cosface", seed=3)
    if size > 1:
        fully_shard(network, mesh=init_device_mesh("cpu", (size,)))
    inputs, labels = batch(CLASSES, INPUTS, SAMPLES)
    classifier(network(inputs[part]), labels[part]).backward()
    norm = clip_grad_norm_(network, classifier, 0.5).item()
    gradient = network[0].weight.grad
    return norm, gradient.full_tensor() if size > 1 else gradient


def test_a_backbone_in_parts_counts_whole(ranks):
    right = sharded_backbone()
    for norm, gradient in ranks(2).run(sharded_backbone):
        assert norm == pytest.approx(right[0], rel=1e-5) and (gradient - right[1]).norm() < 1e-4 * right[1].norm()


def test_a_scaler_that_is_switched_off_does_nothing():
    classifier = PartialFC(CLASSES, WIDTH, "cosface")
    optimizer, scaler = RowSGD(classifier, lr=0.1), GradScaler("cpu", enabled=False)
    scaler.scale(classifier(*batch(CLASSES, WIDTH, 6))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.state[classifier.prototypes]["step"] == 1


def scaled(scaler_class):
    """Runs on every rank, with an overflow in the last one's shard: (scale, whether each optimizer made its step)."""
    rank, size, part = mine()
    classifier = PartialFC(CLASSES, WIDTH, "cosface", seed=3)
    network = backbone_of()
    optimizers = [RowSGD(classifier, lr=0.1), torch.optim.SGD(network.parameters(), lr=0.1)]
    scaler = scaler_class("cpu", init_scale=2.0**10)
    inputs, labels = batch(CLASSES, INPUTS, SAMPLES)
    scaler.scale(classifier(network(inputs[part]), labels[part])).backward()
    if rank == size - 1:
        classifier.prototypes.grad[0, 0] = torch.inf
    before = [classifier.prototypes.detach().clone(), network[0].weight.detach().clone()]
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale(), [not torch.equal(*pair) for pair in zip(before, [classifier.prototypes, network[0].weight], strict=True)]


def test_an_overflow_in_one_shard_makes_every_rank_leave_the_step_out(ranks):
    assert ranks(3).run(scaled, GradScaler) == [(2.0**9, [False, False])] * 3 == [scaled(GradScaler)] * 3


def refused_scaler():
    with pytest.raises(ValueError, match=r"use partial_fc\.GradScaler"):
        scaled(torch.amp.GradScaler)


def test_a_scaler_that_decides_on_each_rank_is_refused(ranks):
    ranks(3).run(refused_scaler)
    assert scaled(torch.amp.GradScaler)[1] == [False, True]  # one process may use torch's


def trained(rate, steps):
    """Runs on every rank: losses, scales and weights of the backbone after each step of a whole loop in float16."""
    rank, size, part = mine()
    classifier = PartialFC(CLASSES, WIDTH, losses.build("cosface", scale=16.0, margin=0.2), rate, seed=3)
    network = backbone_of(compiles=True)
    parallel = DistributedDataParallel(network) if size > 1 else network
    optimizers = [RowSGD(classifier, lr=0.1), torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)]
    scaler = GradScaler("cpu", init_scale=2.0**12, growth_interval=15)
    means, found = torch.randn(CLASSES, INPUTS, generator=torch.Generator().manual_seed(5)), []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
        inputs = means[labels] + 0.3 * torch.randn(SAMPLES, INPUTS, generator=generator)
        with torch.autocast("cpu", torch.float16):
            features = parallel(inputs[part])
            loss = classifier(features, labels[part])
        scaler.scale(loss).backward()
        if step == 10 and rank == size - 1:
            classifier.gradient_values()[0, 0] = torch.inf
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        clip_grad_norm_(network, classifier, max_norm=1.0)
        for optimizer in optimizers:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()
        found.append((loss.item(), scaler.get_scale(), torch.cat([parameter.detach().flatten() for parameter in network.parameters()])))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_ddp_with_a_compiled_backbone_in_float16_stays_in_step(ranks, rate):
    """The whole of it at once: DDP, torch.compile, autocast, GradScaler with an overflow in one rank's shard, joint clipping."""
    alone, both = trained(rate, 50), ranks(2).run(trained, rate, 50)
    for step, (right, first, second) in enumerate(zip(alone, *both, strict=True)):
        assert torch.equal(first[2], second[2]), f"the replicas differ after step {step}"
        assert first[:2] == second[:2] and first[1] == right[1]
        assert first[0] == pytest.approx(right[0], rel=1e-3, abs=1e-3), f"step {step}"  # near 0 a loss is a difference of larger numbers
    scales = [scale for _, scale, _ in alone]
    assert scales[10] == scales[9] / 2 and scales[-1] > scales[10] and alone[-1][0] < 0.8 * alone[0][0]
    worst = max(abs(first[0] - right[0]) / max(1.0, right[0]) for right, first in zip(alone, both[0], strict=True))
    print(f"rate {rate}: losses of 50 steps on 1 and 2 ranks differ by {worst:.1e} at most")


def found_in(where):
    """Runs on every rank: whether something that is not finite is found, if it is only in the last rank's part."""
    rank, size, part = mine()
    classifier = PartialFC(CLASSES, WIDTH, losses.build("uce"), 0.3, seed=3)
    network = backbone_of()
    inputs, labels = batch(CLASSES, INPUTS, SAMPLES)
    classifier(network(inputs[part]), labels[part]).backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    if rank == size - 1 and where is not None:
        of = {"backbone": gradients[1], "prototypes": classifier.gradient_values(), "learned": next(iter(classifier.learned.values())).grad}
        of[where].view(-1)[-1] = torch.nan
    found = found_non_finite(gradients, classifier)
    assert found.dtype == torch.float32 and found.ndim == 0
    return found.item()


@pytest.mark.parametrize("where", [None, "backbone", "prototypes", "learned"])
def test_what_is_not_finite_on_one_rank_is_found_by_all(ranks, where):
    right = float(where is not None)
    assert found_in(where) == right and ranks(3).run(found_in, where) == [right] * 3


def parts_unscaled():
    """Runs on every rank: gradients of which each rank has another part, with an overflow in the last one's; and the next scale."""
    rank, size, _ = mine()
    scaler = GradScaler("cpu", init_scale=2.0**4, enabled=True)
    scaler.scale(torch.ones(()))
    parts = [torch.full((2, 3), 32.0), torch.full((rank + 1,), torch.inf if rank == size - 1 else 16.0)]
    scaler.unscale_gradients_(parts)
    scaler.update()
    return [part.max().item() for part in parts], scaler.get_scale()


def test_gradients_of_an_engine_are_unscaled_in_place_and_judged_on_all_ranks(ranks):
    results = ranks(3).run(parts_unscaled)
    assert results == [([2.0, 1.0], 8.0)] * 2 + [([2.0, torch.inf], 8.0)]


def test_a_step_that_is_left_out_changes_nothing_and_is_counted():
    classifier = PartialFC(CLASSES, WIDTH, "cosface", non_finite="skip")
    optimizer = RowSGD(classifier, lr=0.1)
    before = classifier.prototypes.detach().clone()
    features, labels = batch(CLASSES, WIDTH, 6)
    classifier(features, labels).backward()
    classifier.leave_out()
    assert not classifier.is_finite()
    classifier.leave_out()  # once more counts once
    optimizer.step()
    optimizer.zero_grad()
    assert classifier.skipped_steps == 1 and torch.equal(classifier.prototypes, before)
    classifier(features, labels).backward()
    optimizer.step()
    assert classifier.is_finite() and classifier.skipped_steps == 1 and not torch.equal(classifier.prototypes, before)


def test_prototypes_that_have_moved_cannot_be_left_out():
    classifier = PartialFC(CLASSES, WIDTH, "cosface", non_finite="skip")
    RowSGD(classifier, lr=0.1, in_backward=True)
    classifier(*batch(CLASSES, WIDTH, 6)).backward()
    with pytest.raises(ValueError, match="step 0 is to be left out, but in_backward=True has moved prototypes"):
        classifier.leave_out()
