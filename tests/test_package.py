"""What the package says of itself: one version, types that ship, and the `protoshard` program."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import pipeline

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_the_version_is_that_of_the_project_and_of_the_citation():
    (version,) = re.findall(r'^version = "(.*)"', PYPROJECT, re.MULTILINE)
    assert pipeline.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("room", ["partial_fc", "dali_loaders", "pipeline", "launch", "benchmarks"])
def test_a_room_ships_its_types(room):
    assert (ROOT / room / "py.typed").exists()


def test_the_program_has_the_commands_of_all_rooms(capsys):
    (module, function) = re.findall(r'^protoshard = "(.*):(.*)"', PYPROJECT, re.MULTILINE)[0]
    with pytest.raises(SystemExit):
        getattr(importlib.import_module(module), function)(["--help"])
    shown = capsys.readouterr().out
    assert all(f"    {command} " in shown for command in ("train", "eval", "data", "config", "import", "plan", "bench"))
