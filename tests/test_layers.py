"""Rooms import downwards only, no modules import in a circle, and the classifier needs nothing but torch and numpy."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.imports import Graph, circles, graph, modules

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("partial_fc", "dali_loaders", "pipeline", "launch", "benchmarks")

# Each room with what it may import: the first two stand on the ground, side by side, and benchmarks on top of all.
BELOW: dict[str, set[str]] = {
    "partial_fc": set(),
    "dali_loaders": set(),
    "pipeline": {"partial_fc", "dali_loaders"},
    "launch": {"pipeline", "partial_fc", "dali_loaders"},
    "benchmarks": {"launch", "pipeline", "partial_fc", "dali_loaders"},
}


@pytest.fixture(scope="module")
def project() -> Graph:
    return graph(modules(ROOT, ROOMS))


def upward(edges: Graph) -> list[str]:
    """ "module:line imports target" for every import of a room that does not lie below the module's own."""
    return [
        f"{module}:{line} imports {target}"
        for module, targets in edges.items()
        for target, line in targets.items()
        if (room := target.partition(".")[0]) in BELOW and room != (own := module.partition(".")[0]) and room not in BELOW[own]
    ]


def test_rooms_import_downwards_only(project):
    """Except that the program has `bench`, and `status` of a job, where it runs from a checkout."""
    known = r"pipeline\.cli:\d+ imports benchmarks\.commands|pipeline\.status_commands:\d+ imports launch\.job_status"
    assert [edge for edge in upward(project) if not re.fullmatch(known, edge)] == []


def test_no_modules_import_in_a_circle(project):
    assert circles(project) == []


def test_the_classifier_needs_only_torch_and_numpy(project):
    """typing_extensions comes with torch, which needs it. Only the kernel that is written in Triton imports triton."""
    known = {"partial_fc", "torch", "numpy", "typing_extensions", *sys.stdlib_module_names}
    foreign = {
        (module, package)
        for module, targets in project.items()
        for package in {target.partition(".")[0] for target in targets} - known
        if module.partition(".")[0] == "partial_fc"
    }
    assert {package for _, package in foreign} <= {"triton"}
    assert {module for module, _ in foreign} <= {"partial_fc.kernels.triton_kernel", "partial_fc.kernels.triton_programs"}


def test_every_package_that_is_imported_is_a_requirement(project):
    """But for what benchmarks measure beside this project where it is installed."""
    required = set(re.findall(r'"([\w-]+)(?:\[[\w,]+\])?[<=>]', (ROOT / "pyproject.toml").read_text()))
    brought = {
        "cv2": "opencv-python-headless",
        "nvidia": "nvidia-dali-cuda130",
        "aiohttp": "ray",
        "typing_extensions": "torch",
        "fsspec": "torch",
        "faiss": "faiss-cpu",
    }
    edges = {module: targets for module, targets in project.items() if not module.startswith("benchmarks")}
    edges |= graph(modules(ROOT, ["examples"]))
    imported = {target.partition(".")[0] for targets in edges.values() for target in targets}
    foreign = imported - {*ROOMS, *sys.stdlib_module_names}
    assert {"torch", "accelerate"} <= foreign and {brought.get(package, package) for package in foreign} <= required


def write(root: Path, files: dict[str, str]) -> Graph:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return graph(modules(root, ROOMS))


@pytest.mark.parametrize(
    "back",
    [
        "import pipeline.one",
        "from pipeline import one",
        "from pipeline.one import name",
        "from . import one",
        "from .one import name",
        "def inside():\n    from pipeline.one import name",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pipeline.one import name",
        "from importlib import import_module\nimport_module('pipeline.one')",
        "import importlib\nfor name in ['one']:\n    importlib.import_module(f'pipeline.{name}')",
    ],
)
def test_a_circle_is_found_however_it_is_written(tmp_path, back):
    edges = write(tmp_path, {"pipeline/__init__.py": "", "pipeline/one.py": "from pipeline import two", "pipeline/two.py": back})
    assert circles(edges) == [["pipeline.one", "pipeline.two"]]
    assert upward(edges) == []


def test_a_circle_through_a_package_is_found(tmp_path):
    files = {"pipeline/__init__.py": "from pipeline.one import a\nb = 1", "pipeline/one.py": "from pipeline import b"}
    assert circles(write(tmp_path, files)) == [["pipeline", "pipeline.one"]]
    files["pipeline/one.py"] = "from pipeline import two"  # a module, which asks nothing of the package's own names
    assert circles(write(tmp_path, files | {"pipeline/two.py": ""})) == []


def test_an_upward_import_is_found(tmp_path):
    files = {
        "pipeline/__init__.py": "",
        "pipeline/plan.py": "import partial_fc\ndef run():\n    from benchmarks.meters import seconds",
        "benchmarks/meters.py": "from pipeline import plan\nfrom launch import hosts",
        "dali_loaders/order.py": "import partial_fc.sampling",
        "launch/hosts.py": "import pipeline",
    }
    assert sorted(upward(write(tmp_path, files))) == [
        "dali_loaders.order:1 imports partial_fc.sampling",
        "pipeline.plan:3 imports benchmarks.meters",
    ]
