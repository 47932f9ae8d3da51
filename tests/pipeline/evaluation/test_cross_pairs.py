"""Queries against a gallery, held against a float64 computation that keeps every score: ties, tiles, distractors, ranks, bad input."""

from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.evaluation import cross_pairs as module
from pipeline.evaluation.cross_pairs import RANKS, cross, cross_pairs
from pipeline.evaluation.report import OperatingPoints, Report


def exact(queries: torch.Tensor, gallery: torch.Tensor, of_queries: np.ndarray, of_gallery: np.ndarray) -> dict:
    """Every score kept, float64; those that round to the same 1e-6 are ties."""
    unit = [torch.nn.functional.normalize(rows.double()).numpy() for rows in (queries, gallery)]
    score = np.round(unit[0] @ unit[1].T, 6)
    same = (of_queries[:, None] == of_gallery) & (of_gallery >= 0)
    genuine, impostor = score[same], score[~same]
    thresholds = np.append(np.inf, np.unique(score)[::-1])
    far = np.array([(impostor >= threshold).mean() for threshold in thresholds])
    tar = np.array([(genuine >= threshold).mean() for threshold in thresholds])
    ahead = np.array([(row[~mates] >= row[mates].max()).sum() for row, mates in zip(score, same, strict=True) if mates.any()])
    return {
        "eer": np.interp(0.0, far - (1 - tar), far),
        "tar_at_far": {f"1e-{k}": tar[far <= 10.0**-k].max() if len(impostor) >= 10**k else None for k in range(1, 7)},
        "ranks": [float((ahead < k).mean()) for k in RANKS],
        "pairs": (len(genuine), len(impostor)),
    }


def assert_equals_exact(report: Report, *of: object) -> None:
    want = exact(*of)
    assert report.eer == pytest.approx(want["eer"], abs=1e-12)
    assert report.tar_at_far == pytest.approx(want["tar_at_far"], abs=1e-12)
    assert [report.figures[f"rank{k}"] for k in RANKS] == pytest.approx(want["ranks"], abs=1e-12)
    assert (report.genuine_pairs, report.impostor_pairs) == want["pairs"]
    assert (report.genuine_histogram.sum(), report.impostor_histogram.sum()) == want["pairs"]


def drawn(queries: int, gallery: int, identities: int, width: int = 16, seed: int = 0) -> tuple:
    """Of the gallery, a third are distractors."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(identities + 1, width))
    labels = rng.integers(0, identities, queries), np.where(rng.random(gallery) < 1 / 3, -1, rng.integers(0, identities, gallery))
    rows = [torch.from_numpy(centres[of] + rng.normal(size=(len(of), width))).float() for of in labels]
    return *rows, *labels


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_equals_keeping_all_scores_with_many_ties(data):
    """Directions on a circle in steps of 7.5 degrees, and zero rows, whose cosines are 0."""
    images = st.lists(st.tuples(st.integers(0, 48), st.integers(-1, 3)), min_size=1, max_size=40)
    queries, gallery = (np.array(data.draw(images)) for _ in range(2))
    same = (queries[:, 1, None] == gallery[:, 1]) & (gallery[:, 1] >= 0)
    assume(same.any() and not same.all())
    rows = [_on_a_circle(images[:, 0]) for images in (queries, gallery)]
    with mock.patch.object(module, "TILE", data.draw(st.sampled_from([1, 7, 1024]))):
        report = cross_pairs(*rows, queries[:, 1], gallery[:, 1])
    assert_equals_exact(report, *rows, queries[:, 1], gallery[:, 1])


def _on_a_circle(steps: np.ndarray) -> torch.Tensor:
    angle = torch.from_numpy(steps).double() * (torch.pi / 24)
    return (torch.stack([angle.cos(), angle.sin()], dim=1) * torch.from_numpy(steps < 48)[:, None]).float()


@pytest.mark.parametrize(("tile", "seed"), [(1024, 0), (7, 1), (32, 2)])
def test_equals_keeping_all_scores_of_random_rows(monkeypatch, tile, seed):
    monkeypatch.setattr(module, "TILE", tile)
    of = drawn(90, 150, 25, seed=seed)
    report = cross_pairs(*of)
    assert_equals_exact(report, *of)
    assert report.gallery == 150 and report.distractors == (of[3] < 0).sum()
    assert report.queries_with_mate == np.isin(of[2], of[3]).sum()


def test_nearest_impostors_of_each_query_are_in_its_own_place():
    """Queries are sorted inside; whoever has the cosines must find them at the queries' numbers."""
    queries, gallery, of_queries, of_gallery = drawn(40, 300, 12)
    found = cross(queries, gallery, of_queries, of_gallery)
    unit = [torch.nn.functional.normalize(rows.double()) for rows in (queries, gallery)]
    score = (unit[0] @ unit[1].T).numpy()
    same = (of_queries[:, None] == of_gallery) & (of_gallery >= 0)
    want = -np.sort(-np.where(same, -9, score), axis=1)[:, : max(RANKS)]
    assert np.allclose((found.impostors_QR - module.FIRST) * (2 / module.STEPS) - 1, want, atol=2e-6)
    mates = np.where(same, score, -9).max(axis=1)
    assert np.allclose(((found.mate_Q - module.FIRST) * (2 / module.STEPS) - 1)[mates > -9], mates[mates > -9], atol=2e-6)
    assert (found.mate_Q[mates == -9] == 0).all()


def test_distractors_are_nobody_not_even_to_queries_without_identity():
    report = cross_pairs(torch.eye(4), torch.eye(4), np.array([0, 1, -1, -1]), np.array([0, -1, -1, -1]))
    assert (report.genuine_pairs, report.impostor_pairs, report.queries_with_mate) == (1, 15, 1)
    assert report.rank1 == 1.0


def test_an_impostor_that_is_as_near_as_the_mate_is_ahead_of_it():
    found = cross(torch.ones(1, 3), torch.ones(3, 3), np.array([5]), np.array([5, -1, 6]))
    assert [found.hits(k).tolist() for k in (1, 5)] == [[False], [True]]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_change_no_bit(ranks, size):
    of = drawn(1100, 2300, 300, width=24)
    want = cross_pairs(*of)
    for report in ranks(size).run(_of_a_rank, *of):
        assert report.as_dict() == want.as_dict()
        assert all(np.array_equal(axis, same) for axis, same in zip(report.roc, want.roc, strict=True))


def _of_a_rank(*of: object) -> Report:
    return cross_pairs(*of, rank=dist.get_rank(), world_size=dist.get_world_size())


def test_both_conventions_are_named_where_the_protocol_takes_the_nearest_rate():
    of = drawn(60, 80, 10, seed=4)
    report, plain = cross(*of).report(nearest=True), cross_pairs(*of)
    assert report.tar_at_far_conservative == plain.tar_at_far
    assert report.threshold_at_far_conservative == plain.threshold_at_far
    assert report.tar_at_far["1e-3"] >= plain.tar_at_far["1e-3"]
    assert "tar_at_far_conservative/1e-1" not in plain.figures


@pytest.mark.parametrize(
    ("of", "sentence"),
    [
        ((torch.ones(2, 3), torch.ones(2, 4), [0, 1], [0, 1]), "probes have width 3 and x.tar 4"),
        ((torch.ones(0, 3), torch.ones(2, 3), [], [0, 1]), "probes: there are no embeddings to compare"),
        ((torch.full((2, 3), torch.nan), torch.ones(2, 3), [0, 1], [0, 1]), "probes: the embeddings of 2 of 2 images are not finite"),
        ((torch.ones(2, 3), torch.ones(2, 3), [0, 1], [2, -1]), "probes and x.tar make no genuine pair"),
        ((torch.ones(2, 3), torch.ones(2, 3), [1, 1], [1, 1]), "probes and x.tar make no impostor pair"),
    ],
)
def test_what_cannot_be_compared_ends_in_a_sentence(of, sentence):
    queries, gallery, of_queries, of_gallery = of
    with pytest.raises(ValueError, match=sentence):
        cross_pairs(queries, gallery, np.array(of_queries, int), np.array(of_gallery, int), names=("probes", "x.tar"))


def test_rates_of_more_pairs_than_int64_holds_times_the_inverse():
    """Half a million images have 1.2e11 impostor pairs; 1e8 times that many overflow."""
    points = OperatingPoints(np.array([np.inf, 0.9, 0.5, 0.1]), np.array([0, 4, 8, 10]), np.array([0, 1200, 1260, 120_000_000_000]))
    assert points.at_far(10**8) == (0.4, 0.9)
    assert points.at_far(10**8, nearest=True) == (0.4, 0.9)
    assert points.at_far(10**7, nearest=True) == points.at_far(10**7) == (0.8, 0.5)
