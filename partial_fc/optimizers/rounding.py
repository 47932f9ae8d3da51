"""Stochastic rounding to bfloat16 with counter-based random numbers: weights kept in bfloat16 lose no small update on average, and the
result does not depend on the number of ranks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# splitmix64 (Steele, Lea & Flood, OOPSLA 2014) as signed numbers: int64 arithmetic wraps around, on CPU and GPU alike.
GOLDEN, FIRST, SECOND = (int(np.int64(np.uint64(x))) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def round_to_bfloat16(x_nD: Tensor, ids_n: Tensor, key: tuple[int, ...]) -> Tensor:
    """x_nD rounded to one of its two bfloat16 neighbours at random, so that the mean is x_nD; what bfloat16 can hold stays as it is.

    x_nD   float32, contiguous; used as scratch memory
    ids_n  int64 class ids: the choice is a function of (key, id, column) alone
    key    non-negative numbers, not to be used twice for one row
    """
    width = x_nD.shape[1]
    random_nW = _random_words(ids_n, -(-width // 4), int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0].view(np.int64)))
    # 16 random bits are added to the 16 that are cut off: they carry over with the probability that these bits stand for.
    bits_nD = x_nD.view(torch.int32)
    bits_nD.add_(random_nW.view(torch.uint16)[:, :width].to(torch.int32)).bitwise_and_(-0x10000)
    return x_nD.to(torch.bfloat16)


def _random_words(ids_n: Tensor, words: int, key: int) -> Tensor:
    """int64 [n, words]: each row is the output of a splitmix64 generator of its own, seeded with the hash of (key, id)."""
    seeds_n = _mix_(ids_n * GOLDEN + key)
    return _mix_(seeds_n[:, None] + torch.arange(1, words + 1, device=ids_n.device) * GOLDEN)


def _mix_(x: Tensor) -> Tensor:
    """splitmix64's finalizer, in place."""
    for bits, factor in ((30, FIRST), (27, SECOND), (31, 1)):
        # The mask makes the shift a logical one; int64's own repeats the sign.
        x.bitwise_xor_((x >> bits).bitwise_and_((1 << (64 - bits)) - 1))
        if factor != 1:
            x.mul_(factor)
    return x
