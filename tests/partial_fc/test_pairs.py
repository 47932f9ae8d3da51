"""Statistics of sample pairs against the whole B x B matrix in float64, in one process and shared out over ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_fc import collectives, pairs
from partial_fc.pairs import pair_statistics


def log_sums(cosines, is_positive, is_negative):
    """[n], and the three largest as [n, 3] to have a matrix too."""
    negatives = (9 * cosines).masked_fill(~is_negative, -60.0)
    return torch.logsumexp(negatives, dim=1), negatives.topk(min(3, negatives.shape[1]), dim=1).values


def make(batch, identities, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, 6, generator=generator, dtype=torch.float64) * 2
    return features, torch.randint(0, identities, (batch,), generator=generator)


def dense(features, labels, reduction):
    units = torch.nn.functional.normalize(features)
    same = labels[:, None] == labels
    return reduction(units @ units.T, same & ~torch.eye(len(labels), dtype=torch.bool), ~same)


def value(results):
    return sum((torch.arange(1, r.numel() + 1).view_as(r) * r).sum() * (place + 1) for place, r in enumerate(results))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 23), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([1, 10**3, 10**6]))
def test_blocks_equal_the_whole_matrix(batch, identities, seed, block_bytes):
    original, pairs.BLOCK_BYTES = pairs.BLOCK_BYTES, block_bytes
    try:
        for reduction in (pairs.hardest, log_sums):
            found, exact = [], []
            for results, function in ((found, pair_statistics), (exact, dense)):
                features, labels = make(batch, identities, seed)
                outputs = function(features.requires_grad_(), labels, reduction)
                value(outputs).backward()
                results += [*outputs, features.grad]
            for a, b in zip(found, exact, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    finally:
        pairs.BLOCK_BYTES = original


def on_one_rank(batch, counts):
    import torch.distributed as dist

    features, labels = make(batch, 4)
    starts = [sum(counts[:rank]) for rank in range(len(counts) + 1)]
    mine = features[starts[dist.get_rank()] : starts[dist.get_rank() + 1]].requires_grad_()
    gathered = collectives.gather_rows(mine, None, 1.0, counts)
    results = pair_statistics(gathered, labels, log_sums)
    value(results).backward()
    return [result.detach() for result in results], mine.grad


@pytest.mark.parametrize(("batch", "counts"), [(9, [5, 4]), (7, [0, 3, 4]), (2, [1, 0, 1, 0]), (8, [2, 2, 2, 2])])
def test_ranks_share_the_rows(ranks, batch, counts):
    features, labels = make(batch, 4)
    exact = dense(features.requires_grad_(), labels, log_sums)
    value(exact).backward()
    found = ranks(len(counts)).run(on_one_rank, batch, counts)
    for results, _ in found:
        for a, b in zip(results, exact, strict=True):
            torch.testing.assert_close(a, b.detach())
    torch.testing.assert_close(torch.cat([grad for _, grad in found]), features.grad)
