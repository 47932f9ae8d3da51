"""An import by a former name ends in a sentence with the new one; every new name exists."""

from __future__ import annotations

import importlib
import sys
import types

import pytest

import benchmarks
import dali_loaders
import pipeline
from dali_loaders import renamed
from dali_loaders.config import DataConfig

assert benchmarks and dali_loaders and pipeline  # importing them fills the table


@pytest.mark.parametrize("old", list(renamed._MODULES))
def test_a_module_that_has_moved(old):
    new = renamed._MODULES[old]
    importlib.import_module(new)
    sentence = f"^{old} is now {new}: import it from there$"
    with pytest.raises(ImportError, match=sentence):
        importlib.import_module(old)
    package, _, module = old.rpartition(".")
    with pytest.raises(ImportError, match=sentence):
        exec(f"from {package} import {module}")


@pytest.mark.parametrize(
    ("module", "name", "home"),
    [
        ("pipeline.config", "resolve", "pipeline.resolve"),
        ("dali_loaders.packing", "read_identities", "dali_loaders.identities"),
        ("dali_loaders.recordio.records", "IndexedRecordReader", "dali_loaders.recordio.index"),
    ],
)
def test_a_name_that_has_moved(module, name, home):
    assert hasattr(importlib.import_module(home), name)
    with pytest.raises(ImportError, match=f"^{module}.{name} is now {home}.{name}: import it from there$"):
        exec(f"from {module} import {name}")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec(f"from {module} import nothing")


def test_what_recipe_files_import_still_works():
    """As files written before, and those that an earlier `protoshard import insightface` made."""
    found: dict[str, type] = {}
    exec(
        "from dali_loaders.decode import AugmentConfig, DataConfig\n"
        "from pipeline.recipes import find_data\n"
        "from pipeline.config import BackboneConfig, ClassifierConfig, DataConfig as Same, EngineConfig, EvaluationConfig\n"
        "from pipeline.config import CheckpointConfig, OptimizerConfig, RunConfig, TrainConfig\n",
        found,
    )
    assert found["DataConfig"] is found["Same"] is DataConfig


def test_other_imports_are_left_alone(monkeypatch):
    monkeypatch.setitem(renamed._MODULES, "renamed_for_a_test", "elsewhere")
    monkeypatch.setitem(sys.modules, "renamed_for_a_test", types.ModuleType("renamed_for_a_test"))
    importlib.import_module("renamed_for_a_test")  # what exists is found before the table is asked
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("pipeline.nothing")
