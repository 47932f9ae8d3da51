"""`protoshard bench step` at a size that takes no time, and against a stand-in for arcface_torch's modules, which are no part of this
repository."""

from __future__ import annotations

import csv
import json
import re
import sys

import pytest
import torch
import torch.distributed as dist

from benchmarks.step import Setting
from pipeline.cli import main

TINY = ["--classes", "50", "--batch", "8", "--image-size", "16", "--rounds", "1"]

# The same names and arguments as in arcface_torch, with this project's network and a plain softmax over the cosines.
BACKBONES = """
from pipeline import backbones
def get_model(name, dropout, fp16, num_features):
    return backbones.build(backbones.BackboneConfig("iresnet" + name[1:], num_features), 16)
"""
LOSSES = """
from collections import namedtuple
CombinedMarginLoss = namedtuple("CombinedMarginLoss", "scale m1 m2 m3")
"""
PARTIAL_FC = """
import torch
from torch import distributed, nn
from torch.nn import functional
class PartialFC_V2(nn.Module):
    def __init__(self, margin_loss, embedding_size, num_classes, sample_rate, fp16):
        super().__init__()
        assert distributed.is_initialized()
        self.loss, self.weight = margin_loss, nn.Parameter(torch.zeros(num_classes, embedding_size))
    def forward(self, features, labels):
        cosines = functional.normalize(features.cuda()) @ functional.normalize(self.weight).T
        margins = functional.one_hot(labels.long(), len(self.weight)) * self.loss.m3
        return functional.cross_entropy(self.loss.scale * (cosines - margins), labels)
"""


@pytest.fixture
def peer(tmp_path, monkeypatch):
    folder = tmp_path / "arcface_torch"
    (folder / "backbones").mkdir(parents=True)
    for name, text in (("backbones/__init__", BACKBONES), ("losses", LOSSES), ("partial_fc_v2", PARTIAL_FC)):
        (folder / f"{name}.py").write_text(text)
    yield str(folder)
    for name in ("backbones", "losses", "partial_fc_v2"):
        sys.modules.pop(name, None)


def bench(capsys, path, *more):
    assert main(["bench", "step", *TINY, "--csv", str(path), *more]) == 0
    return capsys.readouterr().out


def test_all_variants_and_the_peer_start_from_the_same_loss(capsys, tmp_path, peer):
    path = tmp_path / "step.csv"
    was_initialized = dist.is_initialized()
    rows = json.loads(bench(capsys, path, "--layout", "nchw", "nhwc", "--peer", peer, "--json"))["rows"]
    assert [row["layout"] for row in rows] == ["nchw", "nhwc"]
    for row in rows:
        assert row["ours_loss"] == pytest.approx(row["peer_loss"], rel=1e-4)
        assert row["ours_s"] > 0 and row["images_per_s"] > 0 and row["peer_dtype"] == "float32"
        low, high = row["peer_over_ours_quartiles"]
        assert 0 < low <= row["peer_over_ours"] <= high
    with open(path, newline="") as file:
        assert [float(row["ours_s"]) for row in csv.DictReader(file)] == [row["ours_s"] for row in rows]
    assert dist.is_initialized() == was_initialized and torch.ones(1).cuda.__name__ == "cuda"  # nothing is left behind
    assert peer not in sys.path


def test_text_without_a_peer_has_the_same_columns(capsys, tmp_path, peer):
    path = tmp_path / "step.csv"
    text = bench(capsys, path, "--peer", peer, "--dtype", "bfloat16")
    first, second = re.search(r"first losses (\S+) and (\S+)", text).groups()
    assert float(first) == pytest.approx(float(second), rel=0.02)
    text = bench(capsys, path)  # the file would be refused if columns differed
    assert "iresnet18 at 16, batch 8, 50 classes" in text and "arcface_torch" not in text


def test_bad_settings_end_in_a_sentence(capsys, tmp_path, peer):
    assert main(["bench", "step", *TINY, "--image-size", "32", "--csv", str(tmp_path / "step.csv"), "--peer", peer]) == 2
    assert "takes images of 112 pixels only" in capsys.readouterr().err
    assert main(["bench", "step", *TINY, "--csv", str(tmp_path / "step.csv"), "--peer", str(tmp_path)]) == 2
    assert "has no backbones/__init__.py: give the folder recognition/arcface_torch" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--batch is 1, but must be at least 2"):
        Setting(batch=1)
    with pytest.raises(ValueError, match="no backbone named 'iresnet19'"):
        Setting(network="iresnet19")
