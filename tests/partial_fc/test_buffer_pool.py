"""Memory is used again only when nobody refers to it, whoever that may be."""

from __future__ import annotations

import copy
import gc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_fc import PartialFC, RowSGD, losses
from partial_fc.buffer_pool import LEAST_BYTES, BufferPool

CPU = torch.device("cpu")
SIZE = LEAST_BYTES // 4


def test_memory_is_given_out_again_when_its_last_user_is_gone():
    pool = BufferPool()
    first = pool.empty((SIZE,), torch.float32, CPU)
    place, view = first.data_ptr(), first[3:5].detach()
    assert pool.empty((SIZE,), torch.float32, CPU).data_ptr() != place
    del first
    assert pool.empty((SIZE,), torch.float32, CPU).data_ptr() != place  # a view of it is left
    del view
    again = pool.empty((SIZE // 2, 4), torch.bfloat16, CPU)  # the same number of bytes
    assert again.shape == (SIZE // 2, 4) and again.dtype is torch.bfloat16 and again.data_ptr() % 64 == 0
    assert len(copy.deepcopy(pool).blocks) == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), max_size=40))
def test_living_tensors_never_share_memory(calls):
    pool, living = BufferPool(), {}
    for number, (slot, size) in enumerate(calls):
        living.pop(slot, None)
        living[slot] = (number, pool.empty((size * SIZE,), torch.float32, CPU).fill_(number))
        for expected, tensor in living.values():
            assert float(tensor[0]) == float(tensor[-1]) == expected
    assert len(pool.blocks) <= 18  # of three sizes six at once


def test_a_gradient_that_somebody_keeps_is_not_overwritten():
    classifier = PartialFC(3000, 128, losses.build("cosface", scale=8.0))
    optimizer = RowSGD(classifier, lr=0.1)
    kept = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        features, labels = torch.randn(16, 128, generator=generator), torch.randint(0, 3000, (16,), generator=generator)
        classifier(features, labels).backward()
        kept.append((classifier.prototypes.grad, classifier.prototypes.grad.clone()))
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
    for grad, value in kept:
        assert torch.equal(grad, value)
    assert len({grad.data_ptr() for grad, _ in kept}) == 3
