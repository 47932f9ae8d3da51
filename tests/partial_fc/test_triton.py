"""The Triton kernel against the dense float64 computation of test_kernels.py, in float32 through Triton's interpreter: it runs on any
machine, but its bfloat16 products are wrong. test_triton_on_gpu.py has them."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from partial_fc import LogSumExp, TopK, of_classes, similarity_statistics
from partial_fc.columns import Mask
from partial_fc.device_policy import forced
from partial_fc.kernels import NeededGradients, Problem, chunked, reference, triton_kernel
from partial_fc.prototype_sources import AllRows, SampledRows
from partial_fc.statistics import softplus
from tests.partial_fc import test_kernels as kernels
from tests.partial_fc.test_similarity import LargestTensor
from tests.partial_fc.test_statistics import HingeSum
from tests.policies import POLICIES

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in test_in_the_interpreter")
OPTIONS = {name: option for name, option in kernels.OPTIONS.items() if "map" not in option}
SHAPES = [(1, 1, 1), (6, 1, 4), (7, 13, 5), (17, 65, 16), (5, 257, 18)]  # batch, classes, width; blocks are 16 x 64 x 16


@pytest.mark.skipif(IS_INTERPRETED or importlib.util.find_spec("triton") is None, reason="needs the package triton")
def test_in_the_interpreter():
    """Triton is interpreted only where this was asked for before its first import: in a process of its own."""
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(run, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def small_chunks(monkeypatch):
    for kind in ("UNITS", "WEIGHTS", "PARTIAL"):
        monkeypatch.setattr(triton_kernel, f"{kind}_BYTES", 1)  # 256 classes, and one chunk of partial sums
    with forced(POLICIES["gpu"]):
        yield


def single(case, device="cpu"):
    """A case in float32."""

    def moved(value):
        return value.to(device, torch.float32 if value.is_floating_point() else value.dtype)

    return {key: [moved(item) for item in value] if isinstance(value, list) else moved(value) for key, value in case.items()}


def answers(case, kernel, option, dtype="float32"):
    """(outputs, gradients)."""

    def ours(x, w, scale, bias, threshold):
        statistic = kernels.statistic_of(option.get("reduction", "log_sum_exp"), threshold)
        columns = kernels.columns_of(case, w, option, bias)
        return similarity_statistics(x, columns, statistic, scale=scale, dtype=dtype, kernel=kernel)[:2]

    chosen = (option.get("vector", False), option.get("bias", False), option.get("threshold", False))
    outputs, slopes = kernels.gradients(case, ours, *chosen)
    return [output.detach().double().cpu() for output in outputs], [slope.double().cpu() for slope in slopes]


def errors(found, exact):
    """Largest of outputs, entry by entry relative to 1 + their size, and of gradients, relative to 0.1 + their norm: some are 0."""
    outputs = [float(((a - b).abs() / (1 + b.abs())).detach().nan_to_num().max()) for a, b in zip(found[0], exact[0], strict=True)]
    return max(outputs), max(float(((a - b).norm() / (0.1 + b.norm())).detach()) for a, b in zip(found[1], exact[1], strict=True))


def assert_close(found, exact, outputs, slopes):
    for output, expected in zip(found[0], exact[0], strict=True):
        assert torch.equal(torch.isfinite(output), torch.isfinite(expected))
    of_outputs, of_slopes = errors(found, exact)
    assert of_outputs <= outputs and of_slopes <= slopes, (of_outputs, of_slopes)


@interpreted
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32(option, shape, small_chunks):
    case = kernels.make(*shape)
    exact = kernels.both(case, "reference", OPTIONS[option])[1]
    of_dense = errors(answers(single(case), "reference", OPTIONS[option]), exact)
    assert_close(answers(single(case), "triton", OPTIONS[option]), exact, 2 * of_dense[0] + 1e-6, 2 * of_dense[1] + 2e-6)


@interpreted
@pytest.mark.parametrize("option", ["included and bounded bias", "softplus", "bias"])
def test_several_chunks_and_blocks(option, small_chunks):
    case = kernels.make(33, 600, 33)
    exact = kernels.both(case, "reference", OPTIONS[option])[1]
    assert_close(answers(single(case), "triton", OPTIONS[option]), exact, 1e-5, 1e-5)


@interpreted
@pytest.mark.parametrize("option", ["plain", "vector scale", "softplus"])
def test_targets_of_other_ranks_are_masked_nowhere(option, small_chunks):
    case = kernels.make(20, 290, 7)
    case["columns"] = case["labels"].where(torch.arange(20) % 3 > 0, -1).where(torch.arange(20) % 3 > 1, 2**32 + 5)
    exact = answers(case, "reference", OPTIONS[option])
    assert_close(answers(single(case), "triton", OPTIONS[option]), exact, 1e-5, 1e-5)


@interpreted
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_top_k(shape, k, small_chunks):
    case = kernels.make(*shape)
    results = []
    for kernel, asked in (("reference", case), ("triton", single(case))):
        inputs = [asked[name].clone().requires_grad_() for name in ("features", "prototypes")]
        statistics = similarity_statistics(inputs[0], of_classes(inputs[1], asked["labels"]), TopK(k), scale=1.0, kernel=kernel)
        value = (statistics.non_target_B * torch.linspace(-1, 2, k)).sum() + (statistics.target_B**2).sum()
        results.append((statistics, torch.autograd.grad(value, inputs)))
    (exact, exact_slopes), (found, slopes) = results
    torch.testing.assert_close(found.non_target_B.double(), exact.non_target_B, rtol=1e-5, atol=1e-6)
    if shape[2] > 1:  # no ties
        assert torch.equal(found.classes_Bk, exact.classes_Bk)
        for slope, expected in zip(slopes, exact_slopes, strict=True):
            torch.testing.assert_close(slope.double(), expected, rtol=1e-4, atol=1e-5)


def converging(own, wrong, device="cpu"):
    """Samples made of their own prototype, a wrong one and noise."""
    generator = torch.Generator().manual_seed(1)
    classes, width = (600, 64) if device == "cpu" else (4000, 256)
    prototypes = torch.randn(classes, width, generator=generator) * 0.01
    labels = torch.randint(0, classes, (24,), generator=generator)
    units, noise = functional.normalize(prototypes), functional.normalize(torch.randn(24, width, generator=generator))
    features = own * units[labels] + wrong * units[(labels + 7) % classes] + math.sqrt(1 - own**2 - wrong**2) * noise
    return features.to(device), prototypes.to(device), labels.to(device)


def relative_errors(features, prototypes, labels, dtype, scale=64.0):
    """Of the gradients of a CosFace loss by features and prototypes."""
    found = []
    for kind, kernel, number in ((dtype, "triton", torch.float32), ("float32", "reference", torch.float64)):
        inputs = [features.to(number).requires_grad_(), prototypes.to(number).requires_grad_()]
        statistics = similarity_statistics(inputs[0], of_classes(inputs[1], labels), LogSumExp(), scale=scale, dtype=kind, kernel=kernel)
        loss = softplus(statistics.non_target_B - scale * (statistics.target_B - 0.4)).mean()
        found.append([slope.double() for slope in torch.autograd.grad(loss, inputs)])
    return [float((slope - exact).norm() / exact.norm()) for slope, exact in zip(*found, strict=True)]


STAGES = [(0.25, 0.0), (0.93, 0.0), (0.85, 0.45)]  # shares of the own and of a wrong prototype


@interpreted
@pytest.mark.parametrize(("own", "wrong"), STAGES)
def test_gradients_from_first_to_last_step(own, wrong):
    assert max(relative_errors(*converging(own, wrong), "float32")) < 1e-4


@interpreted
def test_operands_may_be_rounded_while_all_else_is_float64(small_chunks):
    """The largest non-target comes from rows in the precision of the inputs, as where operands are bfloat16."""
    case = kernels.make(9, 300, 5)
    features, prototypes, labels = case["features"], case["prototypes"], case["labels"]
    labels[0], prototypes[7] = 3, features[0] / 7  # one that dominates
    columns = of_classes(prototypes, labels)
    problem = Problem(functional.normalize(features) * 60, columns, LogSumExp(), dtype=torch.float32)
    rows, exact = (kernel.forward(problem, NeededGradients()) for kernel in (triton_kernel, reference))
    assert rows.exact_columns_B[0] == 7 and rows.sum_B.dtype is torch.float64
    torch.testing.assert_close(rows.sum_B, exact.sum_B, rtol=1e-5, atol=0)
    torch.testing.assert_close(rows.sum_B[0], exact.sum_B[0], rtol=2e-7, atol=0)


@interpreted
@pytest.mark.parametrize("reduction", ["log_sum_exp", "softplus_sum", "top_k"])
def test_rows_without_direction_have_cosine_0_and_no_gradient(reduction):
    kernels.test_rows_without_direction_have_cosine_0_and_no_gradient("triton", reduction)


@interpreted
def test_an_empty_shard_has_no_part():
    prototypes, features = torch.empty(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    for reduction in ("log_sum_exp", "softplus_sum", "top_k"):
        columns, statistic = of_classes(prototypes, torch.zeros(5, dtype=torch.int64)), kernels.statistic_of(reduction)
        statistics = similarity_statistics(features, columns, statistic, scale=4.0, kernel="triton")
        (statistics.target_B.sum() + statistics.non_target_B.clamp(min=-9).sum()).backward()
        assert prototypes.grad.shape == (0, 4) and features.grad.abs().max() == 0


@interpreted
def test_sampled_rows(small_chunks):
    case, rows = single(kernels.make(7, 300, 6)), torch.randperm(300)[:270]
    columns = torch.where(rows == case["labels"][:, None], torch.arange(270), -1).amax(dim=1)
    slopes = []
    for kernel in ("reference", "triton"):
        prototypes = case["prototypes"].clone().requires_grad_()
        source = SampledRows(prototypes, rows, torch.ones(270, dtype=torch.bool))
        sampled = of_classes(source, case["labels"])._replace(targets_B=columns)
        statistics = similarity_statistics(case["features"], sampled, LogSumExp(), scale=9.0, kernel=kernel)
        (statistics.non_target_B.sum() - statistics.target_B.sum()).backward()
        slopes.append(prototypes.grad.to_dense())
    torch.testing.assert_close(*slopes)


class Memory(AllRows):
    """Notes whether each gradient was computed where it lies."""

    def collector(self, memory=None):
        collector = super().collector(memory)
        store = collector.store
        self.in_place = []

        def noted(rows, gradient_nD):
            self.in_place.append(gradient_nD.data_ptr() == collector.memory_nD[rows].data_ptr())
            store(rows, gradient_nD)

        collector.store = noted
        return collector


@interpreted
@pytest.mark.parametrize(("storage", "in_place"), [(torch.float32, True), (torch.bfloat16, False)])
def test_gradients_are_computed_where_they_lie_unless_that_is_narrower(storage, in_place, small_chunks):
    case, slopes = single(kernels.make(7, 600, 6)), []
    for kernel in ("reference", "triton"):
        prototypes = case["prototypes"].to(storage).requires_grad_()
        source = Memory(prototypes)
        statistics = similarity_statistics(
            case["features"], of_classes(source, case["labels"]), LogSumExp(), scale=9.0, dtype="float32", kernel=kernel
        )
        (statistics.non_target_B.sum() - statistics.target_B.sum()).backward()
        slopes.append(prototypes.grad.float())
    assert source.in_place == [in_place] * 3
    torch.testing.assert_close(*slopes, **({} if in_place else {"rtol": 2**-7, "atol": 1e-4}))


@interpreted
@pytest.mark.parametrize("shifts", [False, True])
def test_ranks_may_differ_in_their_kernel(shifts, small_chunks):
    """As where one machine cannot launch: what a rank sends has the same form and means the same."""
    case = single(kernels.make(7, 600, 6))
    problem = Problem(
        functional.normalize(case["features"]) * 20, of_classes(case["prototypes"], case["labels"]), LogSumExp(), shifts=shifts
    )
    ours, other = (kernel.forward(problem, NeededGradients()) for kernel in (triton_kernel, chunked))
    for name in ("target_B", "sum_B", "shift_B"):
        assert getattr(ours, name).shape == getattr(other, name).shape and getattr(ours, name).dtype is getattr(other, name).dtype
    torch.testing.assert_close(ours.target_B, other.target_B)
    torch.testing.assert_close(ours.shift_B + ours.sum_B.log(), other.shift_B + other.sum_B.log())
    for found, expected in zip(triton_kernel.top(problem, 1), chunked.top(problem, 1), strict=True):
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found, expected)


@interpreted
def test_strided_inputs():
    case = single(kernels.make(7, 40, 6))
    results = []
    for strided in (False, True):
        inputs = [(case[name].T.contiguous().T if strided else case[name]).requires_grad_() for name in ("features", "prototypes")]
        labels = torch.stack([case["labels"]] * 2, dim=1)[:, 0] if strided else case["labels"]
        columns = of_classes(inputs[1], labels)._replace(targets_B=labels, mask=Mask(labels=(labels, torch.arange(80)[::2] // 2)))
        statistics = similarity_statistics(inputs[0], columns, LogSumExp(), scale=9.0, kernel="triton")
        results.append(torch.autograd.grad(statistics.non_target_B.sum(), inputs))
    torch.testing.assert_close(*results)


@interpreted
def test_no_tensor_of_size_batch_by_classes_is_ever_made(small_chunks):
    inputs = [torch.randn(32, 4, requires_grad=True), torch.randn(600, 4, requires_grad=True)]
    with LargestTensor() as seen:
        statistics = similarity_statistics(inputs[0], of_classes(inputs[1], torch.arange(32)), LogSumExp(), scale=64.0, kernel="triton")
        (statistics.non_target_B - statistics.target_B).mean().backward()
    assert seen.bytes <= 32 * 256 * 4


@interpreted
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"map": kernels.SQUARED}, "computes no maps: choose kernel 'auto'"),
        ({"statistic": HingeSum()}, "has no terms of HingeSum: choose kernel 'auto'"),
        ({"features": torch.ones(3, 2, dtype=torch.float64)}, "multiplies in float32 or bfloat16, but was asked for torch.float64"),
    ],
)
def test_what_it_cannot_do_ends_in_a_sentence(options, sentence):
    inputs = {"features": torch.ones(3, 2), "prototypes": torch.ones(4, 2), "labels": torch.zeros(3, dtype=torch.int64)} | options
    with pytest.raises(ValueError, match=f"kernel 'triton' {sentence}"):
        columns = of_classes(inputs.pop("prototypes"), inputs.pop("labels"))
        statistic = inputs.pop("statistic", LogSumExp())
        similarity_statistics(inputs.pop("features"), columns, statistic, scale=1.0, kernel="triton", **inputs)


@pytest.mark.skipif(IS_INTERPRETED, reason="about a machine that does not interpret")
@pytest.mark.parametrize(
    ("installed", "sentence"), [(True, "needs a GPU, but the features are on cpu"), (False, "needs the package triton")]
)
def test_without_a_gpu_or_triton_it_refuses_and_auto_takes_another(installed, sentence, monkeypatch):
    monkeypatch.setattr(triton_kernel, "_is_installed", lambda: installed)
    inputs = torch.ones(3, 2), of_classes(torch.ones(4, 2), torch.zeros(3, dtype=torch.int64)), LogSumExp()
    with pytest.raises(ValueError, match=f"kernel 'triton' {sentence}"):
        similarity_statistics(*inputs, scale=1.0, kernel="triton")
    similarity_statistics(*inputs, scale=1.0, dtype="bfloat16", kernel="auto")
