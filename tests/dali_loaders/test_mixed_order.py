"""Sets with weights: fixed shares of every epoch, each set's images in turn, the same however the stream is cut up."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_loaders.order import MixedOrder, UniformOrder, _places, build_order
from dali_loaders.sources import Part


@dataclass
class Labelled:
    """As much of a source as an order looks at: sets of identities of `counts` images each, with identities of their own."""

    counts: list[list[int]]
    weights: list[float]
    path: str = "a,b"

    def __post_init__(self):
        flat = [count for counts in self.counts for count in counts]
        self.labels = np.repeat(np.arange(len(flat)), flat)
        self.identities = [f"person{label}" for label in range(len(flat))]
        ends = np.cumsum([sum(counts) for counts in self.counts]).tolist()
        self.parts = [
            Part(f"set{n}", start, end, weight) for n, (start, end, weight) in enumerate(zip([0, *ends], ends, self.weights, strict=False))
        ]

    def __len__(self):
        return len(self.labels)

    def sets(self, indices):
        return np.searchsorted([part.start for part in self.parts], indices, side="right") - 1


seeds = st.integers(0, 2**63 - 1)
sizes = st.integers(1, 5)
several = st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=8), min_size=1, max_size=4).flatmap(
    lambda counts: st.builds(Labelled, st.just(counts), st.lists(st.floats(0.01, 100), min_size=len(counts), max_size=len(counts)))
)


@settings(deadline=None)
@given(several, sizes, seeds)
def test_every_epoch_has_the_shares_and_every_set_runs_through_all_its_images(source, size, seed):
    order = build_order(source, size, seed)
    assert isinstance(order, MixedOrder)
    groups = [sum(-(-n // size) for n in counts) for counts in source.counts]
    assert order.epoch_length == size * sum(groups)
    exact = np.array(source.weights) / sum(source.weights) * sum(groups)
    epochs = 3
    indices = order.indices(0, epochs * order.epoch_length)
    sets = source.sets(indices).reshape(epochs, -1)
    for row in sets:
        places = np.bincount(row, minlength=len(groups)) / size
        assert (np.abs(places - exact) <= len(groups)).all() and (places >= 1).all()
        assert np.array_equal(row, np.repeat(row[::size], size))
    for number, part in enumerate(source.parts):
        mine = indices[sets.ravel() == number].reshape(-1, size) - part.start
        # Epoch by epoch, the groups are those of the set's own stream, though in another order within the epoch.
        own = order._orders[number].indices(0, mine.size).reshape(-1, size)
        for chunk in np.split(np.arange(len(mine)), epochs):
            assert sorted(map(tuple, mine[chunk])) == sorted(map(tuple, own[chunk]))


@settings(deadline=None)
@given(several, sizes, seeds, st.lists(st.integers(0, 1000), min_size=2, max_size=8).map(sorted))
def test_the_stream_does_not_depend_on_where_it_is_cut(source, size, seed, cuts):
    order = build_order(source, size, seed)
    whole = order.indices(cuts[0], cuts[-1])
    parts = [order.indices(start, stop) for start, stop in itertools.pairwise(cuts)]
    assert np.array_equal(whole, np.concatenate(parts))


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=9), st.integers(0, 1000))
def test_places_add_up(weights, more):
    total = len(weights) + more
    places = _places(np.array(weights), total)
    assert places.sum() == total and places.min() >= 1
    assert np.abs(places - np.array(weights) / sum(weights) * total).max() <= len(weights)


def test_weights_by_size_show_every_image_once():
    source = Labelled([[2, 3], [5, 5, 5]], [5.0, 15.0])
    indices = build_order(source, 1, 3).indices(0, 40).reshape(2, 20)
    assert np.array_equal(np.sort(indices), np.tile(np.arange(20), (2, 1)))


def test_a_double_share_shows_every_image_twice_and_a_smaller_one_takes_several_epochs():
    source = Labelled([[100], [300]], [1.0, 1.0])  # 200 places each
    order = build_order(source, 1, 3)
    epochs = order.indices(0, 1200).reshape(3, 400)
    for epoch in epochs:
        assert np.array_equal(np.bincount(epoch[epoch < 100]), np.full(100, 2))
    assert len(set(epochs[0][epochs[0] >= 100].tolist())) == 200  # none twice
    assert np.array_equal(np.bincount(epochs[epochs >= 100] - 100), np.full(300, 2))


def test_no_weights_is_one_order_for_all():
    source = Labelled([[2, 3], [5]], [0.0, 0.0])
    assert isinstance(build_order(source, 1, 7), UniformOrder)


def test_sets_are_spread_evenly_and_drawn_apart():
    source = Labelled([[1000], [1000]], [3.0, 1.0])
    indices = build_order(source, 1, 1).indices(0, 2000)
    batches = (indices < 1000).reshape(20, 100).sum(axis=1)
    assert abs(batches.mean() - 75) < 1e-9 and batches.min() > 60 and batches.max() < 90
    streams = [order.indices(0, 1000) for order in build_order(source, 1, 1)._orders]
    assert (streams[0] != streams[1]).mean() > 0.98


def test_far_positions_cost_nothing():
    source = Labelled([[5] * 100_000, [5] * 200_000], [9.0, 1.0])
    indices = build_order(source, 4, 3).indices(7_345_678_904, 7_345_680_904)
    assert abs((source.sets(indices) == 0).mean() - 0.9) < 0.05
    groups = source.labels[indices].reshape(-1, 4)
    assert (groups == groups[:, :1]).all()


def test_a_replacement_is_of_the_same_set_first():
    source = Labelled([[2, 2], [3, 2]], [1.0, 1.0])
    assert list(build_order(source, 1, 1).replacements(7)) == [7, 8, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 6]
    found = list(build_order(source, 2, 1).replacements(8))
    assert found[:2] == [8, 7] and set(found[:7]) == set(range(4, 9)) and set(found) == set(range(9))


def test_streams_stay_what_they_are():
    source = Labelled([[5, 2], [3, 4, 2]], [1.0, 2.0])
    assert build_order(source, 1, 1).indices(10, 20).tolist() == [1, 7, 9, 3, 8, 14, 8, 11, 7, 0]
    assert build_order(source, 2, 1).indices(10, 20).tolist() == [15, 14, 9, 8, 15, 14, 13, 11, 8, 9]


def test_sentences():
    source = Labelled([[3, 1], [1, 3]], [1.0, 1.0])
    source.labels = np.array([0, 0, 0, 1, 1, 0, 0, 0])  # every identity has several images, but not in each set
    source.identities = ["person0", "person1"]
    with pytest.raises(ValueError, match=r"set0 has 1 image of identity 'person1' \(1 such identities\), but with data\.weights a group"):
        build_order(source, 2, 1)
    source.parts[1] = Part("set1", 8, 8, 1.0)
    with pytest.raises(ValueError, match=r"a,b: no image of set1 is left, which has a share by data\.weights"):
        build_order(source, 1, 1)
