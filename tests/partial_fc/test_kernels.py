"""One parity suite for all kernels and options of the primitive: values and gradients against a dense float64 computation written here
with the B x C matrix, in one process; sharded over ranks in test_sharded.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from partial_fc import LogSumExp, SoftplusSum, TopK, of_classes, similarity_statistics
from partial_fc.columns import Mask
from partial_fc.device_policy import forced
from partial_fc.losses.reweighted import curriculum
from partial_fc.maps import Map
from partial_fc.prototype_sources import AllRows
from partial_fc.statistics import softplus
from tests.policies import POLICIES

KERNELS = ["reference", "chunked"]
SHAPES = [(1, 1, 1), (1, 7, 3), (6, 1, 4), (7, 13, 5), (33, 700, 17), (16, 256, 32), (16, 700, 32), (5, 257, 8)]  # batch, classes, width
HARD_TWICE = Map(lambda n, f: torch.where(n > f, 1.5 * n + 0.2, n), bound=1.7)
HARD_TWICE_UNBOUNDED = Map(HARD_TWICE.function, bound=9.0)  # at a scale of 20 not for exponentials without a maximum
CURRICULUM = curriculum(torch.tensor(0.4), torch.zeros(1))
CURRICULUM_UNBOUNDED = replace(CURRICULUM, bound=9.0)
SQUARED = Map(lambda n, _: 2 * ((n + 1) / 2).pow(3) - 1)
SQUARED_THROUGH = Map(SQUARED.function, slope="straight_through")


@pytest.fixture(autouse=True, params=POLICIES)
def policy(request):
    with forced(POLICIES[request.param]):
        yield request.param


def make(batch, classes, width, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "features": randn(batch, width) * 3,
        "prototypes": randn(classes, width) * 0.1,
        "labels": torch.randint(0, classes, (batch,), generator=generator),
        "bias": randn(classes),
        "scale": randn(batch).abs() * 10 + 0.5,
        "threshold": torch.tensor(1.7, dtype=dtype),
        "parameter": randn(batch) * 0.3,
        "included": torch.rand(classes, generator=generator) < 0.7,
        "column_labels": torch.randint(0, max(1, classes // 2), (classes,), generator=generator),
        "weights": [randn(batch), randn(batch)],
    }


def unit(x):
    """x / |x|, and 0 for a row of zeros."""
    return torch.where(x.norm(dim=1, keepdim=True) > 0, functional.normalize(x), 0 * x)


def dense(case, x, w, scale, bias, threshold, *, reduction, map, masks, included, normalize):
    """(target cosine, non-target statistic) from the whole matrix."""
    labels = case["labels"]
    cosines = unit(x) @ (unit(w) if normalize else w).T
    target = cosines.gather(1, labels[:, None])[:, 0]
    mapped = cosines
    if map is not None:
        mapped = map.function(cosines, case["parameter"][:, None])
        if map.slope == "straight_through":
            mapped = cosines + (mapped - cosines).detach()
    logits = mapped * (scale[:, None] if isinstance(scale, torch.Tensor) else scale)
    if bias is not None:
        logits = logits + bias
    if threshold is not None:
        logits = logits - threshold
    mask = labels[:, None] == torch.arange(len(w))
    if masks:
        mask = case["column_labels"][labels][:, None] == case["column_labels"]
    if included:
        mask = mask | ~case["included"]
    logits = logits.masked_fill(mask, -math.inf)
    terms = torch.logaddexp(logits, torch.zeros_like(logits))
    return target, terms.sum(dim=1) if reduction == "softplus_sum" else torch.logsumexp(logits, dim=1)


def gradients(case, function, scale_is_vector, with_bias, with_threshold):
    """Outputs and gradients of a weighted sum of them; a log-sum-exp of nothing has no gradient."""
    inputs = [case["features"], case["prototypes"]]
    inputs += [case["scale"]] * scale_is_vector + [case["bias"]] * with_bias + [case["threshold"]] * with_threshold
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    rest = inputs[2:]
    scale = rest.pop(0) if scale_is_vector else 20.0
    bias = rest.pop(0) if with_bias else None
    outputs = function(inputs[0], inputs[1], scale, bias, rest.pop(0) if with_threshold else None)
    value = sum((weight * output.where(torch.isfinite(output), 0)).sum() for weight, output in zip(case["weights"], outputs, strict=True))
    return list(outputs), torch.autograd.grad(value, inputs)


def statistic_of(name, threshold=None, k=1):
    return {"log_sum_exp": LogSumExp(), "softplus_sum": SoftplusSum(threshold), "top_k": TopK(k)}[name]


def columns_of(case, w, option, bias=None, columns=slice(None), first_class=0):
    """The columns that an option asks for, of all classes or of a slice of them."""
    found = of_classes(
        w,
        case["labels"],
        first_class,
        bias_S=bias,
        included_S=case["included"][columns] if option.get("included") else None,
        normalize=option.get("normalize", True),
    )
    if "columns" in case:  # where the targets are, in place of where the labels say
        found = found._replace(targets_B=case["columns"])
    if option.get("masks"):
        found = found._replace(mask=Mask(labels=(case["column_labels"][case["labels"]], case["column_labels"][columns])))
    return found._replace(bias_is_bounded=option.get("bounded", False))


def map_of(case, option):
    return None if option.get("map") is None else replace(option["map"], parameter_B=case["parameter"])


OPTIONS = {
    "plain": {},
    "vector scale": {"vector": True},
    "bias": {"bias": True},
    "included": {"included": True},
    "included and bounded bias": {"included": True, "bias": True, "bounded": True},
    "several columns of a label": {"masks": True},
    "unnormalised prototypes": {"normalize": False},
    "map": {"map": SQUARED},
    "map, straight-through": {"map": SQUARED_THROUGH},
    "map with parameter, vector scale, bias": {"map": HARD_TWICE, "vector": True, "bias": True},
    "map with parameter, unbounded": {"map": HARD_TWICE_UNBOUNDED, "included": True},
    "map in place": {"map": CURRICULUM, "included": True},
    "map in place, vector scale, bias": {"map": CURRICULUM, "vector": True, "bias": True},
    "map in place, unbounded": {"map": CURRICULUM_UNBOUNDED},
    "softplus": {"reduction": "softplus_sum"},
    "softplus, threshold": {"reduction": "softplus_sum", "threshold": True},
    "softplus, threshold, bias, vector scale": {"reduction": "softplus_sum", "threshold": True, "bias": True, "vector": True},
    "softplus, map, threshold, vector scale": {"reduction": "softplus_sum", "map": SQUARED_THROUGH, "threshold": True, "vector": True},
    "softplus, map, included": {"reduction": "softplus_sum", "map": SQUARED_THROUGH, "included": True},
}


def both(case, kernel, option, dtype="float32"):
    """((outputs, gradients) of the primitive, the same of the dense computation)."""
    flags = {"reduction": "log_sum_exp", "map": None, "masks": False, "included": False, "normalize": True}
    flags |= {key: value for key, value in option.items() if key in flags}
    chosen = [option.get("vector", False), option.get("bias", False), option.get("threshold", False)]

    def ours(x, w, scale, bias, threshold):
        statistic = statistic_of(flags["reduction"], threshold)
        columns = columns_of(case, w, option, bias)
        return similarity_statistics(x, columns, statistic, scale=scale, map=map_of(case, option), dtype=dtype, kernel=kernel)[:2]

    def oracle(x, w, scale, bias, threshold):
        return dense(case, x, w, scale, bias, threshold, **flags)

    return gradients(case, ours, *chosen), gradients(case, oracle, *chosen)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64(kernel, option, shape):
    ours, exact = both(make(*shape), kernel, OPTIONS[option])
    for value, expected in zip([*ours[0], *ours[1]], [*exact[0], *exact[1]], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 600), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from(sorted(OPTIONS)))
def test_float64_at_any_size(batch, classes, width, seed, option):
    case = make(batch, classes, width, seed=seed)
    ours, exact = both(case, "chunked", OPTIONS[option])
    # Through the norm a gradient is divided by it, and so is its rounding, also where (at width 1) nothing else is left of it.
    norms = [case[name].detach().norm(dim=1, keepdim=True) for name in ("features", "prototypes")]
    (outputs, slopes), (exact_outputs, exact_slopes) = (
        (found[0], [slope * norm_n1 for slope, norm_n1 in zip(found[1], norms, strict=False)] + list(found[1][2:]))
        for found in (ours, exact)
    )
    for value, expected in zip([*outputs, *slopes], [*exact_outputs, *exact_slopes], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10)


def errors(found, exact):
    """Of outputs (absolute) and gradients (relative, over the whole tensor)."""
    outputs = [float((a - b).detach().abs().nan_to_num().max()) for a, b in zip(found[0], exact[0], strict=True)]
    return outputs, [float((a - b).norm() / b.norm().clamp(min=1e-300)) for a, b in zip(found[1], exact[1], strict=True)]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_precision_is_as_good_as_the_dense_computation_in_it(option, dtype):
    """Allowance: twice the error of the dense computation in the same dtype (bfloat16: operands and logits rounded, the rest float32)."""
    case = make(64, 900, 48)
    exact = both(case, "reference", OPTIONS[option])[1]
    single = {key: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for key, value in case.items()}
    single["weights"] = [weight.float() for weight in case["weights"]]
    ours, dense_single = both(single, "chunked", OPTIONS[option], dtype)
    if dtype == "bfloat16":

        class Rounded(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.bfloat16().to(x.dtype)

            @staticmethod
            def backward(ctx, grad):
                return grad.bfloat16().to(grad.dtype)

        round_off = Rounded.apply
        original, functional_matmul = torch.Tensor.__matmul__, torch.Tensor.__matmul__
        try:
            torch.Tensor.__matmul__ = lambda a, b: round_off(functional_matmul(round_off(a), round_off(b)))
            dense_single = both(single, "reference", OPTIONS[option])[1]
        finally:
            torch.Tensor.__matmul__ = original
    allowed = errors(dense_single, exact)
    found = errors(ours, exact)
    floor = 2e-6 if dtype == "float32" else 4e-3
    for ours_error, dense_error in zip(found[0] + found[1], allowed[0] + allowed[1], strict=True):
        assert ours_error <= 2 * dense_error + floor, (found, allowed)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [*SHAPES, (4, 3, 2)])
@pytest.mark.parametrize("k", [1, 4])
def test_top_k(kernel, shape, k):
    case = make(*shape)
    inputs = [case[name].clone().requires_grad_() for name in ("features", "prototypes")]
    found = similarity_statistics(inputs[0], of_classes(inputs[1], case["labels"]), TopK(k), scale=1.0, kernel=kernel)
    exact_inputs = [case[name].clone().requires_grad_() for name in ("features", "prototypes")]
    cosines = unit(exact_inputs[0]) @ unit(exact_inputs[1]).T
    others = cosines.scatter(1, case["labels"][:, None], -2.0)
    padded = torch.cat([others, others.new_full((len(others), k), -2.0)], dim=1)
    values, columns = padded.topk(k, dim=1)
    torch.testing.assert_close(found.non_target_B, values)
    torch.testing.assert_close(found.target_B, cosines.gather(1, case["labels"][:, None])[:, 0])
    there = values > -2
    if min(shape[1], 300) > 2 and shape[2] > 1:  # no ties
        assert torch.equal(found.classes_Bk, columns.where(there, -1))
    weights = torch.linspace(-1, 2, values.numel(), dtype=torch.float64).view_as(values)
    slopes = torch.autograd.grad(((weights * found.non_target_B).where(there, 0)).sum() + (found.target_B**2).sum(), inputs)
    target = cosines.gather(1, case["labels"][:, None])[:, 0]
    expected = torch.autograd.grad(((weights * values).where(there, 0)).sum() + (target**2).sum(), exact_inputs)
    if shape[2] > 1:
        for slope, exact in zip(slopes, expected, strict=True):
            torch.testing.assert_close(slope, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("option", ["plain", "bias", "map", "softplus, threshold", "map with parameter, vector scale, bias"])
def test_finite_differences(option):
    case, flags = make(3, 7, 4), OPTIONS[option]
    inputs = [case[name].clone().requires_grad_() for name in ("features", "prototypes", "bias", "scale", "threshold")]

    def value(x, w, bias, scale, threshold):
        columns = columns_of(case, w, {}, bias if flags.get("bias") else None)
        statistic = statistic_of(flags.get("reduction", "log_sum_exp"), threshold if flags.get("threshold") else None)
        by_row = scale if flags.get("vector") else 20.0
        return list(similarity_statistics(x, columns, statistic, scale=by_row, map=map_of(case, flags))[:2])

    assert torch.autograd.gradcheck(value, inputs, eps=1e-6, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("reduction", ["log_sum_exp", "softplus_sum", "top_k"])
def test_rows_without_direction_have_cosine_0_and_no_gradient(kernel, reduction):
    features, prototypes = torch.randn(4, 8), torch.randn(9, 8)
    features[1] = prototypes[2] = prototypes[5] = 0
    labels = torch.tensor([0, 1, 2, 3])
    inputs = [features.requires_grad_(), prototypes.requires_grad_()]
    statistics = similarity_statistics(inputs[0], of_classes(inputs[1], labels), statistic_of(reduction, k=8), scale=64.0, kernel=kernel)
    assert statistics.target_B[1] == 0 and statistics.target_B[2] == 0
    (statistics.non_target_B.sum() - statistics.target_B.sum() + statistics.norms_B.sum()).backward()
    assert features.grad[1].abs().max() == 0 and prototypes.grad[[2, 5]].abs().max() == 0
    assert torch.isfinite(features.grad).all() and torch.isfinite(prototypes.grad).all()
    assert features.grad[0].abs().max() > 0 and prototypes.grad[0].abs().max() > 0


class Mixture(AllRows):
    """What another source looks like: every prototype is mixed with a constant direction."""

    def __init__(self, prototypes, memory):
        super().__init__(prototypes)
        self.constant = memory

    def load(self, rows):
        return 0.8 * super().load(rows) + 0.2 * self.constant[rows]

    def collector(self, memory=None):
        inner = super().collector(memory)

        class Scaled:
            def store(self, rows, gradient):
                inner.store(rows, 0.8 * gradient)

            def gradients(self):
                return inner.gradients()

        return Scaled()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("reduction", ["log_sum_exp", "softplus_sum", "top_k"])
def test_prototypes_from_another_source(kernel, reduction):
    case = make(9, 600, 6)
    memory = torch.randn(600, 6, dtype=torch.float64)
    prototypes = [case["prototypes"].clone().requires_grad_() for _ in range(2)]
    for source, leaf in ((Mixture(prototypes[0], memory), prototypes[0]), (0.8 * prototypes[1] + 0.2 * memory, prototypes[1])):
        statistics = similarity_statistics(
            case["features"], of_classes(source, case["labels"]), statistic_of(reduction, k=3), scale=9.0, kernel=kernel
        )
        (statistics.non_target_B.sum() - 3 * statistics.target_B.sum()).backward()
        assert leaf.grad is not None
    torch.testing.assert_close(prototypes[0].grad, prototypes[1].grad)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("own", "wrong"), [(0.25, 0.0), (0.55, 0.0), (0.68, 0.0), (0.93, 0.0), (0.75, 0.3), (0.85, 0.45)])
def test_bfloat16_gradients_are_within_a_percent_from_first_to_last_step(dtype, own, wrong):
    """Samples made of their own prototype, a wrong one and noise. A dense bfloat16 softmax is 30 to 90 % wrong near convergence."""
    generator = torch.Generator().manual_seed(1)
    prototypes = torch.randn(4000, 256, generator=generator) * 0.01
    labels = torch.randint(0, 4000, (96,), generator=generator)
    units, noise = functional.normalize(prototypes), functional.normalize(torch.randn(96, 256, generator=generator))
    features = own * units[labels] + wrong * units[(labels + 7) % 4000] + math.sqrt(1 - own**2 - wrong**2) * noise
    found = []
    for kind, kernel, number in ((dtype, "chunked", torch.float32), ("float32", "reference", torch.float64)):
        inputs = [features.to(number).requires_grad_(), prototypes.to(number).requires_grad_()]
        statistics = similarity_statistics(inputs[0], of_classes(inputs[1], labels), LogSumExp(), scale=64.0, dtype=kind, kernel=kernel)
        loss = softplus(statistics.non_target_B - 64 * (statistics.target_B - 0.4)).mean()
        found.append([slope.double() for slope in torch.autograd.grad(loss, inputs)])
    for slope, exact in zip(*found, strict=True):
        assert float((slope - exact).norm() / exact.norm()) < (0.01 if dtype == "bfloat16" else 1e-4)


def test_an_empty_shard_has_no_part():
    case = make(5, 3, 4)
    prototypes = case["prototypes"][:0].clone().requires_grad_()
    features = case["features"].clone().requires_grad_()
    for reduction in ("log_sum_exp", "softplus_sum", "top_k"):
        statistics = similarity_statistics(features, of_classes(prototypes, case["labels"]), statistic_of(reduction), scale=4.0)
        (statistics.target_B.sum() + statistics.non_target_B.clamp(min=-9).sum()).backward()
        assert prototypes.grad.shape == (0, 4) and features.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kernel": "cuda"}, "kernel 'cuda' is unknown: choose one of"),
        ({"dtype": "float16"}, "dtype 'float16' is unknown"),
        ({"statistic": TopK(1), "map": SQUARED}, "TopK takes no map"),
    ],
)
def test_bad_options_end_in_a_sentence(options, sentence):
    case = make(3, 4, 2)
    with pytest.raises(ValueError, match=sentence):
        similarity_statistics(
            case["features"], of_classes(case["prototypes"], case["labels"]), **{"statistic": LogSumExp(), "scale": 1.0, **options}
        )
    with pytest.raises(ValueError, match="TopK takes k >= 1, but got k = 0"):
        TopK(0)
    with pytest.raises(ValueError, match="slope is 'none', but must be"):
        Map(torch.neg, slope="none")
    with pytest.raises(ValueError, match="features have width 2, but the prototypes have width 3"):
        similarity_statistics(case["features"], of_classes(torch.ones(4, 3), case["labels"]), LogSumExp(), scale=1.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_class_left_out_is_nobodys_hardest(dtype):
    """With all other logits negative, where a product of 0 would be the largest."""
    features = torch.full((6, 8), 1.0).requires_grad_()
    prototypes = torch.cat([torch.ones(6, 8), -torch.ones(250, 8) + 0.1 * torch.randn(250, 8)]).requires_grad_()
    included = torch.ones(256, dtype=torch.bool)
    included[[1, 200]] = False
    labels = torch.zeros(6, dtype=torch.int64)
    included[:6] = False
    found = []
    for kind, kernel in ((dtype, "chunked"), ("float32", "reference")):
        statistics = similarity_statistics(
            features, of_classes(prototypes, labels, included_S=included), LogSumExp(), scale=4.0, dtype=kind, kernel=kernel
        )
        found.append([statistics.non_target_B, *torch.autograd.grad(statistics.non_target_B.sum(), [features, prototypes])])
    for value, exact in zip(*found, strict=True):
        torch.testing.assert_close(value, exact, rtol=3e-2, atol=1e-2 if dtype == "bfloat16" else 1e-5)
    assert found[0][2][~included].abs().max() == 0


@pytest.mark.parametrize("option", ["plain", "included and bounded bias", "softplus, threshold"])
def test_a_region_of_mixed_precision_changes_nothing(option):
    case = {key: value.float() if torch.is_tensor(value) and value.is_floating_point() else value for key, value in make(9, 700, 6).items()}
    case["weights"] = [weight.float() for weight in case["weights"]]
    plain = both(case, "chunked", OPTIONS[option])[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = both(case, "chunked", OPTIONS[option])[0]
    for value, exact in zip([*mixed[0], *mixed[1]], [*plain[0], *plain[1]], strict=True):
        assert torch.equal(value, exact)


def test_no_rows_at_all():
    features, prototypes = torch.randn(0, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    for dtype in ("float32", "bfloat16"):
        statistics = similarity_statistics(
            features, of_classes(prototypes, torch.zeros(0, dtype=torch.int64)), LogSumExp(), scale=4.0, dtype=dtype
        )
        statistics.non_target_B.sum().backward()
        assert prototypes.grad.abs().max() == 0


def test_prototypes_that_change_between_forward_and_backward_are_noticed():
    features, prototypes = torch.randn(3, 8), torch.randn(9, 8, requires_grad=True)
    for reduction in ("log_sum_exp", "top_k"):
        statistics = similarity_statistics(features, of_classes(prototypes, torch.arange(3)), statistic_of(reduction), scale=4.0)
        with torch.no_grad():
            prototypes += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            statistics.non_target_B.sum().backward()


def test_two_backward_passes_and_two_forwards_before_them():
    case = make(12, 700, 8)
    leaf = case["prototypes"].clone().requires_grad_()
    columns = of_classes(leaf, case["labels"])
    losses = [similarity_statistics(case["features"] + shift, columns, LogSumExp(), scale=9.0).non_target_B.sum() for shift in (0, 1)]
    found = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (*losses, *losses)]
    for first, second in ((0, 2), (1, 3)):
        torch.testing.assert_close(found[first], found[second], rtol=1e-12, atol=1e-14)
    exact = similarity_statistics(case["features"], columns, LogSumExp(), scale=9.0, kernel="reference").non_target_B.sum()
    torch.testing.assert_close(found[0], torch.autograd.grad(exact, leaf)[0])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("sign", [1, -1])
def test_weights_kept_under_smaller_maxima(dtype, sign, monkeypatch):
    """Logits rise from chunk to chunk by hundreds of powers of two, up to 400, or fall; classes with no part in it come first. What was
    kept serves as well as what is computed again."""
    generator = torch.Generator().manual_seed(0)
    features, other = (torch.randn(16, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    labels, included, rows = torch.arange(16) + 300, torch.arange(1024) >= 256, torch.arange(1024) % 16
    cosines = sign * torch.linspace(-1, 1, 1024, dtype=torch.float64)[:, None]
    prototypes = cosines * unit(features)[rows] + (1 - cosines.square()).sqrt() * unit(other)[rows]

    def slopes(kernel, precision, **options):
        inputs = [tensor.to(precision, copy=True).requires_grad_() for tensor in (features, prototypes)]
        found = similarity_statistics(
            inputs[0], of_classes(inputs[1], labels, included_S=included), LogSumExp(), scale=400.0, kernel=kernel, **options
        )
        return torch.autograd.grad(found.non_target_B.sum(), inputs)

    exact = slopes("reference", torch.float64)
    precision, products = (torch.float32, "bfloat16") if dtype == "bfloat16" else (getattr(torch, dtype), "float32")
    kept = slopes("chunked", precision, dtype=products)
    monkeypatch.setattr(AllRows, "gradient_memory", lambda source: None)
    again = slopes("chunked", precision, dtype=products)
    for one, other, true in zip(kept, again, exact, strict=True):
        assert (one - true).norm() <= 1.1 * (other - true).norm() + 1e-12 * true.norm()
    if dtype == "float64":
        for one, true in zip(kept, exact, strict=True):
            torch.testing.assert_close(one, true, rtol=1e-9, atol=1e-9)
