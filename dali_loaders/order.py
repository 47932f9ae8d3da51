"""The global sample order and the random numbers of the augmentation, as pure functions of (seed, position).

Nothing here depends on the number of ranks, and nothing has to be replayed to resume: any position can be asked for at once."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from dali_loaders.sources import Part, Source, check_images_per_identity

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
        """Dataset indices, int64 [stop - start], at the stream positions [start, stop)."""
        assert 0 <= start <= stop
        return self.at(np.arange(start, stop))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Dataset indices, int64 [n], at any stream positions, int64 [n]; epoch = position // num_samples."""
        epochs, values = np.divmod(positions.astype(np.uint64), np.uint64(self.num_samples))
        known, of_position = np.unique(epochs, return_inverse=True)
        keys = _round_keys(_key(self.seed, known))[:, of_position]
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

    With `images`, an order of that range of the source alone, whose indices count from its first image.

    Memory: 16 bytes per identity, and 8 per image where the images of an identity do not lie together in the set.
    ValueError for K < 2, and for identities with fewer than 2 images, which cannot form a pair.
    """

    def __init__(self, source: Source, images_per_identity: int, seed: int, images: slice = slice(None)) -> None:
        if images_per_identity < 2:
            raise ValueError(f"groups of {images_per_identity} image(s) have no pairs; use at least 2, or the order without groups.")
        why = f"data.images_per_identity = {images_per_identity} makes groups of one identity's images, at least 2"
        check_images_per_identity(source, 2, why, "use the order without groups with --set data.images_per_identity=1")
        self.images_per_identity = images_per_identity
        self.seed = seed
        self._labels = source.labels[images]
        self._lowest = int(self._labels.min())  # a set among others has labels from here on
        counts = np.bincount(self._labels)[self._lowest :]
        self._first_image = np.concatenate([[0], np.cumsum(counts)])  # of each identity, in the order by identity
        self._first_group = np.concatenate([[0], np.cumsum(-(-counts // images_per_identity))])
        self._groups = UniformOrder(int(self._first_group[-1]), seed)

    @property
    def epoch_length(self) -> int:
        """Stream positions of an epoch: K sum_i ceil(n_i / K)."""
        return self.images_per_identity * self._groups.num_samples

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Dataset indices, int64 [stop - start], at the stream positions [start, stop)."""
        assert 0 <= start <= stop
        return self.at(np.arange(start, stop))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Dataset indices, int64 [n], at any stream positions, int64 [n]; epoch = position // epoch_length."""
        size = self.images_per_identity
        turns, slots = np.divmod(positions, size)
        groups = self._groups.at(turns)
        identities = np.searchsorted(self._first_group, groups, side="right") - 1
        epochs = (turns // self._groups.num_samples).astype(np.uint64)
        keys = _mix(_key(self.seed, epochs) ^ _mix((identities.astype(np.uint64) + np.uint64(1)) * _GOLDEN))

        counts = self._first_image[identities + 1] - self._first_image[identities]
        places = ((groups - self._first_group[identities]) * size + slots) % counts
        within = _permuted(places.astype(np.uint64), counts.astype(np.uint64), _round_keys(keys))
        return self._by_identity(self._first_image[identities] + within.astype(np.int64))

    def replacements(self, index: int) -> Iterator[int]:
        """Candidates to stand in for an unreadable image: `index` itself, then the next ones of its identity, wrapping around; then the
        next ones of the set."""
        identity = self._labels[index] - self._lowest
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


class MixedOrder:
    """Several sets, each with its share of the stream. An epoch has as many groups of K positions (K = images_per_identity; 1: positions)
    as epochs of all sets together, and set s has a fixed number of them, places_s, nearest to its share. Where they stand is a permutation
    per epoch. Each set has an endless stream of groups of its own (UniformOrder or GroupedOrder), and place r of set s in epoch e takes
    group e * places_s + r of it. So a set shows every image equally often, whatever its share: with half the places that it has groups, it
    is through in two epochs.

    Memory as that of the sets' orders, and none per position. ValueError for an empty set, and for groups of sets of which one has a
    single image of an identity.
    """

    def __init__(self, source: Source, parts: Sequence[Part], images_per_identity: int, seed: int) -> None:
        self.images_per_identity = images_per_identity
        seeds = _key(seed, np.arange(len(parts), dtype=np.uint64)).tolist()
        self._orders = [_order_of_part(source, part, images_per_identity, own) for part, own in zip(parts, seeds, strict=True)]
        groups = sum(order.epoch_length for order in self._orders) // images_per_identity
        self._starts = np.array([part.start for part in parts])
        self._places = _places(np.array([part.weight for part in parts]), groups)
        self._first_place = np.concatenate([[0], np.cumsum(self._places)])
        self._permutation = UniformOrder(groups, seed)
        self._all = UniformOrder(len(source), seed)

    @property
    def epoch_length(self) -> int:
        """Stream positions of an epoch: as many as epochs of all sets have."""
        return self.images_per_identity * self._permutation.num_samples

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Dataset indices, int64 [stop - start], at the stream positions [start, stop)."""
        assert 0 <= start <= stop
        return self.at(np.arange(start, stop))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Dataset indices, int64 [n], at any stream positions, int64 [n]; epoch = position // epoch_length."""
        turns, slots = np.divmod(positions, self.images_per_identity)
        places = self._permutation.at(turns)
        sets = np.searchsorted(self._first_place, places, side="right") - 1
        epochs = turns // self._permutation.num_samples
        own = (epochs * self._places[sets] + places - self._first_place[sets]) * self.images_per_identity + slots
        indices = np.empty(len(positions), np.int64)
        for number, order in enumerate(self._orders):
            mine = np.flatnonzero(sets == number)
            indices[mine] = order.at(own[mine]) + self._starts[number]
        return indices

    def replacements(self, index: int) -> Iterator[int]:
        """Candidates to stand in for an unreadable image: those of its own set's order, then the next ones of all sets."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        start = int(self._starts[number])
        yield from (start + other for other in self._orders[number].replacements(index - start))
        yield from self._all.replacements(index)


def _order_of_part(source: Source, part: Part, images_per_identity: int, seed: int) -> UniformOrder | GroupedOrder:
    if part.start == part.stop:
        raise ValueError(f"{source.path}: no image of {part.name} is left, which has a share by data.weights; leave it out of data.train.")
    if images_per_identity == 1:
        return UniformOrder(part.stop - part.start, seed)
    images = slice(part.start, part.stop)
    alone = np.flatnonzero(np.bincount(source.labels[images]) == 1)
    if len(alone):
        raise ValueError(
            f"{source.path}: {part.name} has 1 image of identity {source.identities[alone[0]]!r} ({len(alone)} such identities), but with "
            "data.weights a group of data.images_per_identity images comes from one set: remove them, or leave out data.weights"
        )
    return GroupedOrder(source, images_per_identity, seed, images)


def _places(weights: np.ndarray, total: int) -> np.ndarray:
    """int64 [S], at least 1 each: `total` >= S divided in proportion to `weights`."""
    exact = weights / weights.sum() * total
    places = np.maximum(1, exact.astype(np.int64))
    while rest := total - int(places.sum()):
        places[np.argmax(exact - places if rest > 0 else places)] += np.sign(rest)
    return places


Order = UniformOrder | GroupedOrder | MixedOrder


def build_order(source: Source, images_per_identity: int, seed: int) -> Order:
    """The order of a data set: uniform for images_per_identity = 1, else in groups of that many; mixed if its parts have weights."""
    parts: Sequence[Part] = getattr(source, "parts", ())
    if any(part.weight for part in parts):
        return MixedOrder(source, parts, images_per_identity, seed)
    return UniformOrder(len(source), seed) if images_per_identity == 1 else GroupedOrder(source, images_per_identity, seed)


def part_of_rank(batch: int, rank: int, ranks: int, group: int = 1) -> range:
    """The places, in a batch of `batch` positions, that are this rank's: contiguous, in the order of ranks, in whole groups of `group`.
    Parts differ by at most one group, and the first ranks have more. Where there are fewer groups than ranks, the last ranks have none."""
    assert batch % group == 0 and 0 <= rank < ranks
    share, more = divmod(batch // group, ranks)
    first = rank * share + min(rank, more)
    return range(group * first, group * (first + share + (rank < more)))


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
