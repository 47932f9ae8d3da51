"""Networks of one's own, and which options and images a network takes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from pipeline import backbones
from pipeline.backbones import BackboneConfig, build, check, register


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(backbones, "_NETWORKS", dict(backbones._NETWORKS))


def flat(width: int, image_size: int, dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(3 * image_size**2, width))


def test_a_function_with_one_of_the_options():
    register("flat")(flat)
    network = build(BackboneConfig("flat", width=4, dropout=0.25), 7)  # no multiple of anything
    assert network[1].p == 0.25 and network(torch.randn(2, 3, 7, 7)).shape == (2, 4)
    assert "flat" in backbones.names() and backbones.options("flat") == {"dropout"}


def test_a_class_that_takes_all_options_and_some_sizes():
    @register("all", multiple_of=8)
    class All(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.given = options

    given = build(BackboneConfig("all", width=3, mask_ratio=0.1, float32_attention=True), 24).given
    assert given == {"width": 3, "image_size": 24, **backbones.OPTIONS, "mask_ratio": 0.1, "float32_attention": True}
    with pytest.raises(ValueError, match="backbone 'all' needs an image size divisible by 8, not 20"):
        check(BackboneConfig("all"), 20)


def test_running_a_recipe_file_again_registers_again():
    source = "class Net:\n    def __init__(self, width, image_size, depth=1): pass\n"
    first, second = {"__name__": "recipe"}, {"__name__": "recipe"}
    exec(source, first)
    exec(source, second)
    register("mine")(first["Net"])
    assert register("mine")(second["Net"]) is second["Net"] is backbones._NETWORKS["mine"].create
    register("deep")(partial(first["Net"], depth=2))
    register("deep")(partial(second["Net"], depth=2))
    with pytest.raises(ValueError, match="named 'deep' already"):
        register("deep")(partial(second["Net"], depth=3))


@pytest.mark.parametrize("name", ["small", "iresnet50", "vit_b"])
def test_a_name_of_the_project_is_taken(name):
    with pytest.raises(ValueError, match=f"there is a backbone named {name!r} already: register yours under another name"):
        register(name)(flat)


def test_what_cannot_be_called_or_is_no_network():
    with pytest.raises(ValueError, match="backbone 'sized' must take width: it is called with width= and image_size="):
        register("sized")(lambda image_size: nn.Flatten())
    with pytest.raises(ValueError, match='put @register\\("NAME"\\) above flat'):
        register(flat)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backbone 'needy' asks for depth, which nothing gives it: give it a default"):
        register("needy")(lambda width, image_size, depth: nn.Flatten())
    register("list")(lambda width, image_size: [nn.Flatten()])
    with pytest.raises(ValueError, match=r"backbone 'list' is a list, but must be a torch\.nn\.Module"):
        build(BackboneConfig("list"), 8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            BackboneConfig("small", drop_path=0.1),
            "'small' has no drop_path, which is 0.1: leave it at 0.0 .those that have it: vit_t, vit_s,",
        ),
        (BackboneConfig("iresnet50", mask_ratio=0.1), "'iresnet50' has no mask_ratio"),
        (BackboneConfig("iresnet50", float32_attention=True), "no float32_attention, which is True: leave it at False"),
        (BackboneConfig("mobilefacenet", checkpoint_activations=True), "has no checkpoint_activations.* iresnet18, .*vit_l"),
        (BackboneConfig("mobilefacenet", dropout=0.1), "'mobilefacenet' has no dropout"),
        (BackboneConfig("vit_t", dropout=0.1), "'vit_t' has no dropout"),
        (BackboneConfig("vit_t", drop_path=1.0), "the drop_path of backbone 'vit_t' is 1.0, but must be at least 0 and below 1"),
        (BackboneConfig("vit_t", mask_ratio=-0.1), "the mask_ratio of backbone 'vit_t' is -0.1"),
        (BackboneConfig("vit_tt"), "no backbone named 'vit_tt': did you mean 'vit_t'"),
        (BackboneConfig("mobilfacenet"), "did you mean 'mobilefacenet'"),
    ],
)
def test_options_that_a_network_lacks_or_cannot_have(config, message):
    with pytest.raises(ValueError, match=message) as raised:
        build(config, 112)
    assert "\n" not in str(raised.value)


def test_a_ratio_that_would_leave_no_token_is_refused():
    with pytest.raises(ValueError, match="leaves no patch"):
        build(BackboneConfig("vit_t", mask_ratio=0.9), 18)
