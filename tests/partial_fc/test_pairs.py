"""Statistics of sample pairs against the whole B x B matrix in float64, in one process and shared out over ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from partial_fc import collectives, pairs
from partial_fc.pairs import negative_quantiles, pair_statistics


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


SHARES = (0.0, 0.25, 0.5, 0.9, 0.999, 1.0)


def quantiles(features, labels):
    """Of the whole matrix, each pair once; in float64, as torch.quantile finds its place in a row of n numbers in their own precision."""
    units = torch.nn.functional.normalize(features.double())
    found = (units @ units.T)[(labels[:, None] != labels).triu(1)]
    return torch.quantile(found, torch.tensor(SHARES, dtype=found.dtype)) if len(found) else found.new_zeros(len(SHARES))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([1, 10**3, 10**6]), st.sampled_from([32, 64]))
@example(36, 3, 1, 1, 32)
def test_negative_quantiles_equal_those_of_the_whole_matrix(batch, identities, seed, block_bytes, bits):
    original, pairs.BLOCK_BYTES = pairs.BLOCK_BYTES, block_bytes
    try:
        features, labels = make(batch, identities, seed)
        features[batch // 2] = features[0]  # a cosine twice
        features[-1] = 0  # and one that is 0
        features = features.to({32: torch.float32, 64: torch.float64}[bits])
        tolerance = {32: 1e-6, 64: 1e-14}[bits]
        found = negative_quantiles(features, labels, SHARES).double()
        torch.testing.assert_close(found, quantiles(features, labels), rtol=0, atol=tolerance)
    finally:
        pairs.BLOCK_BYTES = original


def quantiles_on_one_rank(batch):
    return negative_quantiles(*make(batch, 4), SHARES)


@pytest.mark.parametrize(("batch", "size"), [(9, 2), (7, 3), (2, 4), (1, 2), (23, 4)])
def test_every_rank_finds_the_same_quantiles(ranks, batch, size):
    for found in ranks(size).run(quantiles_on_one_rank, batch):
        torch.testing.assert_close(found, quantiles(*make(batch, 4)), rtol=0, atol=1e-14)
