"""Stochastic rounding to bfloat16 with counter-based random numbers: the same on any number of ranks, and unbiased for small updates."""

import torch
from torch import Tensor

from partial_fc.sampling import GOLDEN, key_of, mix_


def round_to_bfloat16(x_nD: Tensor, ids_n: Tensor, key: tuple[int, ...]) -> Tensor:
    """x_nD rounded at random to one of its two bfloat16 neighbours, so that the mean is x_nD; bfloat16 numbers stay as they are.

    x_nD   float32, contiguous; used as scratch memory
    ids_n  int64 class ids: the choice depends only on (key, id, column)
    key    non-negative numbers, never to be used twice for one row"""
    width = x_nD.shape[1]
    random_nW = _random_words(ids_n, -(-width // 4), key_of(key))
    # Adding 16 random bits to the 16 that are cut off carries over with the probability that the cut bits stand for.
    bits_nD = x_nD.view(torch.int32)
    bits_nD.add_(random_nW.view(torch.uint16)[:, :width].to(torch.int32)).bitwise_and_(-0x10000)
    return x_nD.to(torch.bfloat16)


def _random_words(ids_n: Tensor, words: int, key: int) -> Tensor:
    """int64 [n, words]: each row is the output of its own splitmix64 generator, seeded with the hash of (key, id)."""
    seeds_n = mix_(ids_n * GOLDEN + key)
    return mix_(seeds_n[:, None] + torch.arange(1, words + 1, device=ids_n.device) * GOLDEN)
