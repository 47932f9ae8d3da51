"""The global sample order and the random numbers of the augmentation, as pure functions of (seed, position).

Nothing here depends on the number of ranks, and nothing has to be replayed to resume: any position can be asked for in O(1)."""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd
_ROUNDS = 8  # 4 make a good permutation of a large domain; with 8 all orders of even 4 images are equally frequent


class UniformOrder:
    """An endless stream of epochs; each epoch is its own pseudo-random permutation of [0, num_samples).

    The permutation is a Feistel network over the smallest power of four >= num_samples with cycle walking (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002), so it costs no memory and the same at any position, with 100 million images as with a thousand.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"the order needs at least one sample, but num_samples is {num_samples}; check the data set.")
        self.num_samples = num_samples
        self.seed = seed
        self._half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Dataset indices, int64 [stop - start], at the stream positions [start, stop); epoch = position // num_samples."""
        assert 0 <= start <= stop
        epochs, values = np.divmod(np.arange(start, stop, dtype=np.uint64), np.uint64(self.num_samples))
        first, last = start // self.num_samples, stop // self.num_samples
        keys = _mix(_key(self.seed, np.arange(first, last + 1, dtype=np.uint64)) + np.arange(_ROUNDS, dtype=np.uint64)[:, None] * _GOLDEN)
        keys = keys[:, epochs - np.uint64(first)]
        values = self._feistel(values, keys)
        outside = np.flatnonzero(values >= self.num_samples)
        while outside.size:
            values[outside] = self._feistel(values[outside], keys[:, outside])
            outside = outside[values[outside] >= self.num_samples]
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        shift = np.uint64(self._half_bits)
        mask = np.uint64((1 << self._half_bits) - 1)
        left, right = values >> shift, values & mask
        for key in keys:
            # The top bits of the mixer's output are its best.
            left, right = right, left ^ (_mix(right ^ key) >> np.uint64(64 - self._half_bits))
        return (left << shift) | right


def uniform(seed: int, stream: int, positions: np.ndarray, columns: int) -> np.ndarray:
    """Random numbers in [0, 1), float64 [len(positions), columns], each a function of (seed, stream, position, column) alone.

    `stream` keeps different uses of one seed apart."""
    rows = _key(seed, np.array([stream], np.uint64)) ^ _mix(positions.astype(np.uint64) * _GOLDEN)
    columns_C = np.arange(1, columns + 1, dtype=np.uint64)
    return (_mix(_mix(rows)[:, None] + columns_C * _GOLDEN) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a bijection of 64-bit words in which every bit depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(seed: int, parts: np.ndarray) -> np.ndarray:
    """A well mixed word for each (seed, part)."""
    seeds = _mix(np.array([seed % (1 << 64)], np.uint64) + _GOLDEN)
    return _mix(seeds ^ _mix((parts + np.uint64(1)) * _GOLDEN))
