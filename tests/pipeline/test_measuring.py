"""What the meters read is what happened."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from pipeline.measuring import MatrixRate, Traffic, peak_memory, seconds

CPU = torch.device("cpu")


def test_peak_memory_is_what_a_step_takes_at_once():
    kept = []

    def step():
        first = torch.ones(8 << 20)  # 32 MB each
        second = first + 1
        del first
        kept.append(second * 2)

    extra, peak = peak_memory(step, CPU)
    assert 60 < extra / 2**20 < 100
    assert peak > extra
    again, _ = peak_memory(lambda: None, CPU)
    assert again < 8 << 20


def test_seconds_and_matrix_rate_are_positive():
    assert seconds(lambda: torch.ones(10).sum(), CPU) > 0
    assert MatrixRate(8, 100, 16, torch.float32, CPU).measure() > 1e6


def collectives():
    x = torch.ones(6)
    with Traffic() as traffic:
        dist.all_reduce(x)
        dist.all_gather([torch.empty(6) for _ in range(dist.get_world_size())], x)
        dist.reduce(x, dst=0)
        x + 1
    dist.all_reduce(x)  # no longer counted
    return dict(traffic.calls), traffic.sent


@pytest.mark.parametrize("size", [2, 3])
def test_traffic_of_a_ring(ranks, size):
    for calls, sent in ranks(size).run(collectives):
        assert calls == {"allreduce": 1, "allgather": 1, "reduce": 1}
        assert sent == round(24 * (2 * (size - 1) / size + (size - 1) + (size - 1) / size))
