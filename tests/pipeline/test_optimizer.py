"""Rates and weight decay per part of the backbone, in every engine; which layers compute as in evaluation when they are frozen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from pipeline.backbones import BackboneConfig, build, layers_of
from pipeline.engine import EngineConfig
from pipeline.engine.optimizer import groups
from pipeline.engine.parameters import freeze
from pipeline.overrides import override
from pipeline.resolve import resolve
from pipeline.schedule import OptimizerConfig
from tests.pipeline.test_engine import steps

PLAIN = OptimizerConfig(lr=0.1, momentum=0.0, weight_decay=0.0, clip=0.0)
PARTS = {"lr_factors": (("stages.0.shortcut", 4.0), ("stages.[01]", 0.5)), "layer_decay": 0.5, "no_decay": ("*.bias", "features")}


def small():
    torch.manual_seed(0)
    return build(BackboneConfig("small", width=8), 32)


def expected_factor(name):
    given = 4.0 if name.startswith("stages.0.shortcut") else 0.5 if name.startswith(("stages.0", "stages.1")) else 1.0
    layers = layers_of(small())
    return given * 0.5 ** (max(layers.values()) - layers[name])


def test_groups():
    module = small()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    made = groups(replace(PLAIN, weight_decay=0.1, **PARTS), module)
    assert sorted(names[id(p)] for group in made for p in group["params"]) == sorted(names.values())
    for group in made:
        for name in (names[id(p)] for p in group["params"]):
            assert group["factor"] == expected_factor(name)
            assert group["weight_decay"] == (0.0 if name.endswith(".bias") or name.startswith("features") else 0.1)
    assert len(groups(PLAIN, module)) == 1  # nothing asked for: one group, as ever


@pytest.mark.parametrize("engine", [EngineConfig("ddp"), EngineConfig("deepspeed"), EngineConfig("deepspeed", zero_stage=2)])
def test_every_engine_keeps_the_factors(ranks, engine):
    """Movements of a step without momentum."""
    engine = replace(engine, precision="float32")
    plain, apart = (ranks(2).run(steps, engine, 1, optimizer)[0][0] for optimizer in (PLAIN, replace(PLAIN, **PARTS)))
    for name, first in small().named_parameters():
        moved, expected = apart[f"backbone.{name}"] - first, expected_factor(name) * (plain[f"backbone.{name}"] - first)
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_the_head_moves_at_the_full_rate():
    for name in ("iresnet18", "small", "vit_t"):
        module = build(BackboneConfig(name, width=8), 112 if name == "vit_t" else 32)
        factors = {group["factor"] for group in groups(replace(PLAIN, layer_decay=0.9), module)}
        assert max(factors) == 1.0 and len(factors) == max(layers_of(module).values()) + 1


def test_fields_as_texts():
    config = resolve("dogs_small", ['optimizer.lr_factors=[["fc", 10]]', "optimizer.frozen=stem,stages.0", "optimizer.no_decay=*.bias"])
    assert config.optimizer.lr_factors == (("fc", 10),) and config.optimizer.frozen == ("stem", "stages.0")
    for text, sentence in (
        ("lr_factors=[['fc']]", r"holds \('fc',\), but must hold pairs of a name and a factor"),
        ("lr_factors=[['fc', 0]]", "gives 'fc' the factor 0, but it must be a positive number"),
        ("layer_decay=1.5", r"layer_decay is 1\.5, but must be above 0 and at most 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            override(config, [f"optimizer.{text}"])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(3))
        self.stem = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
        self.norm = nn.BatchNorm1d(3)


@pytest.mark.parametrize(
    ("patterns", "in_eval"),
    [
        (("stem",), {"stem", "stem.0", "stem.1", "stem.2"}),
        (("stem.1.weight",), set()),  # its statistics go on
        (("*.weight", "*.bias"), {"stem.0", "stem.1", "norm"}),  # all that these layers have, but no dropout
        (("embedding",), set()),  # the network itself does not
        (("*",), {"", "stem", "stem.0", "stem.1", "stem.2", "norm"}),
    ],
)
def test_layers_that_compute_as_in_evaluation(patterns, in_eval):
    net = Net()
    freeze(net, patterns)
    assert {name for name, part in net.named_modules() if not part.training} == in_eval


def test_a_name_is_not_the_beginning_of_another():
    net = nn.Sequential(*(nn.Linear(1, 1) for _ in range(12)))
    freeze(net, ("1",))
    assert [name for name, parameter in net.named_parameters() if not parameter.requires_grad] == ["1.weight", "1.bias"]
