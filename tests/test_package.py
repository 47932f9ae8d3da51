"""What the package says of itself and what a plain install gives: a version, types, the classifier, and the `protoshard` program."""

from __future__ import annotations

import json
import pydoc
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import partial_fc
import pipeline
from launch import multinode
from pipeline.cli import main

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PACKAGED = ("partial_fc", "dali_loaders", "pipeline")

# Runs commands where nothing is installed but torch and numpy: `None` in sys.modules is a package that is not there.
PLAIN = """
import contextlib, io, json, sys
sys.modules.update(dict.fromkeys(sys.argv[2].split(",")))
sys.path.insert(0, sys.argv[1])
from pipeline.cli import main
results = []
for command in sys.argv[3:]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            code = main(command.split())
        except SystemExit as end:
            code = end.code
    results.append([code, error.getvalue()])
import torch
from partial_fc import PartialFC, RowSGD, __file__, __version__, losses
classifier = PartialFC(5, width=4, loss=losses.build("cosface", scale=8.0), sample_rate=0.5)
optimizer = RowSGD(classifier, lr=0.1)
features = torch.randn(6, 4, requires_grad=True)
for _ in range(3):
    loss = classifier(features, torch.arange(6) % 5)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(json.dumps({"results": results, "loss": loss.item(), "version": __version__, "file": __file__}))
"""
HIDDEN = "cv2,matplotlib,nvidia,deepspeed,ray,tensorboard,tqdm,wandb,psutil,safetensors,triton,mxnet,accelerate,lightning,benchmarks,launch"
SENTENCE = "{}: {} is not installed; it comes with the extra train: pip install 'protoshard[train]'\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The project's wheel, unpacked as pip does. It is built from a copy, because a build leaves files behind."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for folder in (*PACKAGED, "launch", "benchmarks", "tests", "examples"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.csv"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(built)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, timeout=120)
    (file,) = built.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(built / "site")
    return built / "site"


def test_the_version_is_that_of_the_project_and_of_the_citation():
    (version,) = re.findall(r'^version = "(.*)"', PYPROJECT, re.MULTILINE)
    assert partial_fc.__version__ == pipeline.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_a_wheel_holds_three_packages_and_their_types(wheel):
    assert {path.name for path in wheel.iterdir() if path.suffix != ".dist-info"} == set(PACKAGED)
    for room in PACKAGED:
        shipped = {path.relative_to(wheel) for path in (wheel / room).rglob("*.py")}
        assert shipped == {path.relative_to(ROOT) for path in (ROOT / room).rglob("*.py")}
        assert (wheel / room / "py.typed").exists()
    (information,) = wheel.glob("*.dist-info")
    assert (information / "entry_points.txt").read_text().split() == ["[console_scripts]", "protoshard", "=", "pipeline.cli:program"]
    required = re.findall(r"^Requires-Dist: (?!.*extra ==)([\w-]+)", (information / "METADATA").read_text(), re.MULTILINE)
    assert sorted(required) == ["numpy", "torch"]


def test_with_torch_and_numpy_alone_the_classifier_trains_and_commands_name_the_extra(wheel, tmp_path):
    expected = {
        "--help": None,
        "config faces_small": None,
        "plan --identities 1000 --hardware h100-80gb": None,
        "train faces_small --ranks 2": "cv2",
        "data faces faces.tar": "cv2",
        "data check faces.tar": "cv2",
        "eval run --data faces.tar --figure roc.png": "matplotlib.axes",
    }
    command = [sys.executable, "-c", PLAIN, str(wheel), HIDDEN, *expected]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    results = [[code, re.sub(r"^[-0-9]{10} [:0-9]{8}  starting\n", "", text)] for code, text in found["results"]]
    assert results == [[0, ""] if package is None else [2, SENTENCE.format("protoshard", package)] for package in expected.values()]
    assert found["file"].startswith(str(wheel)) and found["version"] == partial_fc.__version__ and found["loss"] > 0


def test_multinode_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert multinode.main(["faces_small"]) == 2
    assert capsys.readouterr().err == SENTENCE.format("multinode.sh", "ray")


def test_the_program_has_the_commands_of_all_rooms_in_a_checkout(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"    {command} " in shown for command in ("train", "eval", "data", "config", "import", "plan", "bench"))


def test_help_on_the_classifier_fits_two_screens():
    """Of 60 lines and a little, up to what every torch module has."""
    shown = pydoc.plain(pydoc.render_doc(partial_fc.PartialFC)).partition("Methods inherited from")[0]
    assert len(shown.splitlines()) <= 125
