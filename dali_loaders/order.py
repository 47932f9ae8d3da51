"""The global sample order and the random numbers of the augmentation, as pure functions of (seed, position).

Nothing here depends on the number of ranks, and nothing has to be replayed to resume: any position can be asked for at once."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from dali_loaders.sources import Source, check_images_per_identity

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd
_ROUNDS = 8  # 4 make a good permutation of a large domain; with 8 all orders of even 4 images are equally frequent


class UniformOrder:
    """An endless stream of epochs; each epoch is its own pseudo-random permutation of [0, num_samples).

    The permutation is a Feistel network over the smallest power of four >= num_samples with cycle walking (Black and Rogaway, "Ciphers
    with arbitrary finite domains", 2002). It takes no memory, and the same time at any position and for any number of images.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"the order needs at least one sample, but num_samples is {num_samples}; check the data set.")
        self.num_samples = num_samples
        self.seed = seed

    @property
    def epoch_length(self) -> int:
        """Stream positions of an epoch."""
        return self.num_samples

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Dataset indices, int64 [stop - start], at the stream positions [start, stop); epoch = position // num_samples."""
        assert 0 <= start <= stop
        epochs, values = np.divmod(np.arange(start, stop, dtype=np.uint64), np.uint64(self.num_samples))
        first, last = start // self.num_samples, stop // self.num_samples
        keys = _round_keys(_key(self.seed, np.arange(first, last + 1, dtype=np.uint64)))[:, epochs - np.uint64(first)]
        return _permuted(values, np.full(len(values), self.num_samples, np.uint64), keys).astype(np.int64)

    def replacements(self, index: int) -> Iterator[int]:
        """Candidates to stand in for an unreadable image: `index` itself, then the next ones of the set, wrapping around."""
        return ((index + step) % self.num_samples for step in range(self.num_samples))


class GroupedOrder:
    """P x K batches: an endless stream of groups, each of K = images_per_identity images of one identity; group = position // K.

    An epoch has ceil(n_i / K) groups of every identity i with n_i images, in a pseudo-random order (UniformOrder over the groups). Group s
    of identity i takes the places [s K, s K + K), modulo n_i, of a permutation of its images that depends on (seed, epoch, identity). So an
    epoch holds every image; the K ceil(n_i / K) - n_i places left over repeat the first images of the permutation, which differ from
    epoch to epoch. The images of a group differ where n_i >= K; otherwise they cycle through all n_i. Nothing keeps two groups of one
    identity apart: they may stand in one batch, and may then share an image if n_i is no multiple of K.

    Memory: 16 bytes per identity, and 8 per image where the images of an identity do not lie together in the set.
    ValueError for K < 2, and for identities with fewer than 2 images, which cannot form a pair.
    """

    def __init__(self, source: Source, images_per_identity: int, seed: int) -> None:
        if images_per_identity < 2:
            raise ValueError(f"groups of {images_per_identity} image(s) have no pairs; use at least 2, or the order without groups.")
        why = f"data.images_per_identity = {images_per_identity} makes groups of one identity's images, at least 2"
        check_images_per_identity(source, 2, why, "use the order without groups with --set data.images_per_identity=1")
        counts = np.bincount(source.labels, minlength=len(source.identities))
        self.images_per_identity = images_per_identity
        self.seed = seed
        self._labels = source.labels
        self._first_image = np.concatenate([[0], np.cumsum(counts)])  # of each identity, in the order by identity
        self._first_group = np.concatenate([[0], np.cumsum(-(-counts // images_per_identity))])
        self._groups = UniformOrder(int(self._first_group[-1]), seed)

    @property
    def epoch_length(self) -> int:
        """Stream positions of an epoch: K sum_i ceil(n_i / K)."""
        return self.images_per_identity * self._groups.num_samples

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Dataset indices, int64 [stop - start], at the stream positions [start, stop); epoch = position // epoch_length."""
        assert 0 <= start <= stop
        size = self.images_per_identity
        first, last = start // size, -(-stop // size)
        groups_G = self._groups.indices(first, last)
        identities_G = np.searchsorted(self._first_group, groups_G, side="right") - 1
        epochs_G = np.arange(first, last, dtype=np.uint64) // np.uint64(self._groups.num_samples)
        keys_G = _mix(_key(self.seed, epochs_G) ^ _mix((identities_G.astype(np.uint64) + np.uint64(1)) * _GOLDEN))

        of_group, slots = np.divmod(np.arange(start, stop) - first * size, size)
        identities = identities_G[of_group]
        counts = self._first_image[identities + 1] - self._first_image[identities]
        places = ((groups_G - self._first_group[identities_G])[of_group] * size + slots) % counts
        within = _permuted(places.astype(np.uint64), counts.astype(np.uint64), _round_keys(keys_G)[:, of_group])
        return self._by_identity(self._first_image[identities] + within.astype(np.int64))

    def replacements(self, index: int) -> Iterator[int]:
        """Candidates to stand in for an unreadable image: `index` itself, then the next ones of its identity, wrapping around; then the
        next ones of the set."""
        identity = self._labels[index]
        images = self._by_identity(np.arange(self._first_image[identity], self._first_image[identity + 1]))
        yield from np.roll(images, -int(np.searchsorted(images, index))).tolist()
        yield from UniformOrder(len(self._labels), self.seed).replacements(index)

    def _by_identity(self, places: np.ndarray) -> np.ndarray:
        """Dataset indices of places in the order by identity, then by index."""
        return places if self._sorting is None else self._sorting[places]

    @cached_property
    def _sorting(self) -> np.ndarray | None:
        """Dataset indices by identity; None where the set has this order already."""
        if (self._labels[1:] >= self._labels[:-1]).all():
            return None
        return np.argsort(self._labels, kind="stable")


Order = UniformOrder | GroupedOrder


def build_order(source: Source, images_per_identity: int, seed: int) -> Order:
    """The order of a data set: uniform for images_per_identity = 1, else in groups of that many."""
    return UniformOrder(len(source), seed) if images_per_identity == 1 else GroupedOrder(source, images_per_identity, seed)


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


def _round_keys(words: np.ndarray) -> np.ndarray:
    """The keys of a Feistel network's rounds, uint64 [_ROUNDS, n], from one well mixed word each."""
    return _mix(words + np.arange(_ROUNDS, dtype=np.uint64)[:, None] * _GOLDEN)


def _permuted(values: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where the permutations of [0, sizes[i]) chosen by keys[:, i] take values[i]; uint64 [n], [n] and [_ROUNDS, n]."""
    half_bits = np.maximum(1, (np.frexp(sizes - np.uint64(1))[1] + 1) // 2).astype(np.uint64)  # frexp's exponent: the bits of an integer
    values = _feistel(values, half_bits, keys)
    outside = np.flatnonzero(values >= sizes)
    while outside.size:
        values[outside] = _feistel(values[outside], half_bits[outside], keys[:, outside])
        outside = outside[values[outside] >= sizes[outside]]
    return values


def _feistel(values: np.ndarray, half_bits: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """A permutation of the words of 2 half_bits bits."""
    left, right = values >> half_bits, values & ((np.uint64(1) << half_bits) - np.uint64(1))
    for key in keys:
        # The top bits of the mixer's output are its best.
        left, right = right, left ^ (_mix(right ^ key) >> (np.uint64(64) - half_bits))
    return (left << half_bits) | right
