"""ONNX files against torch, and by the conventions of InsightFace's ArcFaceONNX (python-package/insightface/model_zoo/arcface_onnx.py)."""

from __future__ import annotations

import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from dali_loaders.extras import missing
from pipeline import backbones
from pipeline.backbones import BackboneConfig
from pipeline.export import load, onnx_file
from pipeline.export.model_folder import export

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def statistics_from_noise(network: nn.Module, size: int) -> nn.Module:
    """Batch statistics of a trained network are not 0 and 1."""
    network.train()
    with torch.no_grad():
        network(torch.rand(16, 3, size, size) * 2 - 1)
    return network.eval()


def written(tmp_path, name: str, size: int) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    network = statistics_from_noise(backbones.build(BackboneConfig(name, width=32), size), size)
    onnx_file.write(network, str(tmp_path / "model.onnx"), size)
    return network, str(tmp_path / "model.onnx")


@pytest.mark.long
@pytest.mark.parametrize("name", ["mobilefacenet", "iresnet50", "vit_t", "ir18"])
def test_cosines_with_torch(tmp_path, name):
    network, path = written(tmp_path, name, 112)
    assert onnx_file.worst_cosine(network, path, 112) >= 1 - 1e-5


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["iresnet18", "iresnet50"])
def test_cosines_with_torch_of_a_thousand_images(tmp_path, name):
    network, path = written(tmp_path, name, 112)
    images = torch.rand(1000, 3, 112, 112) * 2 - 1
    worst = onnx_file.worst_cosine(network, path, 112, images)
    print(f"the smallest cosine is 1 - {1 - worst:.1e}")
    assert worst >= 1 - 1e-5


def test_an_export_says_how_near_it_is(made):
    assert re.fullmatch(r"model\.onnx: smallest cosine with torch (1\.0+|0\.99999\d+), in batches of 1, 7, 64", made.said[0])


def test_a_file_that_gives_other_features_is_refused(tmp_path):
    network, path = written(tmp_path, "small", 32)
    with torch.no_grad():
        next(network.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="other features than the network"):
        onnx_file.worst_cosine(network, path, 32)


def test_a_network_that_cannot_be_followed(tmp_path):
    class Choosing(nn.Module):
        def forward(self, x):
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    with pytest.raises(ValueError, match=r"torch cannot turn this network into ONNX .*export with --no-onnx"):
        onnx_file.write(Choosing(), str(tmp_path / "model.onnx"), 32)


class AsArcFaceONNX:
    """What ArcFaceONNX reads from a file, and does with an image as OpenCV gives it (blue first)."""

    def __init__(self, path: str) -> None:
        first = [node.name for node in onnx.load(path).graph.node[:8]]
        subtracts, multiplies = (any(name.startswith(start) for name in first) for start in (("Sub", "_minus"), ("Mul", "_mul")))
        self.mean, self.std = (0.0, 1.0) if subtracts and multiplies else (127.5, 127.5)
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (self.input,), (self.output,) = self.session.get_inputs(), self.session.get_outputs()
        self.size = tuple(self.input.shape[2:4][::-1])

    def features(self, images: list[np.ndarray]) -> np.ndarray:
        blob = cv2.dnn.blobFromImages(images, 1 / self.std, self.size, (self.mean,) * 3, swapRB=True)
        return self.session.run([self.output.name], {self.input.name: blob})[0]


@pytest.mark.parametrize("name", ["small", *(pytest.param(name, marks=pytest.mark.long) for name in ("iresnet50", "vit_t"))])
def test_insightface_reads_it(tmp_path, name):
    network, path = written(tmp_path, name, 112)
    theirs = AsArcFaceONNX(path)
    height, width = theirs.input.shape[2:]
    assert height == width == 112 and width % 16 == 0  # by which its model_zoo tells recognition from its other models
    assert (theirs.mean, theirs.std, theirs.size) == (127.5, 127.5, (112, 112))
    images = [np.random.default_rng(number).integers(0, 256, (112, 112, 3), np.uint8) for number in range(7)]
    tensor = (torch.from_numpy(np.stack(images)[..., ::-1].copy()).permute(0, 3, 1, 2).float() - 127.5) / 127.5
    with torch.no_grad():
        wanted = network(tensor)
    assert cosine_similarity(torch.from_numpy(theirs.features(images)), wanted).min() >= 1 - 1e-5
    assert theirs.features(images[:1]).shape == (1, 32)
    assert onnx_file.worst_cosine(network, path, 112) >= 1 - 1e-5


def test_no_path_of_this_machine_is_in_it(made):
    content = (Path(made.folder) / "model.onnx").read_bytes()
    assert os.path.dirname(os.path.dirname(torch.__file__)).encode() not in content and b"/pipeline/backbones" not in content
    onnx.checker.check_model(onnx.load(Path(made.folder) / "model.onnx"))


def test_the_mirror_image_is_the_users(made, tmp_path):
    """ONNX and the loaded model agree once both images are added, as the card says."""
    session = onnxruntime.InferenceSession(f"{made.folder}/model.onnx", providers=["CPUExecutionProvider"])
    images = torch.rand(5, 3, 32, 32) * 2 - 1
    features = sum(torch.from_numpy(session.run(None, {"images": each.numpy()})[0]) for each in (images, images.flip(3)))
    assert cosine_similarity(features, load(made.folder)(images)).min() >= 1 - 1e-5


def test_without_the_packages_it_is_left_out_and_said(made, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "onnxscript" else name)
    said: list[str] = []
    export(made.run, str(tmp_path / "out"), say=said.append)
    assert said[0].startswith("model.onnx is left out: onnxscript is not installed; it comes with the extra export")
    with pytest.raises(ValueError, match="onnxscript is not installed"):
        export(made.run, str(tmp_path / "again"), onnx=True)


def test_several_missing_packages_are_said_together():
    assert str(missing("export", "onnx", "onnxscript")).startswith("onnx and onnxscript are not installed; they come with the extra export")
