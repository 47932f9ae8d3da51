"""The primitive with its classes sharded over ranks, against the dense float64 computation of test_kernels on all classes."""

from __future__ import annotations

import pytest
import torch

from partial_fc import TopK, of_classes, similarity_statistics
from partial_fc.device_policy import forced
from partial_fc.shards import ClassShard
from tests.partial_fc.test_kernels import OPTIONS, columns_of, dense, gradients, make, map_of, statistic_of, unit
from tests.policies import POLICIES


def on_one_rank(shape, option, kernel, policy):
    """This rank's outputs and gradients: features, prototypes, then scale, bias and threshold as far as the option has them."""
    import torch.distributed as dist

    case, flags = make(*shape), OPTIONS[option]
    shard = ClassShard.of_rank(shape[1], dist.get_rank(), dist.get_world_size())
    mine = slice(shard.first, shard.first + shard.rows)
    local = case | {"prototypes": case["prototypes"][mine], "bias": case["bias"][mine]}

    def ours(x, w, scale, bias, threshold):
        statistic = statistic_of(flags.get("reduction", "log_sum_exp"), threshold)
        columns = columns_of(case, w, flags, bias, mine, shard.first)
        return similarity_statistics(x, columns, statistic, scale=scale, map=map_of(case, flags), kernel=kernel)[:2]

    chosen = [flags.get("vector", False), flags.get("bias", False), flags.get("threshold", False)]
    with forced(POLICIES[policy]):
        outputs, slopes = gradients(local, ours, *chosen)
    return [output.detach() for output in outputs], slopes


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("shape", [(7, 13, 5), (5, 2, 4), (9, 700, 6)])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_option_on_ranks(ranks, size, shape, policy):
    for option, flags in OPTIONS.items():
        defaults = {"reduction": "log_sum_exp", "map": None, "masks": False, "included": False, "normalize": True}
        chosen = defaults | {key: value for key, value in flags.items() if key in defaults}
        case = make(*shape)

        def oracle(x, w, scale, bias, threshold, case=case, chosen=chosen):
            return dense(case, x, w, scale, bias, threshold, **chosen)

        present = [flags.get("vector", False), flags.get("bias", False), flags.get("threshold", False)]
        exact_outputs, exact_slopes = gradients(case, oracle, *present)
        found = ranks(size).run(on_one_rank, shape, option, "chunked", policy)
        for outputs, _ in found:
            for value, exact in zip(outputs, exact_outputs, strict=True):
                torch.testing.assert_close(value, exact.detach(), rtol=1e-9, atol=1e-11, msg=option)
        names = ["features", "prototypes", *(n for n, is_in in zip(("scale", "bias", "threshold"), present, strict=True) if is_in)]
        for place, name in enumerate(names):
            parts = [slopes[place] for _, slopes in found]
            if name == "threshold":
                for part in parts:  # complete on every rank
                    torch.testing.assert_close(part, exact_slopes[place], rtol=1e-9, atol=1e-11, msg=option)
            else:
                whole = torch.cat(parts) if name in ("prototypes", "bias") else torch.stack(parts).sum(dim=0)
                torch.testing.assert_close(whole, exact_slopes[place], rtol=1e-9, atol=1e-11, msg=f"{option}: {name}")


def top_on_one_rank(shape, k):
    import torch.distributed as dist

    case = make(*shape)
    shard = ClassShard.of_rank(shape[1], dist.get_rank(), dist.get_world_size())
    inputs = [case["features"].requires_grad_(), case["prototypes"][shard.first : shard.first + shard.rows].requires_grad_()]
    found = similarity_statistics(inputs[0], of_classes(inputs[1], case["labels"], shard.first), TopK(k), scale=1.0)
    weights = torch.linspace(-1, 2, found.non_target_B.numel(), dtype=torch.float64).view_as(found.non_target_B)
    value = (weights * found.non_target_B).where(found.classes_Bk >= 0, 0).sum() + (found.target_B**2).sum()
    return found.non_target_B.detach(), found.classes_Bk, torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shape", [(7, 13, 5), (5, 2, 4), (9, 700, 6)])
@pytest.mark.parametrize("k", [1, 6])
def test_top_k_on_ranks(ranks, size, shape, k):
    case = make(*shape)
    inputs = [case[name].requires_grad_() for name in ("features", "prototypes")]
    cosines = unit(inputs[0]) @ unit(inputs[1]).T
    others = cosines.scatter(1, case["labels"][:, None], -2.0)
    values, columns = torch.cat([others, others.new_full((len(others), k), -2.0)], dim=1).topk(k, dim=1)
    weights = torch.linspace(-1, 2, values.numel(), dtype=torch.float64).view_as(values)
    target = cosines.gather(1, case["labels"][:, None])[:, 0]
    exact = torch.autograd.grad((weights * values).where(values > -2, 0).sum() + (target**2).sum(), inputs)
    found = ranks(size).run(top_on_one_rank, shape, k)
    for cosines_Bk, classes_Bk, _ in found:
        torch.testing.assert_close(cosines_Bk, values.detach())
        assert torch.equal(classes_Bk, columns.where(values > -2, -1))
    torch.testing.assert_close(torch.stack([slopes[0] for *_, slopes in found]).sum(dim=0), exact[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.cat([slopes[1] for *_, slopes in found]), exact[1], rtol=1e-9, atol=1e-11)
