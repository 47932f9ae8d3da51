"""What a ViT does in training only (masks, drop path), and in which precision its parts work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.backbones import BackboneConfig, build
from pipeline.backbones.vit import DropPath

SIDE = 27  # 9 tokens
CONFIG = BackboneConfig("vit_t", width=8)


def shallow(config: BackboneConfig) -> nn.Module:
    torch.manual_seed(0)
    network = build(config, SIDE)
    network.blocks = network.blocks[:2]
    return network


def seen(network: nn.Module, part: nn.Module) -> torch.Tensor:
    """What `part` receives in a forward pass."""
    caught = []
    hook = part.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0].detach()))
    network(torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)))
    hook.remove()
    return caught[0]


def test_masked_tokens_are_left_out_and_replaced_by_the_mask_token_in_training_only():
    network = shallow(replace(CONFIG, mask_ratio=0.4))
    assert seen(network.train(), network.blocks[0]).shape == (4, 5, 256)  # int(9 * 0.6)
    nn.init.constant_(network.mask_token, 7.0)
    masked_bT = seen(network, network.feature).view(4, 9, 256).eq(7.0).all(dim=2)
    assert masked_bT.sum(dim=1).tolist() == [4] * 4
    assert masked_bT.unique(dim=0).shape[0] > 1, "every image has its own mask"
    assert seen(network.eval(), network.blocks[0]).shape == (4, 9, 256)


def test_tokens_keep_their_places_under_a_mask():
    network = shallow(replace(CONFIG, mask_ratio=0.4)).train()
    network.blocks = nn.ModuleList()
    with_masks = seen(network, network.feature).view(4, 9, 256)
    without = seen(network.eval(), network.feature).view(4, 9, 256)
    is_same = (with_masks - without).abs().amax(dim=2) < 1e-6
    assert is_same.sum(dim=1).tolist() == [5] * 4


def test_the_mask_token_learns():
    network = shallow(replace(CONFIG, mask_ratio=0.4)).train()
    network(torch.randn(4, 3, SIDE, SIDE))[:, 0].square().sum().backward()
    assert network.mask_token.grad is not None


def steps_of_ddp(mask_ratio: float) -> torch.Tensor:
    parallel = DistributedDataParallel(shallow(replace(CONFIG, mask_ratio=mask_ratio)), broadcast_buffers=False)
    for _ in range(2):  # DDP misses a gradient when the next step begins
        parallel(torch.randn(4, 3, SIDE, SIDE))[:, 0].square().sum().backward()
    return parallel.module.pos_embed.grad


@pytest.mark.parametrize("mask_ratio", [0.0, 0.4])
def test_ddp_finds_a_gradient_of_every_parameter_that_is_trained(ranks, mask_ratio):
    first, second = ranks(2).run(steps_of_ddp, mask_ratio)
    assert torch.equal(first, second) and first.abs().sum() > 0


def test_drop_path_grows_from_block_to_block_and_keeps_the_mean():
    shares = [block.drop_path.share for block in build(replace(CONFIG, drop_path=0.22), SIDE).blocks]
    assert shares == pytest.approx([0.02 * block for block in range(12)])
    torch.manual_seed(0)
    dropped = DropPath(0.25)(torch.ones(40_000, 2, 3))
    assert torch.equal(dropped.unique(), torch.tensor([0, 1 / 0.75])) and torch.equal(dropped[:, 0, 0], dropped[:, 1, 2])
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(DropPath(0.25).eval()(torch.ones(4)), torch.ones(4))


@pytest.mark.parametrize("float32_attention", [False, True])
def test_precision_of_the_parts_under_autocast(float32_attention, monkeypatch):
    network = shallow(replace(CONFIG, float32_attention=float32_attention)).train()
    attention = []

    def spy(query, key, value):
        attention.append((query.dtype, torch.is_autocast_enabled("cpu")))
        return value

    monkeypatch.setattr("pipeline.backbones.vit.scaled_dot_product_attention", spy)
    outputs = {}
    for name, part in network.named_modules():
        part.register_forward_hook(lambda module, inputs, output, name=name: outputs.update({name: output.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        features = network(torch.randn(2, 3, SIDE, SIDE).half())
    halves = {name for name, dtype in outputs.items() if dtype == torch.bfloat16}
    within = {
        f"blocks.{block}.{part}" for block in (0, 1) for part in ("attn", "attn.qkv", "attn.proj", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2")
    }
    assert halves - {"blocks.0.drop_path", "blocks.1.drop_path"} == within
    assert set(attention) == {(torch.float32, False) if float32_attention else (torch.bfloat16, True)}
    assert features.dtype == torch.float32


def test_images_of_other_sizes():
    assert build(CONFIG, 64)(torch.randn(2, 3, 64, 64)).shape == (2, 8)  # 7 x 7 patches: no size needs to be a multiple of the patch
    with pytest.raises(ValueError, match="at least 9 pixels, its patch, not 8"):
        build(CONFIG, 8)
