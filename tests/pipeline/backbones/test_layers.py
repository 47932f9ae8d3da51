"""Layer numbers of parameters, of the networks here and of others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.backbones import BackboneConfig, build, layers_of, names


@pytest.mark.parametrize("name", names())
def test_every_parameter_has_a_layer_and_layers_go_up(name):
    with torch.device("meta"):
        network = build(BackboneConfig(name), 112)
    layers = layers_of(network)
    assert list(layers) == [name for name, _ in network.named_parameters()]
    assert list(layers.values()) == sorted(layers.values()) and set(layers.values()) == set(range(max(layers.values()) + 1))


def test_of_a_vit():
    with torch.device("meta"):
        layers = layers_of(build(BackboneConfig("vit_b"), 112))
    assert {layers[name] for name in ("pos_embed", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias")} == {0}
    for name, layer in layers.items():
        if name.startswith("blocks."):
            assert layer == int(name.split(".")[1]) + 1
        if name.startswith(("norm.", "feature.")):
            assert layer == 25


def test_of_an_iresnet():
    with torch.device("meta"):
        layers = layers_of(build(BackboneConfig("iresnet50"), 112))
    assert {layers[name] for name in ("conv1.weight", "bn1.bias", "prelu.weight")} == {0}
    assert layers["layer1.0.conv1.weight"] == layers["layer1.0.downsample.0.weight"] == 1
    assert layers["layer4.2.bn3.weight"] == 3 + 4 + 14 + 3
    assert {layers[name] for name in ("bn2.weight", "fc.weight", "features.bias")} == {25}


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.body = build(BackboneConfig("vit_t"), 18)
        self.top = nn.Linear(512, 4)


def test_of_networks_of_other_forms():
    assert list(layers_of(nn.Linear(2, 2)).values()) == [0, 0]
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    assert layers_of(plain) == {
        "0.weight": 0, "0.bias": 0, "1.weight": 0, "1.bias": 0, "2.weight": 0, "3.weight": 1, "3.bias": 1, "5.weight": 2, "5.bias": 2,
    }  # fmt: skip
    wrapped = layers_of(Wrapped())
    assert wrapped["scale"] == wrapped["body.pos_embed"] == wrapped["body.patch_embed.proj.weight"] == 0
    assert wrapped["body.blocks.3.mlp.fc1.weight"] == 4 and wrapped["body.feature.0.weight"] == wrapped["top.weight"] == 13
