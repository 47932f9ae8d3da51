"""The primitive against a dense float64 computation, finite differences and its own two kernels, in one process."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from partial_fc import (
    Columns,
    LogSumExp,
    Map,
    SoftplusSum,
    TopK,
    of_bank,
    of_classes,
    of_sampled,
    of_samples,
    similarity_statistics,
)
from partial_fc.columns import Mask, Placement
from partial_fc.device_policy import CPU, forced
from tests.policies import POLICIES


def make(batch, classes, width, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, width, generator=generator, dtype=dtype) * 3
    prototypes = torch.randn(classes, width, generator=generator, dtype=dtype) * 0.1
    labels = torch.randint(0, classes, (batch,), generator=generator)
    return features, prototypes, labels


def dense(features, prototypes, labels, scale, bias=None):
    """(target cosine, non-target log-sum-exp) written with the B x C matrix."""
    cosines = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(prototypes).T
    logits = cosines * (scale[:, None] if isinstance(scale, torch.Tensor) else scale)
    if bias is not None:
        logits = logits + bias
    logits = logits.scatter(1, labels[:, None], -torch.inf)
    return cosines.gather(1, labels[:, None])[:, 0], torch.logsumexp(logits, dim=1)


def gradients(function, inputs, weights):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    outputs = function(*inputs)
    value = sum((weight * output).sum() for weight, output in zip(weights, outputs, strict=True))
    return outputs, torch.autograd.grad(value, inputs)


@pytest.mark.parametrize(("kernel", "policy"), [("reference", "cpu"), ("chunked", "cpu"), ("chunked", "gpu")])
@pytest.mark.parametrize("scale", [1.0, 64.0, 200.0, "vector"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("batch", "classes", "width"), [(1, 2, 1), (7, 13, 5), (33, 1001, 17), (64, 256, 32), (16, 700, 32), (5, 257, 8)])
def test_values_and_gradients_equal_dense_float64(kernel, policy, scale, with_bias, batch, classes, width):
    features, prototypes, labels = make(batch, classes, width)
    inputs = [features, prototypes]
    if scale == "vector":
        inputs.append(torch.linspace(0.5, 90.0, batch, dtype=torch.float64))
    if with_bias:
        inputs.append(torch.linspace(-3.0, 2.0, classes, dtype=torch.float64))

    def ours(x, w, *rest):
        rest = list(rest)
        by_row = rest.pop(0) if scale == "vector" else scale
        statistics = similarity_statistics(
            x, of_classes(w, labels, bias_S=rest[0] if with_bias else None), LogSumExp(), scale=by_row, kernel=kernel
        )
        return statistics.target_B, statistics.non_target_B

    def oracle(x, w, *rest):
        rest = list(rest)
        by_row = rest.pop(0) if scale == "vector" else scale
        return dense(x, w, labels, by_row, rest[0] if with_bias else None)

    weights = [torch.linspace(0.3, -1.0, batch, dtype=torch.float64), torch.linspace(-0.2, 0.9, batch, dtype=torch.float64)]
    with forced(POLICIES[policy]):
        values, slopes = gradients(ours, inputs, weights)
    exact_values, exact_slopes = gradients(oracle, inputs, weights)
    for value, exact in zip([*values, *slopes], [*exact_values, *exact_slopes], strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 600), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([3.0, 64.0, 100.0]))
def test_chunked_equals_reference_at_any_size(batch, classes, width, seed, scale):
    features, prototypes, labels = make(batch, classes, width, seed=seed)
    weights = [torch.randn(batch, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)] * 2
    results = []
    with forced(POLICIES["cpu"]):
        for kernel in ("reference", "chunked"):

            def statistics(x, w, kernel=kernel):
                target, non_target = similarity_statistics(x, of_classes(w, labels), LogSumExp(), scale=scale, kernel=kernel)[:2]
                return target, non_target.clamp(min=-1e6)  # one class alone has -inf

            results.append(gradients(statistics, [features, prototypes], weights))
    for value, exact in zip([*results[1][0], *results[1][1]], [*results[0][0], *results[0][1]], strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-10)


def test_finite_differences():
    features, prototypes, labels = make(3, 7, 4)
    bias = torch.zeros(7, dtype=torch.float64)

    def value(x, w, s, b):
        return similarity_statistics(x, of_classes(w, labels, bias_S=b), LogSumExp(), scale=s)[:2]

    inputs = [features, prototypes, torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64), bias]
    assert torch.autograd.gradcheck(value, [tensor.requires_grad_() for tensor in inputs], eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [64.0, 100.0])
def test_one_class_has_zero_gradients_not_nan(scale):
    features = torch.randn(4, 8, requires_grad=True)
    prototypes = torch.randn(1, 8, requires_grad=True)
    statistics = similarity_statistics(features, of_classes(prototypes, torch.zeros(4, dtype=torch.int64)), LogSumExp(), scale=scale)
    assert statistics.non_target_B.tolist() == [-float("inf")] * 4
    torch.nn.functional.softplus(statistics.non_target_B - scale * statistics.target_B).mean().backward()
    assert features.grad.abs().max() == 0 and prototypes.grad.abs().max() == 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_finite_when_perfectly_right_and_perfectly_wrong(sign):
    prototypes = torch.eye(16).requires_grad_()
    features = (sign * torch.eye(16)).requires_grad_()
    statistics = similarity_statistics(features, of_classes(prototypes, torch.arange(16)), LogSumExp(), scale=64.0)
    torch.nn.functional.softplus(statistics.non_target_B - 64 * (statistics.target_B - 0.4)).mean().backward()
    assert torch.isfinite(features.grad).all() and torch.isfinite(prototypes.grad).all()


def test_the_hardest_non_target():
    features, prototypes, labels = make(9, 700, 6)
    cosines = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(prototypes).T
    exact = cosines.scatter(1, labels[:, None], -2).amax(dim=1)
    target, hardest, *_ = similarity_statistics(features, of_classes(prototypes, labels), TopK(), scale=1.0)
    torch.testing.assert_close(hardest[:, 0], exact)
    torch.testing.assert_close(target, cosines.gather(1, labels[:, None])[:, 0])


class LargestTensor(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


def test_no_tensor_of_size_batch_by_classes_is_ever_made():
    features, prototypes, labels = make(64, 20_000, 16, dtype=torch.float32)
    features.requires_grad_(), prototypes.requires_grad_()
    with forced(replace(CPU, tile_bytes=64 * 512 * 4)), LargestTensor() as seen:
        statistics = similarity_statistics(features, of_classes(prototypes, labels), LogSumExp(), scale=64.0)
        (statistics.non_target_B - statistics.target_B).mean().backward()
    assert seen.bytes == 4 * prototypes.numel()  # the gradient of the prototypes; B x C would be four times as large


@pytest.mark.parametrize(
    ("change", "sentence"), [({"kernel": "cuda"}, "kernel 'cuda' is unknown"), ({"width": 3}, "features have width 3")]
)
def test_bad_input_ends_in_a_sentence(change, sentence):
    features, prototypes, labels = make(4, 5, change.get("width", 8))
    prototypes = torch.randn(5, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=sentence):
        similarity_statistics(features, of_classes(prototypes, labels), LogSumExp(), scale=64.0, kernel=change.get("kernel", "chunked"))


def test_few_parameters():
    """What a stranger must learn at once: at most 10 parameters, and 7 of what it takes."""
    assert len(inspect.signature(similarity_statistics).parameters) <= 10
    makers = [of_classes, of_sampled, of_samples, of_bank, Columns, Mask, Placement, Map, LogSumExp, SoftplusSum, TopK]
    assert max(len(inspect.signature(maker).parameters) for maker in makers) <= 7
