"""all_pairs against a float64 computation that sorts every score, on ties, separations, blocks and shares of ranks."""

import itertools
import json
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.evaluation import all_pairs as module
from pipeline.evaluation import score_bins
from pipeline.evaluation.all_pairs import all_pairs
from pipeline.evaluation.embed import Breaks
from pipeline.evaluation.report import HISTOGRAM_EDGES, Report
from pipeline.evaluation.tiles import work_on


def exact(embeddings: torch.Tensor, labels: np.ndarray) -> dict:
    """Every score kept, float64; scores that round to the same 1e-6 are ties, because inputs are float32."""
    x = embeddings.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    score = np.round(x @ x.T, 6)
    genuine = np.array([score[i, j] for i, j in itertools.combinations(range(len(x)), 2) if labels[i] == labels[j]])
    impostor = np.array([score[i, j] for i, j in itertools.combinations(range(len(x)), 2) if labels[i] != labels[j]])
    thresholds = np.append(np.inf, np.unique(np.concatenate([genuine, impostor]))[::-1])
    tar = np.array([(genuine >= t).mean() for t in thresholds])
    far = np.array([(impostor >= t).mean() for t in thresholds])
    hits = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        mates = [score[i, j] for j in others if labels[j] == labels[i]]
        if mates:
            hits.append(max(mates) > max(score[i, j] for j in others if labels[j] != labels[i]))
    return {
        "eer": np.interp(0.0, far - (1 - tar), far),
        "tar_at_far": {f"1e-{k}": tar[far <= 10.0**-k].max() if len(impostor) >= 10**k else None for k in range(1, 7)},
        "rank1": np.mean(hits),
        "far": far,
        "tar": tar,
        "genuine": genuine,
        "impostor": impostor,
    }


def assert_equals_exact(report: Report, embeddings: torch.Tensor, labels: np.ndarray) -> None:
    want = exact(embeddings, labels)
    assert report.eer == pytest.approx(want["eer"], abs=1e-12)
    assert report.tar_at_far == pytest.approx(want["tar_at_far"], abs=1e-12)
    assert report.rank1 == pytest.approx(want["rank1"], abs=1e-12)
    assert (report.genuine_pairs, report.impostor_pairs) == (len(want["genuine"]), len(want["impostor"]))
    assert np.array_equal(report.genuine_histogram.sum(), len(want["genuine"]))
    points = set(zip(want["far"].round(12), want["tar"].round(12), strict=True))
    assert set(zip(*(axis.round(12) for axis in report.roc), strict=True)) <= points


def clusters(identities: int, each: int, noise: float, width: int = 16, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    labels = np.repeat(np.arange(identities), each)
    centres = torch.randn(identities, width, generator=generator)
    return centres[labels] + noise * torch.randn(len(labels), width, generator=generator), labels


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 47), st.integers(0, 3)), min_size=3, max_size=14))
def test_equals_sorting_all_scores_with_many_ties(images):
    """Directions on a circle in steps of 7.5 degrees: few distinct cosines, at least 0.008 apart."""
    angle = np.array([a for a, _ in images]) * (2 * np.pi / 48)
    labels = np.array([label for _, label in images])
    _, counts = np.unique(labels, return_counts=True)
    assume(len(counts) > 1 and counts.max() > 1)
    embeddings = torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)], axis=1)).float()
    assert_equals_exact(all_pairs(embeddings, labels, resamples=0), embeddings, labels)


@pytest.mark.parametrize(("noise", "seed"), [(0.3, 0), (1.0, 1), (3.0, 2)])
def test_equals_sorting_all_scores_of_random_embeddings(noise, seed):
    embeddings, labels = clusters(12, 6, noise, seed=seed)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    embeddings, labels = embeddings[torch.from_numpy(shuffled)], labels[shuffled]
    report = all_pairs(embeddings, labels)
    assert_equals_exact(report, embeddings, labels)
    genuine, _ = np.histogram(exact(embeddings, labels)["genuine"], bins=HISTOGRAM_EDGES)
    assert np.array_equal(report.genuine_histogram, genuine)


def test_threshold_at_eer_accepts_what_the_roc_says():
    embeddings, labels = clusters(20, 5, 1.5)
    report, want = all_pairs(embeddings, labels), exact(embeddings, labels)
    far = (want["impostor"] >= report.threshold_at_eer).mean()
    frr = (want["genuine"] < report.threshold_at_eer).mean()
    assert abs(far - report.eer) <= 1 / len(want["impostor"]) + 1 / len(want["genuine"])
    assert abs(frr - report.eer) <= 1 / len(want["impostor"]) + 1 / len(want["genuine"])


def test_perfect_separation():
    labels = np.repeat(np.arange(8), 3)
    report = all_pairs(torch.eye(8)[torch.from_numpy(labels)], labels)
    assert (report.eer, report.rank1, report.tar_at_far["1e-2"]) == (0.0, 1.0, 1.0)
    assert report.tar_at_far["1e-3"] is None  # 252 impostor pairs
    assert 0 < report.threshold_at_eer <= 1


@pytest.mark.parametrize("row", [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
def test_collapsed_embeddings_score_as_chance(row):
    labels = np.repeat(np.arange(10), 3)
    report = all_pairs(torch.tensor([row]).repeat(30, 1), labels)
    assert (report.eer, report.rank1, report.tar_at_far["1e-1"]) == (0.5, 0.0, 0.0)


def test_far_is_unreached_below_one_impostor_pair():
    """Identities of 2 and 50 images make 100 impostor pairs, one image less 98."""
    embeddings = clusters(1, 52, 1.0)[0]
    labels = np.array([0] * 2 + [1] * 50)
    assert all_pairs(embeddings, labels).tar_at_far["1e-2"] is not None
    assert all_pairs(embeddings[:-1], labels[:-1]).tar_at_far["1e-2"] is None


def test_identity_with_one_image_adds_impostor_pairs_only():
    embeddings, labels = clusters(4, 3, 0.5)
    alone = all_pairs(torch.cat([embeddings, torch.randn(1, 16)]), np.append(labels, 9))
    base = all_pairs(embeddings, labels)
    assert (alone.genuine_pairs, alone.impostor_pairs) == (base.genuine_pairs, base.impostor_pairs + 12)
    assert (alone.images, alone.identities) == (13, 5)


@pytest.mark.parametrize("tile", [1, 7, 16])
def test_tiles_change_nothing(monkeypatch, tile):
    """Also where an identity fills several tiles, and where a tile holds genuine pairs alone."""
    embeddings, labels = clusters(15, 4, 1.2)
    labels[:32] = 0
    monkeypatch.setattr(module, "TILE", tile)
    assert_equals_exact(all_pairs(embeddings, labels, resamples=0), embeddings, labels)


def test_tiles_of_large_sets_are_cut_in_both_directions():
    """Rows alone would be 42 high for 100,000 images."""
    tiles = module._Sorted(torch.zeros(100_000, 1), np.arange(100_000) // 10).tiles()
    assert {(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in tiles} <= {(1024, 1024), (1024, 672), (672, 672)}
    assert sum((r.stop - r.start) * (c.stop - c.start) * (1 + (r != c)) for r, c in tiles) == 10**10


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_change_no_bit(ranks, size):
    embeddings, labels = clusters(150, 8, 1.5, width=40)
    want = all_pairs(embeddings, labels, resamples=20)
    for report in ranks(size).run(_all_pairs_of_a_rank, embeddings, labels):
        assert report.as_dict() == want.as_dict()
        assert all(np.array_equal(axis, same) for axis, same in zip(report.roc, want.roc, strict=True))


def _all_pairs_of_a_rank(embeddings: torch.Tensor, labels: np.ndarray) -> Report:
    return all_pairs(embeddings, labels, rank=dist.get_rank(), world_size=dist.get_world_size(), resamples=20)


def test_threads_change_no_bit_and_keep_their_number():
    embeddings, labels = clusters(150, 8, 1.5, width=40)
    before, reports = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            reports.append(all_pairs(embeddings, labels, resamples=20).as_dict())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert reports[0] == reports[1] == reports[2]


def test_counts_that_overflow_int32_are_kept(monkeypatch):
    monkeypatch.setattr(score_bins, "FLUSH", 100)
    monkeypatch.setattr(module, "TILE", 8)
    embeddings, labels = clusters(15, 4, 1.2)
    assert_equals_exact(all_pairs(embeddings, labels, resamples=0), embeddings, labels)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_rank_k_counts_impostors_that_are_as_near_as_the_nearest_mate(data):
    """More than ten impostors, of which many tie."""
    number = data.draw(st.integers(3, 40))
    angle = np.array(data.draw(st.lists(st.integers(0, 47), min_size=number, max_size=number)))
    labels = np.array(data.draw(st.lists(st.integers(0, 12), min_size=number, max_size=number)))
    _, counts = np.unique(labels, return_counts=True)
    assume(len(counts) > 1 and counts.max() > 1)
    embeddings = torch.from_numpy(np.stack([np.cos(angle * np.pi / 24), np.sin(angle * np.pi / 24)], axis=1)).float()
    score = np.round(np.cos((angle[:, None] - angle) * np.pi / 24), 6)
    beaten = []
    for i, label in enumerate(labels):
        mates = score[i, (labels == label) & (np.arange(number) != i)]
        if len(mates):
            beaten.append((score[i, labels != label] >= mates.max()).sum())
    with mock.patch.object(module, "TILE", data.draw(st.sampled_from([5, 1024]))):
        report = all_pairs(embeddings, labels, resamples=0)
    assert [report.rank1, report.rank5, report.rank10] == [(np.array(beaten) < k).mean() for k in (1, 5, 10)]


def test_low_rates_and_their_thresholds_where_pairs_suffice():
    """1,500 images have a million impostor pairs: 1e-6 is reached by one false accept at most, 1e-7 is not asked for."""
    embeddings, labels = clusters(750, 2, 0.4)
    report = all_pairs(embeddings, labels, resamples=0)
    assert report.impostor_pairs > 10**6
    assert list(report.tar_at_far) == list(report.fnmr_at_fmr) == list(report.threshold_at_far) == [f"1e-{k}" for k in range(1, 7)]
    unit = torch.nn.functional.normalize(embeddings.double())
    impostors, genuine = _scores_of(unit, labels)
    for name, threshold in report.threshold_at_far.items():
        allowed = int(len(impostors) * float(name) + 1e-6)
        assert (impostors >= threshold).sum() <= allowed < (impostors >= threshold - 3e-6).sum() + (genuine >= threshold - 3e-6).sum()
        assert report.tar_at_far[name] == pytest.approx((genuine >= threshold).mean(), abs=2 / len(genuine))
        assert report.fnmr_at_fmr[name] == pytest.approx(1 - report.tar_at_far[name], abs=1e-15)


def _scores_of(unit: torch.Tensor, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.triu_indices(len(labels), 1)
    scores = (unit @ unit.T).numpy()[first, second]
    return scores[labels[first] != labels[second]], scores[labels[first] == labels[second]]


def test_nothing_accepted_has_no_threshold():
    report = all_pairs(torch.ones(30, 4), np.arange(30) // 3)
    assert report.tar_at_far["1e-1"] == 0 and report.threshold_at_far["1e-1"] is None


def test_compact_roc_of_many_points_keeps_its_ends_and_is_exact():
    embeddings, labels = clusters(60, 5, 1.5)
    far, tar = all_pairs(embeddings, labels).roc
    want = exact(embeddings, labels)
    assert len(far) <= 2000 < len(want["far"])
    assert (far[0], far[-1], tar[-1]) == (0.0, 1.0, 1.0)
    assert np.all(np.diff(far) > 0) and np.all(np.diff(tar) >= 0)
    for f, t in zip(far[::50], tar[::50], strict=True):
        assert t == pytest.approx(want["tar"][want["far"] <= f + 1e-12].max(), abs=1e-12)


def test_as_dict_is_json_with_the_promised_keys():
    report = json.loads(json.dumps(all_pairs(*clusters(5, 3, 1.0)).as_dict()))
    assert {"eer", "tar_at_far", "rank1", "images", "identities"} <= set(report)
    assert report["tar_at_far"]["1e-4"] is None


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [([0, 1, 2], "no identity has two images"), ([4, 4, 4], "1 identities make no impostor pair"), ([], "0 identities")],
)
def test_sets_without_pairs_end_in_a_sentence(labels, sentence):
    with pytest.raises(ValueError, match=f"lfw.tar: .*{sentence}"):
        all_pairs(torch.randn(len(labels), 4), np.array(labels, dtype=np.int64), name="lfw.tar")


def test_embeddings_that_are_not_finite_end_in_a_sentence():
    embeddings, labels = clusters(3, 3, 1.0)
    with pytest.raises(ValueError, match="embeddings of 9 of 9 images are not finite"):
        all_pairs(embeddings.double() * 1e200, labels)  # whose length is not
    embeddings[4, 2] = torch.nan
    with pytest.raises(ValueError, match="embeddings of 1 of 9 images are not finite"):
        all_pairs(embeddings, labels)


@pytest.mark.parametrize(("factor", "kind"), [(1e30, torch.float32), (1e-30, torch.float32), (1e-3, torch.float16)])
def test_the_length_of_embeddings_does_not_matter(factor, kind):
    """Squares of 1e30 are infinite in float32, which would make a row of zeros of it."""
    embeddings, labels = clusters(10, 3, 0.1)
    embeddings = embeddings.half().to(torch.float64)
    report, want = all_pairs((embeddings * factor).to(kind), labels), all_pairs(embeddings, labels)
    tolerance = 1e-2 if kind == torch.float16 else 1e-5
    assert report.eer == want.eer and report.threshold_at_far["1e-2"] == pytest.approx(want.threshold_at_far["1e-2"], abs=tolerance)


def test_zero_embeddings_and_single_images():
    report = all_pairs(torch.zeros(6, 4), np.arange(6) // 2)
    assert (report.eer, report.rank1) == (0.5, 0.0)
    embeddings, _ = clusters(10, 3, 0.1)
    alone = all_pairs(embeddings, np.concatenate([[0, 0], np.arange(1, 29)]))
    assert (alone.genuine_pairs, alone.impostor_pairs) == (1, 434)


@pytest.mark.parametrize("after", [1, 5, 10])
def test_comparing_is_broken_off_between_two_tiles(monkeypatch, after):
    """In each of its passes, whether one thread works on them or two (each asks once more when no tile is left)."""
    monkeypatch.setattr(module, "TILE", 4)
    tiles, agreed = [], []

    def agree():
        agreed.append(1)
        if len(tiles) == after:
            raise InterruptedError

    breaks = Breaks(lambda: bool(tiles.append(1)) or len(tiles) == after, agree)
    with pytest.raises(InterruptedError):
        all_pairs(torch.eye(8), np.arange(8) // 2, breaks=breaks)
    assert len(tiles) == after and agreed


def test_an_error_in_a_tile_reaches_the_caller():
    def work(state, tile):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work_on(range(100), dict, work, torch.device("cpu"))


def test_too_many_pairs_for_intervals_end_in_a_sentence(monkeypatch):
    monkeypatch.setattr(module, "MOST_KEPT", 100)
    with pytest.raises(ValueError, match=r"x.tar: intervals of 435 pairs would take hours; ask for them of at most 100 pairs"):
        all_pairs(torch.randn(30, 4), np.arange(30) // 3, resamples=10, name="x.tar")
