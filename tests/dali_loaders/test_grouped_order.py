"""P x K batches: whole groups of one identity, every image in every epoch, the same however the stream is cut up."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_loaders.order import GroupedOrder, UniformOrder, build_order


@dataclass
class Labelled:
    """As much of a source as an order looks at."""

    labels: np.ndarray
    path: str = "set"

    @property
    def identities(self):
        return [f"person{label}" for label in range(self.labels.max() + 1)]

    def __len__(self):
        return len(self.labels)


def labelled(counts, shuffle=None):
    labels = np.repeat(np.arange(len(counts)), counts)
    return Labelled(labels if shuffle is None else np.random.default_rng(shuffle).permutation(labels))


seeds = st.integers(0, 2**63 - 1)
sources = st.builds(labelled, st.lists(st.integers(2, 40), min_size=1, max_size=30), st.none() | st.integers(0, 9))
sizes = st.integers(2, 9)


@settings(deadline=None)
@given(sources, sizes, seeds, st.integers(0, 3))
def test_an_epoch_holds_every_image_in_groups_of_one_identity(source, size, seed, epoch):
    order = GroupedOrder(source, size, seed)
    counts = np.bincount(source.labels)
    assert order.epoch_length == size * sum(-(-count // size) for count in counts)
    indices = order.indices(epoch * order.epoch_length, (epoch + 1) * order.epoch_length)
    assert indices.dtype == np.int64
    groups = indices.reshape(-1, size)
    labels = source.labels[groups]
    assert (labels == labels[:, :1]).all()
    assert all(len(set(group)) == min(size, counts[label]) for group, label in zip(groups.tolist(), labels[:, 0], strict=True))
    assert np.array_equal(np.bincount(labels[:, 0]), -(-counts // size))
    times = np.bincount(indices, minlength=len(source))  # as often as any other image of the identity, or once more
    places = size * -(-counts // size)
    assert (times >= (places // counts)[source.labels]).all() and (times <= -(-places // counts)[source.labels]).all()


@settings(deadline=None)
@given(sources, sizes, seeds, st.lists(st.integers(0, 2000), min_size=2, max_size=8).map(sorted))
def test_the_stream_does_not_depend_on_where_it_is_cut(source, size, seed, cuts):
    order = GroupedOrder(source, size, seed)
    whole = order.indices(cuts[0], cuts[-1])
    parts = [order.indices(start, stop) for start, stop in itertools.pairwise(cuts)]
    assert np.array_equal(whole, np.concatenate(parts))


@settings(deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=12), sizes, seeds, st.integers(0, 9))
def test_where_the_images_lie_in_the_set_changes_nothing_else(counts, size, seed, shuffle):
    """The stream of a shuffled set is that of the sorted one, image k of an identity for image k."""
    ordered, shuffled = labelled(counts), labelled(counts, shuffle)
    sorting = np.argsort(shuffled.labels, kind="stable")
    streams = [GroupedOrder(source, size, seed).indices(0, 300) for source in (ordered, shuffled)]
    assert np.array_equal(sorting[streams[0]], streams[1])


def test_seeds_and_epochs_differ():
    source = labelled([7] * 500)
    order = GroupedOrder(source, 4, 1)
    first, second = order.indices(0, 4000), order.indices(4000, 8000)
    assert order.epoch_length == 4000
    for other in (second, GroupedOrder(source, 4, 2).indices(0, 4000)):
        assert (first != other).mean() > 0.98
        # Not only the groups stand elsewhere, they are also other groups.
        together = [{frozenset(group) for group in stream.reshape(-1, 4).tolist()} for stream in (first, other)]
        assert len(together[0] & together[1]) < 100  # a chance of 1/35 each


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_all_pairs_of_an_identity_are_equally_frequent(count):
    """Over epochs, for the first group and for the last, which wraps around."""
    order = GroupedOrder(labelled([count, 3, 2]), 2, 5)
    groups = order.indices(0, 4000 * order.epoch_length).reshape(-1, 2)
    groups = groups[groups[:, 0] < count]
    pairs, frequency = np.unique(groups @ [count, 1], return_counts=True)
    assert len(pairs) == count * (count - 1)
    expected = frequency.mean()
    assert ((frequency - expected) ** 2 / expected).sum() / (len(pairs) - 1) < 1 + 5 * np.sqrt(2 / (len(pairs) - 1))


def test_groups_of_an_identity_are_drawn_apart():
    """Where two groups of an epoch stand says nothing of each other: with 2 groups of 100, they are neighbours in 2 of 100 epochs."""
    order = GroupedOrder(labelled([8] + [4] * 98), 4, 3)
    epochs = order.indices(0, 3000 * order.epoch_length).reshape(3000, 100, 4)[:, :, 0]
    places = np.argsort(epochs >= 8, axis=1, kind="stable")[:, :2]
    assert abs((np.diff(places, axis=1) == 1).mean() - 0.02) < 0.01


def test_far_positions_of_a_large_set_cost_nothing():
    order = GroupedOrder(labelled([5] * 1_000_000), 4, 3)
    indices = order.indices(7_345_678_902, 7_345_680_903)
    assert len(indices) == 2001 and indices.min() >= 0 and indices.max() < 5_000_000
    assert abs(indices.mean() / 5e6 - 0.5) < 0.05
    assert (np.diff(indices[2:-3].reshape(-1, 4) // 5) == 0).all()


@pytest.mark.parametrize("shuffle", [None, 1])
def test_a_replacement_is_of_the_same_identity_where_there_is_one(shuffle):
    source = labelled([3, 2, 4], shuffle)
    mine = np.flatnonzero(source.labels == 2)
    found = list(itertools.islice(GroupedOrder(source, 2, 1).replacements(int(mine[2])), 13))
    assert found[:4] == [mine[2], mine[3], mine[0], mine[1]]
    assert found[4:] == [(mine[2] + step) % 9 for step in range(9)]
    assert list(UniformOrder(4, 1).replacements(2)) == [2, 3, 0, 1]


def test_one_image_per_identity_is_the_uniform_order():
    source = labelled([1, 5, 2])
    assert np.array_equal(build_order(source, 1, 7).indices(0, 30), UniformOrder(8, 7).indices(0, 30))
    assert isinstance(build_order(labelled([2, 5]), 2, 7), GroupedOrder)


def test_streams_stay_what_they_are():
    """A run that was begun with an earlier version goes on with the same images."""
    assert UniformOrder(1000, 1).indices(995, 1003).tolist() == [580, 111, 97, 710, 275, 584, 923, 658]
    assert GroupedOrder(labelled([5, 2, 3]), 2, 1).indices(8, 16).tolist() == [2, 0, 9, 7, 7, 8, 8, 9]


def test_what_has_no_pairs_is_refused():
    with pytest.raises(
        ValueError, match=r"set: identity 'person1' has 1 image\(s\), but data.images_per_identity = 4 .*\(2 such identities\).*=1"
    ):
        GroupedOrder(labelled([3, 1, 2, 1]), 4, 1)
    with pytest.raises(ValueError, match=r"groups of 1 image\(s\) have no pairs"):
        GroupedOrder(labelled([3, 2]), 1, 1)
