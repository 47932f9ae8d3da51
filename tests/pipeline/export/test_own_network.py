"""A network that a recipe file registers: exported and loaded with that file, and refused without it."""

from __future__ import annotations

import sys

import pytest
import torch

from pipeline import backbones
from pipeline.cli import main
from pipeline.export import load
from pipeline.train import train
from tests.pipeline.runs import configuration, faces

RECIPE = """
import torch
from torch import nn
from pipeline.backbones import BackboneConfig, register
from pipeline.recipes.small import faces_small
from dataclasses import replace

@register("half_open")
class HalfOpen(nn.Module):
    def __init__(self, width, image_size):
        super().__init__()
        self.scale = float(torch.linspace(1, 2, 2)[1].item())  # needs numbers, which a tensor without memory has not
        self.register_buffer("shift", torch.full((3, 1, 1), 0.5), persistent=False)  # in no checkpoint
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, width))

    def forward(self, x):
        return self.body(self.scale * x + self.shift)

def recipe():
    return replace(faces_small(), backbone=BackboneConfig("half_open", width=16))
"""


def test_it_is_loaded_by_its_recipe_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(backbones, "_NETWORKS", dict(backbones._NETWORKS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    recipe = str(tmp_path / "mine.py")
    (tmp_path / "mine.py").write_text(RECIPE)
    from pipeline.resolve import resolve

    resolve(recipe)
    train(configuration(faces(str(tmp_path)), str(tmp_path / "run"), 1, backbone="half_open"), "auto")
    del backbones._NETWORKS["half_open"]
    command = ["export", str(tmp_path / "run"), str(tmp_path / "model")]
    assert main(command) == 2 and "--recipe FILE.py" in capsys.readouterr().err
    assert main([*command, "--recipe", recipe]) == 0
    images = torch.rand(2, 3, 32, 32)
    wanted = load(tmp_path / "model")(images)
    del backbones._NETWORKS["half_open"]
    with pytest.raises(ValueError, match="name the recipe file that registers it"):
        load(tmp_path / "model")
    assert torch.equal(load(tmp_path / "model", recipe=recipe)(images), wanted)
