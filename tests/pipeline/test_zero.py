"""ZeRO 1 to 3 against DDP: the same weights, and state that passes from each to each on any number of ranks, part by part."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from pipeline.backbones.recompute import Block
from pipeline.checkpoint.parts import Held
from pipeline.distributed import join
from pipeline.engine import EngineConfig, build_engine
from pipeline.measuring import Traffic
from pipeline.schedule import OptimizerConfig

ENGINES = [EngineConfig("ddp", precision="float32")] + [EngineConfig("deepspeed", precision="float32", zero_stage=n) for n in (1, 2, 3)]
NAMES = ["ddp", "zero1", "zero2", "zero3"]
SGD = OptimizerConfig(lr=0.1, clip=0.5, weight_decay=0.01)
ADAMW = replace(SGD, name="adamw", lr=0.01, no_decay=("*.bias",))
IMAGES = torch.randn(12, 3, 5, 5, generator=torch.Generator().manual_seed(1))
TARGETS = torch.randn(12, 7, generator=torch.Generator().manual_seed(2))


class Uneven(nn.Module):
    """Sizes that no number of ranks divides, parameters of a single number, a frozen one, one that never gets a gradient, and buffers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3)
        self.norm = nn.GroupNorm(1, 7)
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.fc = nn.Linear(63, 7)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(7))

    def forward(self, images):
        features = self.fc(self.norm(self.conv(images)).flatten(1)) * self.scale + self.frozen.sum()
        if self.training:
            self.count += 1
            self.mean += features.detach().float().mean(0)
        return features


def built(config, optimizer, accumulation=1):
    torch.manual_seed(0)
    return build_engine(config, optimizer, Uneven(), join("cpu"), accumulation)


def step(engine, number, accumulation=1, lr=0.05):
    """One step, with a loss that every number of ranks and of micro-batches adds up to."""
    place = join("cpu")
    mine = torch.arange(12).chunk(place.world_size)[place.rank].chunk(accumulation)
    for micro, rows in enumerate(mine, start=1):
        features = engine.forward(IMAGES[rows] + 0.1 * number, micro == accumulation)
        gradient = place.world_size * 2 * (features.detach() - TARGETS[rows]) / TARGETS.numel()
        engine.backward(features, gradient, micro == accumulation)
    found = torch.cat([part.flatten() for part in engine.clip()])
    assert found.isfinite().all()
    engine.step(lr, torch.zeros(()))


def trained(config, optimizer, steps, accumulation=1, saved=None, first=0):
    """Runs on every rank: (this rank's parts of the state, loss of all images after it)."""
    engine = built(config, optimizer, accumulation)
    if saved is not None:
        engine.load(Held(saved))
        for name, part in engine.state().items():
            if not name.endswith("of_ranks"):
                expected = saved[name].reshape(-1)[part.start : part.start + part.tensor.numel()]
                torch.testing.assert_close(part.tensor.detach().reshape(-1), expected, rtol=1e-6, atol=0)  # an average of 3 equal ones
    for number in range(first, first + steps):
        step(engine, number, accumulation, 0.05 if optimizer == SGD else 0.002)
    with engine.for_evaluation() as module, torch.no_grad():
        assert all(parameter.numel() for parameter in module.parameters())
        module.eval()
        loss = (module(IMAGES) - TARGETS).square().mean().item()
        module.train()
    return {name: (part.tensor.detach().clone(), part.shape, part.start, part.replicated) for name, part in engine.state().items()}, loss


def together(results):
    """Whole tensors of the parts of all ranks; every element must come from one rank, or from all."""
    state = {}
    for name in {name: None for parts, _ in results for name in parts}:
        parts = [parts[name] for parts, _ in results if name in parts]
        (shape,) = {part[1] for part in parts}
        (is_replicated,) = {part[3] for part in parts}
        out, count = torch.zeros(shape, dtype=parts[0][0].dtype).reshape(-1), torch.zeros(math.prod(shape), dtype=torch.int64)
        for tensor, _, start, _ in parts:
            out[start : start + tensor.numel()] = tensor.reshape(-1)
            count[start : start + tensor.numel()] += 1
        assert (count == (len(results) if is_replicated else 1)).all(), name
        state[name] = out.view(shape)
    return state


def assert_alike(state, expected, tolerance=1e-5):
    assert state.keys() == expected.keys()
    worst = 0.0
    for name, tensor in expected.items():
        if name != "buffers_of_ranks":
            difference = (state[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-6)
            assert difference < tolerance, f"{name}: {difference:.1e}"
            worst = max(worst, difference.item())
    print(f"largest relative difference of a tensor: {worst:.1e}")


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize(("size", "steps"), [(2, 6), (3, 6), pytest.param(2, 50, marks=pytest.mark.long)])
def test_all_engines_train_alike(ranks, optimizer, size, steps):
    expected = together(ranks(size).run(trained, ENGINES[0], optimizer, steps))
    moving = [name for name in expected if name.startswith("optimizer.")]
    assert len(moving) == (7 if optimizer is SGD else 21)
    for config in ENGINES[1:]:
        assert_alike(together(ranks(size).run(trained, config, optimizer, steps)), expected)


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_state_passes_between_engines_and_numbers_of_ranks(ranks, optimizer):
    """Every engine once as source and once as target of another, on 1 to 4 ranks."""
    (_, whole), *_ = ranks(1).run(trained, ENGINES[0], optimizer, 8)
    cases = [(0, 2, 3, 3), (3, 3, 0, 2), (3, 2, 1, 4), (1, 3, 3, 4), (2, 4, 3, 1), (3, 4, 2, 3), (1, 2, 2, 1), (2, 3, 1, 2)]
    for source, before, target, after in cases:
        saved = together(ranks(before).run(trained, ENGINES[source], optimizer, 4))
        results = ranks(after).run(trained, ENGINES[target], optimizer, 4, 1, saved, 4)
        assert {loss for _, loss in results} == {results[0][1]}
        assert results[0][1] == pytest.approx(whole, rel=1e-5), (NAMES[source], before, NAMES[target], after)


@pytest.mark.parametrize("config", ENGINES, ids=NAMES)
def test_optimizer_state_may_be_absent(ranks, config):
    saved = together(ranks(2).run(trained, config, ADAMW, 3))
    for lacking in ("optimizer.", "optimizer.scale."):
        part = {name: tensor for name, tensor in saved.items() if not name.startswith(lacking)}
        state = together(ranks(2).run(loaded, config, part))
        for name, tensor in saved.items():
            if name in part:
                assert torch.equal(state[name], tensor), name
            elif name != "optimizer.scale.step":
                assert not state[name].any(), name


def loaded(config, saved):
    engine = built(config, ADAMW)
    engine.load(Held(saved))
    return {name: (part.tensor.detach().clone(), part.shape, part.start, part.replicated) for name, part in engine.state().items()}, 0


def sent(config, accumulation):
    """Bytes that a rank sends in each micro-batch's forward and backward, once DDP has made its buckets."""
    engine = built(config, SGD, accumulation)
    for number in range(2):
        step(engine, number, accumulation)
    rows, found = torch.arange(12).chunk(2)[join("cpu").rank].chunk(accumulation), []
    for micro, part in enumerate(rows, start=1):
        with Traffic() as traffic:
            features = engine.forward(IMAGES[part], micro == accumulation)
            engine.backward(features, torch.ones_like(features), micro == accumulation)
        found.append(traffic.sent)
    return found


@pytest.mark.parametrize(("config", "is_quiet"), list(zip(ENGINES, (True, True, False, False), strict=True)), ids=NAMES)
def test_micro_batches_before_the_last_send_nothing(ranks, config, is_quiet):
    """ZeRO 2 and 3 keep no whole gradient, so that they have to send each."""
    for *before, last in ranks(2).run(sent, config, 3):
        assert last > 0 and (before == [0, 0]) == is_quiet


class Large(nn.Module):
    """Wide enough that its weights do not stay whole between uses, with a block that computes again in backward."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(75, 333)
        self.blocks = nn.ModuleList([Again(), Again()])
        self.fc = nn.Linear(333, 7)

    def forward(self, images):
        x = self.stem(images.flatten(1))
        for block in self.blocks:
            x = block(x)
        return self.fc(x)


class Again(Block):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(333, 333)
        self.checkpointed = True

    def compute(self, x):
        return x + torch.relu(self.inner(x))


def trained_large(config):
    torch.manual_seed(0)
    engine = build_engine(config, SGD, Large(), join("cpu"), 1)
    if config.zero_stage == 3:
        assert not all(parameter.numel() for parameter in engine.module.parameters())
    for number in range(3):
        step(engine, number)
    return {name: (part.tensor.detach().clone(), part.shape, part.start, part.replicated) for name, part in engine.state().items()}, 0


def test_weights_that_are_not_whole_between_uses(ranks):
    expected = together(ranks(3).run(trained_large, ENGINES[0]))
    assert_alike(together(ranks(3).run(trained_large, ENGINES[3])), expected)
