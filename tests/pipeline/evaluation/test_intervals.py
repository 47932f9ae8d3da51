"""Intervals and OPIS against plain loops that copy the drawn identities, on random and tied scores."""

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation import intervals as module
from pipeline.evaluation.all_pairs import all_pairs
from pipeline.evaluation.intervals import Pairs, bootstrap
from pipeline.evaluation.opis import consistency, opis, stability
from pipeline.evaluation.report import OperatingPoints


def some_pairs(images: int, units: int, levels: int, seed: int) -> Pairs:
    """Scores of few levels tie."""
    rng = np.random.default_rng(seed)
    label = np.append(rng.integers(0, units, images), [0, 0, 1])
    first, second = np.triu_indices(len(label), 1)
    same = label[first] == label[second]
    score = np.round(np.clip(0.3 * same + 0.25 * rng.normal(size=len(first)), -1, 1) * levels) / levels
    return Pairs(score, same, label[first], label[second], units)


def looped(pairs: Pairs, resamples: int, seed: int = 0) -> dict[str, list[float]]:
    """Every draw as a set of its own, whose pairs are copied as often as they count."""
    drawn: dict[str, list[float]] = {}
    for weight in np.random.default_rng(seed).multinomial(pairs.units, np.full(pairs.units, 1 / pairs.units), size=resamples):
        times = np.where(pairs.same_P, weight[pairs.first_P], weight[pairs.first_P] * weight[pairs.second_P])
        score, same = np.repeat(pairs.score_P, times), np.repeat(pairs.same_P, times)
        if not 0 < same.sum() < len(same):
            continue
        thresholds = np.append(np.inf, np.unique(score)[::-1])
        tar = np.array([(score[same] >= t).mean() for t in thresholds])
        far = np.array([(score[~same] >= t).mean() for t in thresholds])
        drawn.setdefault("eer", []).append(np.interp(0.0, far - (1 - tar), far))
        for digits in (1, 2):
            drawn.setdefault(f"tar_at_far/1e-{digits}", []).append(tar[far <= 10.0**-digits + 1e-12].max())
    return drawn


@pytest.mark.parametrize(("images", "units", "levels", "seed"), [(40, 12, 10**9, 0), (40, 12, 20, 1), (60, 30, 5, 2)])
def test_equals_copying_the_drawn_identities(images, units, levels, seed, monkeypatch):
    pairs = some_pairs(images, units, levels, seed)
    monkeypatch.setattr(module, "_BLOCK", 7 * len(pairs.score_P))  # several blocks of draws
    found = bootstrap(pairs, OperatingPoints.of_scores(pairs.score_P, pairs.same_P), {}, 60)
    want = looped(pairs, 60)
    for name in ("eer", "tar_at_far/1e-1", "tar_at_far/1e-2"):
        assert found[name] == pytest.approx(tuple(np.quantile(want[name], (0.025, 0.975))), abs=1e-12), name
    low, high = found["tar_at_far/1e-1"]
    assert found["fnmr_at_fmr/1e-1"] == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_shares_are_means_over_images_of_the_drawn_identities():
    pairs = some_pairs(40, 12, 1000, 0)
    value, unit = np.arange(20.0), np.arange(20) % 12
    found = bootstrap(pairs, OperatingPoints.of_scores(pairs.score_P, pairs.same_P), {"mean": (value, unit)}, 50)
    draws = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), size=50)
    want = [np.repeat(value, weight[unit]).mean() for weight in draws]
    assert found["mean"] == pytest.approx(tuple(np.quantile(want, (0.025, 0.975))), abs=1e-12)


@pytest.mark.parametrize("number", [90, 30, 31])
def test_a_list_of_pairs_of_identities(number):
    """As many pairs as identities are no reason to draw pairs."""
    rng = np.random.default_rng(number)
    first, second = rng.integers(0, 30, (2, number))
    second[: number // 2] = first[: number // 2]
    same = first == second
    pairs = Pairs(np.round(0.3 * same + 0.4 * rng.normal(size=number), 2), same, first, second, 30)
    right = rng.random(number) < 0.8
    shares = {"accuracy": (right, np.stack([first, second], axis=1))}
    found = bootstrap(pairs, OperatingPoints.of_scores(pairs.score_P, pairs.same_P), shares, 60)
    want = looped(pairs, 60)
    for name in ("eer", "tar_at_far/1e-1"):
        assert found[name] == pytest.approx(tuple(np.quantile(want[name], (0.025, 0.975))), abs=1e-12), name
    accuracies = []
    for weight in np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), size=60):
        accuracies.append(np.repeat(right, np.where(same, weight[first], weight[first] * weight[second])).mean())
    assert found["accuracy"] == pytest.approx(tuple(np.quantile(accuracies, (0.025, 0.975))), abs=1e-12)


def test_few_identities_have_no_intervals():
    pairs = some_pairs(20, 9, 1000, 0)
    assert bootstrap(pairs, OperatingPoints.of_scores(pairs.score_P, pairs.same_P), {}, 50) == {}


def test_intervals_are_wider_than_drawing_pairs_would_make_them_and_hold_the_figure():
    """Images of an identity share a difficulty, so that its pairs are not independent."""
    generator = torch.Generator().manual_seed(0)
    labels = np.repeat(np.arange(40), 8)
    difficulty = 0.3 + 2 * torch.rand(40, 1, generator=generator)
    centres = torch.randn(40, 32, generator=generator)
    of_image = torch.from_numpy(labels)
    report = all_pairs(centres[of_image] + difficulty[of_image] * torch.randn(320, 32, generator=generator), labels, resamples=200)
    for name in ("eer", "tar_at_far/1e-2", "fnmr_at_fmr/1e-2", "threshold_at_far/1e-2", "rank1", "rank5"):
        low, high = report.intervals[name]
        assert low <= report.numbers()[name] <= high, name
    low, high = report.intervals["tar_at_far/1e-2"]
    tar = report.tar_at_far["1e-2"]
    assert high - low > 2 * 2 * 1.96 * np.sqrt(tar * (1 - tar) / report.genuine_pairs)
    assert set(report.intervals) <= set(report.numbers())
    assert "tar_at_far/1e-6" not in report.intervals


def test_a_set_as_large_as_the_dogs_takes_seconds():
    labels = np.repeat(np.arange(150), 7)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(150, 32, generator=generator)[torch.from_numpy(labels)] + torch.randn(1050, 32, generator=generator)
    start = time.process_time()
    report = all_pairs(embeddings, labels, resamples=100)
    assert time.process_time() - start < 10 and report.intervals
    assert all_pairs(embeddings, labels, resamples=0).intervals == {}


def test_opis_equals_a_loop():
    pairs = some_pairs(60, 15, 1000, 3)
    points = OperatingPoints.of_scores(pairs.score_P, pairs.same_P)
    ends = [points.at_far(100)[1], points.at_far(10)[1]]
    utilities = []
    for unit in range(15):
        touches = (pairs.first_P == unit) | (pairs.second_P == unit)
        genuine, impostor = pairs.score_P[touches & pairs.same_P], pairs.score_P[touches & ~pairs.same_P]
        if len(genuine) and len(impostor):
            curve = []
            for t in np.linspace(ends[1], ends[0], 100):
                tar, tnr = (genuine >= t).mean(), (impostor < t).mean()
                curve.append(2 * tar * tnr / (tar + tnr) if tar + tnr else 0.0)
            utilities.append(curve)
    assert opis(pairs, points) == pytest.approx(np.var(utilities, axis=0).mean(), abs=1e-12)


def test_opis_is_zero_where_everybody_is_served_alike_and_none_where_it_says_nothing():
    labels = np.repeat(np.arange(20), 2)
    report = all_pairs(torch.eye(20)[torch.from_numpy(labels)], labels)
    assert (report.eer, report.threshold_std) == (0.0, pytest.approx(0.0, abs=1e-6))
    assert report.opis is None or report.opis == pytest.approx(0.0, abs=1e-9)
    pairs = some_pairs(4, 3, 10, 0)
    assert consistency(pairs, OperatingPoints.of_scores(pairs.score_P, pairs.same_P))[0]["opis"] is None  # FAR 1e-2 of few pairs


def test_stability_shows_what_the_common_threshold_costs_a_group():
    same = np.array([True, True, False, False])
    near, far = (np.array([0.9, 0.8, 0.3, 0.2]), same), (np.array([0.4, 0.3, 0.1, 0.0]), same)
    rows = stability({"near": near, "far": far, "nobody": (np.zeros(0), same[:0])}, 0.5)
    assert [row["group"] for row in rows] == ["near", "far"]
    assert [(row["far_at_common"], row["tar_at_common"], row["eer"]) for row in rows] == [(0, 1, 0), (0, 0, 0)]
    assert rows[0]["threshold"] > rows[1]["threshold"]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=30), st.sampled_from([2, 5, 10]), st.booleans())
def test_points_equal_a_loop_over_thresholds(scored, inverse, nearest):
    score, same = np.array([s for s, _ in scored], float), np.array([kind for _, kind in scored])
    if not 0 < same.sum() < len(same):
        return
    points = OperatingPoints.of_scores(score, same)
    found = points.at_far(inverse, nearest)
    if (~same).sum() < inverse:
        assert found == (None, None)
        return
    candidates = [(t, (score[~same] >= t).sum(), (score[same] >= t).mean()) for t in (np.inf, *sorted(set(score), reverse=True))]
    allowed = (~same).sum() / inverse
    if nearest:  # of the corners that scikit-learn leaves: not what lies between two equal steps
        steps = [(after[1] - at[1], round((after[2] - at[2]) * same.sum())) for at, after in itertools.pairwise(candidates[1:])]
        middle = [place + 2 for place, (step, following) in enumerate(itertools.pairwise(steps)) if step == following]
        candidates = [candidate for place, candidate in enumerate(candidates) if place not in middle]
        distance = [abs(accepts * inverse - (~same).sum()) for _, accepts, _ in candidates]
        threshold, _, tar = [c for c, d in zip(candidates, distance, strict=True) if d == min(distance)][-1]
    else:
        threshold, _, tar = [c for c in candidates if c[1] <= allowed][-1]
    assert found == (tar, None if np.isinf(threshold) else threshold)
