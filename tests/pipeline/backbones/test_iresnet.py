"""IResNet against facts about arcface_torch's: parameter names in order, shapes, and counts."""

import pytest
import torch
from torch import nn

from pipeline.backbones import BackboneConfig, build

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6)}
PARAMETERS = {18: 24_025_600, 34: 34_139_328, 50: 43_590_848, 100: 65_156_160, 200: 118_833_920}


def norm(name):
    return [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def arcface_torch_names(depth):
    names = ["conv1.weight", *norm("bn1"), "prelu.weight"]
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            names += [*norm(f"{at}.bn1"), f"{at}.conv1.weight", *norm(f"{at}.bn2"), f"{at}.prelu.weight", f"{at}.conv2.weight"]
            names += norm(f"{at}.bn3")
            names += [f"{at}.downsample.0.weight", *norm(f"{at}.downsample.1")] if block == 0 else []
    return [*names, *norm("bn2"), "fc.weight", "fc.bias", *norm("features")]


@pytest.mark.parametrize("depth", BLOCKS)
def test_names_and_number_of_parameters(depth):
    with torch.device("meta"):
        model = build(BackboneConfig(f"iresnet{depth}"), 112)
    assert list(model.state_dict()) == arcface_torch_names(depth)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[depth]


def test_shapes():
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in build(BackboneConfig("iresnet18"), 112).state_dict().items()}
    assert shapes["conv1.weight"] == (64, 3, 3, 3)
    assert shapes["layer1.0.downsample.0.weight"] == (64, 64, 1, 1)
    assert shapes["layer2.0.bn1.weight"] == (64,) and shapes["layer2.0.bn2.weight"] == (128,)
    assert shapes["layer2.0.conv1.weight"] == (128, 64, 3, 3) and shapes["layer2.0.conv2.weight"] == (128, 128, 3, 3)
    assert shapes["layer2.0.prelu.weight"] == (128,)
    assert shapes["layer4.1.conv1.weight"] == (512, 512, 3, 3)
    assert shapes["fc.weight"] == (512, 512 * 7 * 7) and shapes["features.weight"] == (512,)


def test_every_stage_halves_the_image():
    model = build(BackboneConfig("iresnet18", width=8), 32).eval()
    x = model.conv1(torch.zeros(1, 3, 32, 32))
    for stage, side in ((model.layer1, 16), (model.layer2, 8), (model.layer3, 4), (model.layer4, 2)):
        x = stage(x)
        assert x.shape[2:] == (side, side)
    assert model.layer1[0].conv1.stride == (1, 1) and model.layer1[0].conv2.stride == (2, 2)


def test_last_batch_norm_cannot_scale_and_weights_start_as_the_field_has_them():
    torch.manual_seed(0)
    model = build(BackboneConfig("iresnet18", width=8), 32)
    assert not model.features.weight.requires_grad and model.features.weight.eq(1).all() and model.features.bias.requires_grad
    assert model.layer3[1].conv1.weight.std().item() == pytest.approx(0.1, rel=0.01)
    assert model.layer3[1].prelu.weight.eq(0.25).all()
    assert all(module.eps == 1e-5 for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d))
