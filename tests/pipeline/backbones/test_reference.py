"""The networks of InsightFace's arcface_torch: counts, names and shapes of its state dicts, and its outputs for weights given by a formula.

The numbers were measured with its own code (backbones/ of June 2023) in float64: there, our features and gradients with the same random
weights agreed with its to 1e-14 in evaluation and to 1e-7 in training, where its rates of drop path are rounded to float32.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.backbones import BackboneConfig, build
from tests.pipeline.backbones.formula import fill, images

# parameters; SHA-256 of the lines "name shape" of the state dict, in order
STATES = {
    "iresnet18": (24_025_600, "2fc57a7c2208129d"),
    "iresnet200": (118_833_920, "4591f94b33e49622"),
    "mobilefacenet": (2_059_520, "9559fd021a31b1bc"),
    "mobilefacenet_large": (6_314_880, "c5baa81a0265edd3"),
    "vit_t": (19_137_792, "031539a3cb15052e"),
    "vit_s": (76_023_296, "554d698bdadacb2f"),
    "vit_b": (113_833_472, "70714069fce547fe"),
    "vit_l": (255_684_352, "423af2d25f8393b1"),
}
# Published in its README, in billions of multiply-adds for an image.
COST = {"iresnet18": 2.6, "iresnet200": 23.5, "mobilefacenet": 0.45, "vit_t": 1.5, "vit_s": 5.7, "vit_b": 11.4, "vit_l": 25.3}
# For formula.images(3, 112) in evaluation: the first features of the first image, and the norm of all features.
EVALUATION = {
    "iresnet18": ([0.133083, 0.086914, -0.096228], 4.044655579156156),
    "mobilefacenet_large": ([0.280469, -0.641217, -1.174185], 31.903367598483943),
    "vit_t": ([0.345113, -0.147936, -0.425223], 22.591752284689527),
}
# The same in training, and the norm of the gradient of sum(features * cos(0, 1, 2, ...)) by the images.
TRAINING = {
    "iresnet18": ([1.303589, -1.289141, 1.063287], 39.38689699045824, 8.1485145152227),
    "mobilefacenet": ([0.340474, 1.039494, 0.898458], 39.37321356936721, 1324.9000460551147),
    "vit_t": ([-1.29144, -1.242347, -1.111307], 37.80493291852604, 2157.5111739148024),
}


@pytest.mark.parametrize("name", STATES)
def test_names_shapes_and_number_of_parameters(name):
    with torch.device("meta"):
        network = build(BackboneConfig(name), 112)
    lines = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in network.state_dict().items())
    counted = sum(parameter.numel() for parameter in network.parameters())
    assert (counted, hashlib.sha256(lines.encode()).hexdigest()[:16]) == STATES[name]


@pytest.mark.parametrize("name", COST)
def test_cost_is_the_published_one(name):
    """Convolutions, linear layers and, of a ViT, products between tokens; the published figures also count what is done to elements."""
    made = []

    def count(module, inputs, output):
        kernel = module.weight[0].numel()
        made.append(kernel * output.numel())

    with FakeTensorMode():
        network = build(BackboneConfig(name), 112).eval()
        for part in network.modules():
            if isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
                part.register_forward_hook(count)
        network(torch.empty(1, 3, 112, 112))
    between = 2 * 144**2 * network.mask_token.numel() * len(network.blocks) if name.startswith("vit") else 0
    assert (sum(made) + between) / 1e9 == pytest.approx(COST[name], rel=0.03)


def assert_outputs(features_bD, first, norm):
    torch.testing.assert_close(features_bD[0, :3], torch.tensor(first).double(), rtol=0, atol=1e-6)
    assert features_bD.norm().item() == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("name", EVALUATION)
def test_outputs_are_those_of_the_reference(name):
    network = fill(build(BackboneConfig(name), 112)).eval()
    with torch.no_grad():
        assert_outputs(network(images(3, 112)), *EVALUATION[name])


@pytest.mark.parametrize("name", TRAINING)
def test_outputs_and_gradients_in_training_are_those_of_the_reference(name):
    *outputs, gradient_norm = TRAINING[name]
    network, image_bCHW = fill(build(BackboneConfig(name), 112)).train(), images(3, 112).requires_grad_()
    features_bD = network(image_bCHW)
    (features_bD * torch.arange(features_bD.numel()).cos().view_as(features_bD)).sum().backward()
    assert_outputs(features_bD.detach(), *outputs)
    assert image_bCHW.grad is not None and image_bCHW.grad.norm().item() == pytest.approx(gradient_norm, rel=1e-6)
