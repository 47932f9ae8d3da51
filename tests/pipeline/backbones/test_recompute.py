"""Checkpointed blocks: the same features, gradients and buffers to the bit, with less kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.backbones import BackboneConfig, build
from pipeline.backbones.iresnet import IRBlock
from pipeline.backbones.recompute import checkpoint_blocks
from pipeline.backbones.vit import TransformerBlock

CONFIGS = [BackboneConfig("iresnet18", 8, dropout=0.3), BackboneConfig("vit_t", 8, drop_path=0.5, mask_ratio=0.3)]
IMAGES = torch.randn(4, 3, 18, 18, generator=torch.Generator().manual_seed(0))


def after_two_steps(network: nn.Module, images: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """Features, gradients and buffers."""
    result = {}
    for step in range(2):
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = network(images)
        (features.float() * torch.arange(features.numel()).view_as(features).cos()).sum().backward()
        result[f"features {step}"] = features.detach().clone()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    return {**result, **gradients, **dict(network.named_buffers())}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not differing


def built(config: BackboneConfig) -> nn.Module:
    """The network with its first blocks only."""
    torch.manual_seed(0)
    network = build(config, 16 if config.name == "iresnet18" else 18).train()
    if config.name == "vit_t":
        network.blocks = network.blocks[:3]
    return network


def images_for(config: BackboneConfig) -> Tensor:
    return IMAGES[:, :, :16, :16] if config.name == "iresnet18" else IMAGES


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_the_option_of_a_network_changes_no_bit(config):
    plain = after_two_steps(built(config), images_for(config))
    assert_equal(after_two_steps(built(replace(config, checkpoint_activations=True)), images_for(config)), plain)
    assert all(value == 2 for name, value in plain.items() if name.endswith("num_batches_tracked"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_less_is_kept_in_training_and_evaluation_is_as_before(config):
    plain, checkpointed = built(config), built(replace(config, checkpoint_activations=True))
    with torch.no_grad():
        assert torch.equal(plain.eval()(images_for(config)), checkpointed.eval()(images_for(config)))
    assert kept(checkpointed.train(), images_for(config)) < 0.5 * kept(plain.train(), images_for(config))


def kept(network: nn.Module, images: Tensor) -> int:
    """Bytes that forward leaves to backward."""
    saved = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(images)
    own = {parameter.data_ptr() for parameter in network.parameters()}
    return sum(tensor.nbytes for address, tensor in saved.items() if address not in own)


class Blocks(nn.Module):
    """Few enough to compile in a test."""

    def __init__(self, kind: str, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        convolutions = [IRBlock(8, 8, 1), IRBlock(8, 8, 2)]
        self.blocks = nn.Sequential(*convolutions if kind == "conv" else [TransformerBlock(16, 0.5, False) for _ in range(2)])
        checkpoint_blocks(self, checkpointed)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).flatten(1)


INPUTS = {"conv": (4, 8, 6, 6), "tokens": (4, 5, 16)}


@pytest.mark.parametrize("kind", INPUTS)
def test_bit_equal_under_autocast(kind):
    x = torch.randn(INPUTS[kind])
    assert_equal(*(after_two_steps(Blocks(kind, again), x, autocast=True) for again in (False, True)))


@pytest.mark.parametrize("kind", INPUTS)
def test_bit_equal_under_compile(kind):
    x = torch.randn(INPUTS[kind])
    results = []
    for checkpointed in (False, True):
        torch._dynamo.reset()
        network = Blocks(kind, checkpointed)
        network.compile(backend="aot_eager")  # what decides which values are computed again, without a C++ compiler
        results.append(after_two_steps(network, x))
    assert_equal(*results)


def with_ddp(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    x = torch.randn(INPUTS[kind], generator=torch.Generator().manual_seed(dist.get_rank()))
    plain, checkpointed = (
        after_two_steps(DistributedDataParallel(Blocks(kind, again), broadcast_buffers=False), x) for again in (False, True)
    )
    return plain, checkpointed


@pytest.mark.parametrize("kind", INPUTS)
def test_bit_equal_under_ddp(ranks, kind):
    results = ranks(2).run(with_ddp, kind)
    for plain, checkpointed in results:
        assert_equal(checkpointed, plain)
    gradient = "module.blocks.0." + ("conv1" if kind == "conv" else "attn.qkv") + ".weight"
    assert torch.equal(results[0][0][gradient], results[1][0][gradient])
