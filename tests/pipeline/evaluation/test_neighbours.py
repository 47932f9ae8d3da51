"""Neighbours against sorting every cosine in float64: ties, tiles, ranks and bad input."""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation import neighbours as module
from pipeline.evaluation.neighbours import neighbours


def exact(queries: torch.Tensor, gallery: torch.Tensor, k: int, excluded: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    unit = [torch.nn.functional.normalize(rows.double()).numpy() for rows in (queries, gallery)]
    cosine = np.round(unit[0] @ unit[1].T, 5)
    if excluded is not None:
        cosine[np.arange(len(cosine)), excluded] = -9
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(cosine, order, axis=1)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_equals_sorting_all_cosines_with_many_ties(data):
    """Directions on a circle in steps of 7.5 degrees, and zero rows, whose cosines are 0."""
    rows = st.lists(st.integers(0, 48), min_size=2, max_size=24)
    queries, gallery = (_on_a_circle(data.draw(rows)) for _ in range(2))
    excluded = data.draw(st.none() | st.integers(0, len(gallery) - 1))
    excluded = None if excluded is None else np.full(len(queries), excluded)
    k = data.draw(st.integers(1, len(gallery) - (excluded is not None)))
    with mock.patch.object(module, "TILE", data.draw(st.sampled_from([1, 5, 1024]))), _tile_of_spans():
        found, cosines = neighbours(queries, gallery, k, excluded_Q=excluded)
    want, want_cosines = exact(queries, gallery, k, excluded)
    assert np.array_equal(found, want)
    assert np.allclose(cosines, want_cosines, atol=1e-5)


def _on_a_circle(steps: list[int]) -> torch.Tensor:
    angle = torch.tensor(steps, dtype=torch.float64) * (torch.pi / 24)
    return (torch.stack([angle.cos(), angle.sin()], dim=1) * (torch.tensor(steps) < 48)[:, None]).float()


def _tile_of_spans():
    return mock.patch.object(module, "spans", lambda number, size: [slice(at, min(at + size, number)) for at in range(0, number, size)])


def test_random_rows_over_several_tiles():
    torch.manual_seed(0)
    queries, gallery = torch.randn(1030, 24), torch.randn(3100, 24)
    found, cosines = neighbours(queries, gallery, 7)
    unit = [torch.nn.functional.normalize(rows.double()) for rows in (queries, gallery)]
    want = (unit[0] @ unit[1].T).topk(7, dim=1)
    assert np.allclose(cosines, want.values.numpy(), atol=2e-6)
    assert (found == want.indices.numpy()).mean() > 0.999  # a few lie within the rounding of each other


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_change_no_bit(ranks, size):
    torch.manual_seed(1)
    queries, gallery = torch.randn(50, 20), torch.randn(5000, 20)
    want = neighbours(queries, gallery, 5)
    for found in ranks(size).run(_of_a_rank, queries, gallery):
        assert all(np.array_equal(one, other) for one, other in zip(found, want, strict=True))


def test_a_gallery_in_a_mapped_file_is_the_same(tmp_path):
    torch.manual_seed(2)
    queries, gallery = torch.randn(9, 20), torch.randn(2100, 20)
    np.save(tmp_path / "gallery.npy", gallery.numpy())
    found = neighbours(queries, np.load(tmp_path / "gallery.npy", mmap_mode="r"), 5)
    assert all(np.array_equal(one, other) for one, other in zip(found, neighbours(queries, gallery, 5), strict=True))


def test_a_row_that_is_not_finite_is_told_by_all_ranks(ranks):
    """Also by those in whose tiles it is not, or they would go on."""
    gallery = torch.ones(3000, 4)
    gallery[1500, 2] = torch.inf
    said = ranks(2).run(_refused, torch.ones(2, 4), gallery)
    assert said == ["the gallery: the embeddings of 1 of 3000 images are not finite; the model has diverged."] * 2


def _refused(*rows: torch.Tensor) -> str:
    with pytest.raises(ValueError) as error:
        _of_a_rank(*rows)
    return str(error.value)


def _of_a_rank(queries: torch.Tensor, gallery: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    return neighbours(queries, gallery, 5, rank=dist.get_rank(), world_size=dist.get_world_size())


@pytest.mark.parametrize(
    ("queries", "gallery", "k", "sentence"),
    [
        (torch.ones(2, 4), torch.ones(5, 8), 1, "the queries have width 4 and the gallery 8"),
        (torch.ones(2, 4), torch.ones(5, 4), 6, "6 neighbours were asked for, of 5 rows; ask for 1 to 5"),
        (torch.ones(2, 4), torch.ones(5, 4), 0, "0 neighbours were asked for"),
        (torch.full((2, 4), torch.nan), torch.ones(5, 4), 1, "the queries: the embeddings of 2 of 2 images are not finite"),
        (torch.ones(2, 4), torch.ones(5, 4) / 0, 1, "the gallery: the embeddings of 5 of 5 images are not finite"),
        (torch.ones(0, 4), torch.ones(5, 4), 1, "the queries: there are no embeddings"),
        (torch.ones(1, 4), torch.ones(0, 4), 1, "the gallery: there are no embeddings"),
    ],
)
def test_bad_input_ends_in_a_sentence(queries, gallery, k, sentence):
    with pytest.raises(ValueError, match=sentence):
        neighbours(queries, gallery, k)
