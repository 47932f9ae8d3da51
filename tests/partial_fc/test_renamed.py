"""Whoever uses an old name is told the new one."""

from __future__ import annotations

import importlib
import re

import pytest
import torch

from partial_fc import LogSumExp, PartialFC, collectives, losses, renamed, similarity_statistics
from partial_fc.global_batch import RENAMED


@pytest.mark.parametrize("old", renamed.MODULES)
def test_an_old_module_names_the_new_one(old):
    with pytest.raises(ImportError, match=re.escape(f"{old} is now {renamed.MODULES[old]}: import it from there")):
        importlib.import_module(old)
    importlib.import_module(renamed.MODULES[old])


def test_an_unknown_module_is_still_unknown():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'partial_fc\.nothing'"):
        importlib.import_module("partial_fc.nothing")


@pytest.mark.parametrize("name", ["replicated", "shared", "summed"])
def test_old_names_in_a_module(name):
    with pytest.raises(ImportError, match=f"partial_fc.collectives.{name} is now (divide_gradient|sum_gradient|sum_values)"):
        getattr(collectives, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = collectives.nothing


def test_old_checks_of_losses():
    with pytest.raises(ImportError, match=r"partial_fc\.losses\.check_range is now the annotation of the field"):
        from partial_fc.losses import check_range  # noqa: F401


@pytest.mark.parametrize("name", RENAMED)
def test_old_questions_of_a_loss(name):
    class Asking(type(losses.build("cosface"))):
        def __call__(self, batch):
            return getattr(batch, name)(scale=1.0)

    with pytest.raises(AttributeError, match=f"GlobalBatch.{name} is now {RENAMED[name][:12]}"):
        PartialFC(5, 3, Asking())(torch.randn(2, 3), torch.arange(2))
    assert hasattr(losses.base.GlobalBatch, RENAMED[name].partition("(")[0])


def test_prototypes_in_place_of_columns():
    with pytest.raises(TypeError, match=r"of_classes\(prototypes_SD, labels_B\)"):
        similarity_statistics(torch.randn(2, 3), torch.randn(5, 3), LogSumExp(), scale=1.0)


def test_an_unknown_option_of_the_classifier():
    with pytest.raises(TypeError, match="PartialFC has no option 'gather_dtpye': did you mean 'gather_dtype'"):
        PartialFC(5, 3, losses.build("cosface"), gather_dtpye="bfloat16")
    assert PartialFC(5, 3, losses.build("cosface"), gather_dtype="bfloat16").config.gather_dtype == "bfloat16"
