"""A network of one's own in a module beside a recipe file: trained on 2 ranks, evaluated; and which neighbours a recipe may import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from dali_loaders.faces import FacesConfig, write_faces
from pipeline import backbones
from pipeline.cli import main
from pipeline.resolve import resolve

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width, image_size):
        super().__init__()
        import tiny_layers  # only now
        self.body = tiny_layers.body(width)

    def forward(self, x):
        return self.body(x)
"""
LAYERS = """
from torch import nn

def body(width):
    return nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, width))
"""
RECIPE = """
from dataclasses import replace
from pipeline.backbones import BackboneConfig, register
from pipeline.recipes.small import faces_small
from tiny_network import Net

register("tiny")(Net)

def recipe():
    config = faces_small()
    return replace(config, backbone=BackboneConfig("tiny", width=16), data=replace(config.data, image_size=30))
"""


@pytest.fixture
def clean_imports(monkeypatch, tmp_path):
    """What recipe files bring into this process goes with the test. A library's compiled modules cannot be imported twice, and stay."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(backbones, "_NETWORKS", dict(backbones._NETWORKS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.slow
def test_train_on_two_ranks_and_evaluate(tmp_path, clean_imports, capsys):
    (tmp_path / "mine").mkdir()
    for name, text in (("tiny_network.py", NETWORK), ("tiny_layers.py", LAYERS), ("recipe.py", RECIPE)):
        (tmp_path / "mine" / name).write_text(text)
    write_faces(str(tmp_path / "faces.tar"), FacesConfig(identities=6, images_per_identity=4, size=32), workers=1)
    settings = ["data.train=faces.tar", "evaluation.data=faces.tar", "run.batch=12", "run.epochs=2", "engine.name=ddp", "run.folder=run"]
    command = [sys.executable, "-m", "pipeline.cli", "train", "mine/recipe.py", "--ranks", "2", "--set", *settings]
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and "ranks: 2" in done.stderr, done.stderr
    reached = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["faces/eer"]

    evaluate = ["eval", str(tmp_path / "run"), "--data", str(tmp_path / "faces.tar"), "--json"]
    assert main(evaluate) == 2
    error = capsys.readouterr().err
    assert "has backbone 'tiny', which is none of protoshard's: name the recipe file that registers it: --recipe FILE.py" in error
    assert main([*evaluate, "--recipe", "faces_small"]) == 2 and "faces_small does not register" in capsys.readouterr().err
    with_recipe = [*evaluate, "--recipe", str(tmp_path / "mine" / "recipe.py")]
    assert main(with_recipe) == 0
    assert json.loads(capsys.readouterr().out)["eer"] == pytest.approx(reached, abs=1e-6)

    (tmp_path / "mine" / "tiny_layers.py").write_text(LAYERS.replace("8, 5, 4", "4, 5, 4").replace("Linear(32", "Linear(16"))
    del sys.modules["tiny_layers"]
    assert main(with_recipe) == 2
    error = capsys.readouterr().err
    assert "does not fit backbone 'tiny' as it is now" in error and "body.0.weight" in error


def test_the_example_of_the_docs(tmp_path, clean_imports):
    with open(os.path.join(ROOT, "docs", "backbones.md")) as page:
        (block,) = re.findall(r"```python\n(.*?)```", page.read(), re.DOTALL)
    (tmp_path / "thin.py").write_text(block)
    config = resolve(str(tmp_path / "thin.py"), ["data.image_size=24"])
    assert backbones.build(config.backbone, 24)(torch.randn(2, 3, 24, 24)).shape == (2, 128)
    with pytest.raises(ValueError, match="divisible by 8, not 20"):
        resolve(str(tmp_path / "thin.py"), ["data.image_size=20"])


PLAIN = "from pipeline.recipes.small import faces_small\n{imports}\ndef recipe():\n    return faces_small()\n"


def write(folder, imports: str, **neighbours: str) -> str:
    folder.mkdir(exist_ok=True)
    for name, text in neighbours.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "recipe.py").write_text(PLAIN.format(imports=imports))
    return str(folder / "recipe.py")


def test_a_neighbour_hides_nothing(tmp_path, clean_imports):
    """One that nobody imports, called like a module that Python has not loaded yet."""
    resolve(write(tmp_path / "a", "import a_neighbour", a_neighbour="", this="raise ImportError"))
    sys.modules.pop("this", None)
    import this

    assert not this.__file__.startswith(str(tmp_path))


def test_a_neighbour_that_python_would_not_take_is_refused(tmp_path, clean_imports):
    with pytest.raises(
        ValueError, match=r"recipe\.py imports numpy, but Python takes .* instead of .*/a/numpy\.py: give yours another name"
    ):
        resolve(write(tmp_path / "a", "import numpy", numpy=""))
    with pytest.raises(ValueError, match=r"first_neighbour\.py imports json, but"):
        resolve(write(tmp_path / "b", "import first_neighbour", first_neighbour="from json import x", json="x = 1"))


def test_neighbours_of_the_same_name_beside_two_recipes(tmp_path, clean_imports):
    resolve(write(tmp_path / "a", "import shared_name", shared_name=""))
    with pytest.raises(ValueError, match=r"but Python takes .*/a/shared_name\.py for it instead of .*/b/shared_name\.py"):
        resolve(write(tmp_path / "b", "import shared_name", shared_name=""))


def test_a_neighbour_with_an_error_is_told_as_before(tmp_path, clean_imports):
    with pytest.raises(ValueError, match="cannot be run: SyntaxError"):
        resolve(write(tmp_path / "a", "import broken_neighbour", broken_neighbour="def"))
    with pytest.raises(ValueError, match="cannot be run: ModuleNotFoundError: No module named 'not_there'"):
        resolve(write(tmp_path / "b", "import not_there"))
