"""The order is a permutation per epoch, the same however it is cut up; the augmentation's numbers are uniform and independent."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_loaders.order import UniformOrder, part_of_rank, uniform

seeds = st.integers(0, 2**63 - 1)


@settings(deadline=None)
@given(st.integers(1, 5000), seeds, st.integers(0, 5))
def test_an_epoch_is_a_permutation(n, seed, epoch):
    indices = UniformOrder(n, seed).indices(epoch * n, (epoch + 1) * n)
    assert indices.dtype == np.int64
    assert np.array_equal(np.sort(indices), np.arange(n))


@settings(deadline=None)
@given(st.integers(1, 300), seeds, st.lists(st.integers(0, 1000), min_size=2, max_size=8).map(sorted))
def test_the_stream_does_not_depend_on_where_it_is_cut(n, seed, cuts):
    order = UniformOrder(n, seed)
    whole = order.indices(cuts[0], cuts[-1])
    parts = [order.indices(start, stop) for start, stop in itertools.pairwise(cuts)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_seeds_and_epochs_differ():
    first = UniformOrder(1000, 1).indices(0, 1000)
    assert (first != UniformOrder(1000, 2).indices(0, 1000)).mean() > 0.98
    assert (first != UniformOrder(1000, 1).indices(1000, 2000)).mean() > 0.98


@pytest.mark.parametrize("n", [2, 3, 7, 16, 100])
def test_every_image_is_equally_likely_everywhere(n):
    epochs = 4000
    table = UniformOrder(n, 5).indices(0, n * epochs).reshape(epochs, n)
    for place in (0, n // 2, n - 1):
        counts = np.bincount(table[:, place], minlength=n)
        assert _chi_square_per_degree(counts) < 1 + 5 * np.sqrt(2 / (n - 1))


@pytest.mark.parametrize("n", [9, 64, 1000])
def test_neighbours_are_independent(n):
    """The step from one image to the next takes all values about equally often."""
    epochs = 40_000 // n
    table = UniformOrder(n, 11).indices(0, n * epochs).reshape(epochs, n)
    steps = np.diff(table, axis=1) % n
    assert _chi_square_per_degree(np.bincount(steps.ravel(), minlength=n)[1:]) < 1 + 5 * np.sqrt(2 / (n - 2))


def test_all_orders_of_a_tiny_set_are_equally_frequent():
    orders = UniformOrder(4, 0).indices(0, 4 * 10_000).reshape(-1, 4)
    codes = np.unique(orders @ [64, 16, 4, 1], return_counts=True)[1]
    assert len(codes) == 24
    assert _chi_square_per_degree(codes) < 1 + 5 * np.sqrt(2 / 23)


def test_far_positions_of_a_huge_set_cost_nothing():
    indices = UniformOrder(100_000_000, 3).indices(7_345_678_901, 7_345_679_901)
    assert len(np.unique(indices)) == 1000
    assert indices.min() >= 0
    assert indices.max() < 100_000_000
    assert abs(indices.mean() / 1e8 - 0.5) < 0.05


def test_an_empty_set_has_no_order():
    with pytest.raises(ValueError, match="at least one sample"):
        UniformOrder(0, 1)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(0, 2**40), st.integers(1, 9))
def test_uniform_depends_on_its_position_alone(seed, start, columns):
    positions = np.arange(start, start + 50)
    whole = uniform(seed, 1, positions, columns)
    assert whole.shape == (50, columns)
    assert np.array_equal(whole[20:30], uniform(seed, 1, positions[20:30], columns))
    assert not np.array_equal(whole, uniform(seed, 2, positions, columns))


def test_uniform_is_uniform_and_its_columns_are_independent():
    draw = uniform(1, 1, np.arange(50_000), 4)
    assert draw.min() >= 0 and draw.max() < 1
    for column in draw.T:
        assert _chi_square_per_degree(np.histogram(column, 100, (0, 1))[0]) < 1 + 5 * np.sqrt(2 / 99)
    assert np.abs(np.corrcoef(np.hstack([draw[:-1], draw[1:]]).T) - np.eye(8)).max() < 0.03


def _chi_square_per_degree(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum() / (len(counts) - 1))


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 5))
def test_parts_of_ranks_tile_the_batch_in_whole_groups(groups, ranks, group):
    parts = [part_of_rank(groups * group, rank, ranks, group) for rank in range(ranks)]
    assert [place for part in parts for place in part] == list(range(groups * group))
    sizes = [len(part) for part in parts]
    assert all(size % group == 0 for size in sizes) and max(sizes) - min(sizes) in (0, group) and sizes == sorted(sizes, reverse=True)
