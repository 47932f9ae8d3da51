"""The Triton kernel on a GPU, float32 and bfloat16, against float64."""

from __future__ import annotations

import pytest
import torch

from partial_fc import TopK, of_classes, similarity_statistics
from tests.partial_fc import test_kernels as kernels
from tests.partial_fc.test_triton import (
    IS_INTERPRETED,
    OPTIONS,
    SHAPES,
    STAGES,
    answers,
    assert_close,
    converging,
    errors,
    relative_errors,
    single,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(IS_INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU"),
]
LARGE = [(130, 1000, 100), (257, 20_001, 512), (64, 300, 1024)]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_float32(option, shape):
    case = kernels.make(*shape)
    exact = kernels.both(case, "reference", OPTIONS[option])[1]
    assert_close(answers(single(case, "cuda"), "triton", OPTIONS[option]), exact, 1e-4, 1e-4)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", LARGE)
def test_bfloat16(option, shape):
    case = kernels.make(*shape)
    exact = kernels.both(case, "reference", OPTIONS[option])[1]
    found, other = (answers(single(case, "cuda"), kernel, OPTIONS[option], "bfloat16") for kernel in ("triton", "chunked"))
    of_other = errors(other, exact)
    assert_close(found, exact, 2 * of_other[0] + 4e-3, 2 * of_other[1] + 4e-3)


@pytest.mark.parametrize(("own", "wrong"), STAGES)
def test_bfloat16_gradients_are_within_a_percent_from_first_to_last_step(own, wrong):
    assert max(relative_errors(*converging(own, wrong, "cuda"), "bfloat16")) < 0.01


def test_two_runs_are_equal_and_auto_is_this_kernel():
    case = single(kernels.make(300, 5000, 128), "cuda")
    runs = [answers(case, kernel, OPTIONS["included"], "bfloat16") for kernel in ("triton", "triton", "auto")]
    for run in runs[1:]:
        for value, first in zip([*run[0], *run[1]], [*runs[0][0], *runs[0][1]], strict=True):
            assert torch.equal(value, first)


def test_top_1():
    case = single(kernels.make(65, 3001, 256), "cuda")
    results = [
        similarity_statistics(
            case["features"], of_classes(case["prototypes"], case["labels"]), TopK(), scale=1.0, dtype=dtype, kernel=kernel
        )
        for dtype, kernel in (("bfloat16", "triton"), ("float32", "triton"), ("float32", "reference"))
    ]
    torch.testing.assert_close(results[1].non_target_B, results[2].non_target_B)
    assert float((results[2].non_target_B - results[0].non_target_B).max()) < 1e-3  # where bfloat16 ranks another class first
