"""A statistic is one class: a new one, of hinges, written here, works with every torch kernel and on ranks."""

from __future__ import annotations

import pytest
import torch

from partial_fc import similarity_statistics
from partial_fc.device_policy import forced
from partial_fc.shards import ClassShard
from partial_fc.statistics import Statistic
from tests.partial_fc.test_kernels import columns_of, errors, make, map_of, unit
from tests.policies import POLICIES


class HingeSum(Statistic):
    """sum_j max(0, z_ij) over the non-targets."""

    def terms_(self, tile_Bn):
        return tile_Bn.relu()

    def weights_(self, tile_Bn, terms_Bn=None):
        return tile_Bn.gt_(0)

    def term(self, z, shift=0.0):
        return z.relu()

    def weight(self, z_B, shift_B=0.0):
        return (z_B > 0).to(z_B.dtype)


OPTIONS = {"plain": {}, "bias and classes left out": {"bias": True, "included": True}, "vector scale": {"vector": True}}


def ours(case, option, kernel="chunked", dtype="float32", columns=slice(None), first_class=0):
    """(outputs, gradients) of this rank."""
    inputs = {
        "features": case["features"],
        "prototypes": case["prototypes"][columns],
        "scale": case["scale"],
        "bias": case["bias"][columns],
    }
    inputs = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    bias, scale = (inputs["bias"] if option.get("bias") else None), (inputs["scale"] if option.get("vector") else 7.0)
    found = columns_of(case, inputs["prototypes"], option, bias, columns, first_class)
    statistics = similarity_statistics(
        inputs["features"], found, HingeSum(), scale=scale, map=map_of(case, option), dtype=dtype, kernel=kernel
    )
    value = (case["weights"][0] * statistics.target_B + case["weights"][1] * statistics.non_target_B).sum()
    slopes = torch.autograd.grad(value, list(inputs.values()), allow_unused=True, materialize_grads=True)
    return [statistics.target_B.detach(), statistics.non_target_B.detach()], list(slopes)


def rounded(x):
    """To bfloat16, with the gradient of x."""
    return x + (x.bfloat16().to(x.dtype) - x).detach()


def dense(case, option, through=lambda x: x):
    """Operands and products go `through` a rounding, if there is one."""
    inputs = [case[name].double().clone().requires_grad_() for name in ("features", "prototypes", "scale", "bias")]
    features, prototypes, scale, bias = inputs
    cosines = unit(features) @ unit(prototypes).T
    by_row = scale[:, None] if option.get("vector") else 7.0
    logits = through(through(unit(features) * by_row) @ through(unit(prototypes)).T) + (bias if option.get("bias") else 0.0)
    is_out = torch.nn.functional.one_hot(case["labels"], len(prototypes)).bool()
    if option.get("included"):
        is_out = is_out | ~case["included"]
    outputs = [cosines.gather(1, case["labels"][:, None])[:, 0], logits.relu().masked_fill(is_out, 0).sum(dim=1)]
    value = sum((weight * output).sum() for weight, output in zip(case["weights"], outputs, strict=True))
    return [output.detach() for output in outputs], list(torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True))


@pytest.fixture(autouse=True, params=POLICIES)
def policy(request):
    with forced(POLICIES[request.param]):
        yield request.param


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", [(7, 13, 5), (33, 700, 17), (16, 257, 32)])
def test_equals_dense_float64(kernel, option, shape):
    case = make(*shape)
    for values, exact in zip(ours(case, OPTIONS[option], kernel), dense(case, OPTIONS[option]), strict=True):
        for value, expected in zip(values, exact, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_precision_is_as_good_as_the_dense_computation_in_it(dtype):
    """Allowance: twice the error of the dense computation with rounded operands and products, as in test_kernels.py."""
    case = make(24, 600, 48)
    exact = dense(case, {})
    single = {name: value.float() if torch.is_tensor(value) and value.is_floating_point() else value for name, value in case.items()}
    single["weights"] = [weight.float() for weight in case["weights"]]
    found = errors(ours(single, {}, dtype=dtype), exact)
    allowed = errors(dense(case, {}, rounded), exact) if dtype == "bfloat16" else ([0.0, 1e-4], [0.0] * 4)
    floor = 2e-6 if dtype == "float32" else 4e-3
    for ours_error, dense_error in zip(found[0] + found[1], allowed[0] + allowed[1], strict=True):
        assert ours_error <= 2 * dense_error + floor, (found, allowed)


def on_one_rank(option, policy):
    import torch.distributed as dist

    shard = ClassShard.of_rank(300, dist.get_rank(), dist.get_world_size())
    with forced(POLICIES[policy]):
        return ours(make(9, 300, 6), OPTIONS[option], columns=slice(shard.first, shard.first + shard.rows), first_class=shard.first)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_add_up(ranks, size, policy):
    for option in OPTIONS:
        outputs, slopes = dense(make(9, 300, 6), OPTIONS[option])
        found = ranks(size).run(on_one_rank, option, policy)
        for of_rank, _ in found:
            for value, exact in zip(of_rank, outputs, strict=True):
                torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-11)
        features, scale = (sum(of_rank[place] for _, of_rank in found) for place in (0, 2))
        prototypes, bias = (torch.cat([of_rank[place] for _, of_rank in found]) for place in (1, 3))
        for value, exact in zip((features, prototypes, scale, bias), slopes, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-11)
