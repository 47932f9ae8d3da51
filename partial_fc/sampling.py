"""Partial-FC: the classes of one step, all positives and a random share of the others (An et al., CVPR 2022). Each class is decided by
counter-based random numbers keyed (seed, step, class id), so the sample does not depend on the number of ranks."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from partial_fc.shards import ClassShard

# splitmix64 (Steele, Lea & Flood, OOPSLA 2014) as signed numbers: int64 arithmetic wraps around, on CPU and GPU alike.
GOLDEN, FIRST, SECOND = (int(np.int64(np.uint64(x))) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class ClassSample(NamedTuple):
    """This rank's classes of one step, packed into a fixed number K of columns, so that no step waits for a count from the device."""

    rows_K: Tensor  # int64, distinct rows of the shard: first the sample, ascending, then padding
    is_real_K: Tensor  # bool: sampled, not padding
    is_certain_K: Tensor  # bool: class of a label, or always sampled for another reason; the others by chance
    column_S: Tensor  # int64: column of each row of the shard, -1 if not in the sample


def capacity(rows: int, rate: float, certain: int, share: float = 1.0) -> int:
    """Columns for every sample: room for `certain` classes, and otherwise more than are drawn but for a probability of 1e-9.

    share: the probability of a certain class to be one of these rows; 1 where it is unknown"""
    mine = min(certain * share, rows)
    variance = certain * share * (1 - share) + rows * rate * (1 - rate)
    enough = _rarely_exceeded(mine + (rows - mine) * rate, variance)
    return min(rows, max(math.ceil(enough), certain))


def _rarely_exceeded(mean: float, variance: float) -> float:
    """What a sum of independent numbers in [0, 1] exceeds with a probability below 1e-9, by Bernstein's inequality: for a few classes six
    standard deviations would not do."""
    nats = 9 * math.log(10)
    return mean + nats / 3 + math.sqrt((nats / 3) ** 2 + 2 * nats * variance)


def draw(shard: ClassShard, certain_n: Tensor, rate: float, seed: int, step: int, share: float = 1.0) -> ClassSample:
    """The sample of `step`: every class of `certain_n` (global ids, repeated or not; other ranks' classes and -1 are ignored), and each
    other class with probability `rate`. Beyond `capacity` (probability 1e-9) the last ones by class id are left out, never certain ones."""
    ids_S = torch.arange(shard.first, shard.first + shard.rows, device=certain_n.device)
    is_certain_S = shard.mask_of(certain_n)
    is_wanted_S = is_certain_S | (uniform(ids_S, seed, step) < rate)

    size = capacity(shard.rows, rate, len(certain_n), share)
    room = size - is_certain_S.sum()  # for the others
    by_chance_S = is_wanted_S & ~is_certain_S
    is_wanted_S = is_certain_S | (by_chance_S & (by_chance_S.cumsum(0) <= room))
    # Sampled rows come first, then the others, both in order; the first K columns are kept.
    wanted_S, row_S = is_wanted_S.cumsum(0), ids_S - shard.first
    place_S = torch.where(is_wanted_S, wanted_S - 1, row_S - wanted_S + is_wanted_S.sum())
    rows = torch.empty_like(place_S)
    rows[place_S] = row_S
    rows_K = rows[:size]
    return ClassSample(rows_K, is_wanted_S[rows_K], is_certain_S[rows_K], torch.where(is_wanted_S, place_S, -1))


def uniform(ids: Tensor, seed: int, step: int, *stream: int) -> Tensor:
    """Numbers in [0, 1), float64, that depend only on (seed, step, id): splitmix64's finalizer over id, with a key from seed and step. The
    number `stream` separates different uses."""
    x = mix_(ids * GOLDEN + key_of((seed, step, *stream)))
    return (x >> 11).bitwise_and_((1 << 53) - 1).double() * 2.0**-53


def key_of(numbers: tuple[int, ...]) -> int:
    """A signed 64-bit key from non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0].view(np.int64))


def mix_(x: Tensor) -> Tensor:
    """splitmix64's finalizer, in place."""
    for bits, factor in ((30, FIRST), (27, SECOND), (31, 1)):
        # The mask makes the shift logical; that of int64 repeats the sign.
        x.bitwise_xor_((x >> bits).bitwise_and_((1 << (64 - bits)) - 1))
        if factor != 1:
            x.mul_(factor)
    return x
