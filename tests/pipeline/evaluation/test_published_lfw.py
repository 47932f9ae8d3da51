"""Curves that others have published for LFW give back the accuracies that they have published with them."""

import numpy as np
import pytest

from pipeline.evaluation.bin_pairs import score_pairs
from pipeline.evaluation.report import OperatingPoints

EACH = 3000  # genuine pairs of LFW, and impostor pairs

# Points (true accepts, false accepts) of people who looked at cropped images, at falling thresholds. From the curve "Human, cropped" (Kumar
# et al., ICCV 2009) of http://vis-www.cs.umass.edu/lfw/results.html, which has its accuracy; a copy of the file is in the repository
# cmusatyalab/openface, evaluation/comparisons/kumar_human_crop.txt.
HUMAN, HUMAN_ACCURACY = (
    """
2992,1264 2991,1005 2991,995 2986,750 2986,739 2986,572 2986,562 2983,444 2983,440 2981,350 2981,348 2977,278 2977,275 2975,228
2975,226 2970,180 2967,151 2956,126 2949,107 2948,105 2938,87 2926,72 2912,55 2910,55 2899,47 2872,42 2871,42 2857,35 2829,27
2815,21 2784,17 2752,15 2712,11 2672,11 2670,11 2605,7 2601,7 2552,5 2482,3 2479,3 2408,3 2406,3 2324,2 2323,2 2220,1 2092,1 1975,0
1974,0 1818,0 1810,0 1642,0 1639,0 1456,0 1455,0 1237,0 1229,0 1020,0 1015,0 768,0 764,0 491,0 215,0
""",
    0.9753,
)

# All 6,000 pairs from the least similar on: so many impostor pairs, then so many genuine ones, and so on. From the curve of
# DeepFace-ensemble (Taigman et al., CVPR 2014) on the same page, which has its accuracy, 0.9735 +- 0.0025; a copy is deepface_ensemble.txt
# beside that file.
DEEPFACE, DEEPFACE_ACCURACY = (
    """
1734 1 401 1 170 1 62 1 48 1 87 1 84 1 6 1 3 1 5 1 40 1 44 1 13 1 15 1 2 1 15 1 1 1 4 1 2 1 6 1 8 1 13 1 1 1 10 1 2 1 1 2 1 2 4 1 3
1 6 1 18 1 2 1 9 1 1 1 2 1 4 3 8 1 5 3 4 1 10 1 2 1 2 2 3 2 10 1 2 2 2 1 1 2 3 1 1 1 2 1 2 2 3 1 2 1 3 1 5 1 1 1 1 2 5 3 2 2 5 3 8 2
2 4 5 2 2 1 1 2 1 2 1 4 1 3 1 1 1 1 6 6 3 2 1 1 3 1 2 5 2 1 1 4 1 1 2 1 1 1 1 1 1 3 1 9 1 10 1 2 2 4 2 4 1 17 1 8 1 2 1 5 1 2 1 8 1
9 1 5 1 8 1 4 1 3 1 7 1 20 1 2 1 11 1 5 1 20 1 16 1 3 1 18 2 30 1 3 1 23 1 25 1 9 1 10 1 16 1 76 1 11 1 3 1 10 1 252 1 814 1 1390
""",
    0.9735,
)


def human() -> tuple[np.ndarray, np.ndarray]:
    """Distances and kinds of pairs whose curve has the published points."""
    accepted = np.array([[0, 0], *sorted([int(count) for count in point.split(",")] for point in HUMAN.split()), [EACH, EACH]])
    counts = np.diff(accepted, axis=0)
    distances = np.linspace(0.1, 3.9, len(counts))
    same = np.concatenate([np.repeat(np.arange(len(counts)), counts[:, kind]) for kind in (0, 1)])
    return distances[same], np.repeat([True, False], EACH)


def deepface() -> tuple[np.ndarray, np.ndarray]:
    runs = [int(count) for count in DEEPFACE.split()]
    same = np.concatenate([np.full(count, place % 2 == 1) for place, count in enumerate(runs)])
    # Distances fall with the rank; the 600 pairs in the middle take most of the range, because the protocol tries steps of .01 only.
    return np.interp(np.arange(2 * EACH), [0, EACH - 300, EACH + 300, 2 * EACH], [3.95, 3.5, 0.5, 0.05]), same


def dealt(distances: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In LFW's ten folds of 300 genuine and 300 impostor pairs. Whose fold a pair is in was not published, so they are dealt in turn."""
    order = np.argsort(distances, kind="stable")
    place = np.empty(len(same), dtype=int)
    for kind in (True, False):
        of_kind = order[same[order] == kind]
        place[of_kind] = np.arange(len(of_kind))
    folds = np.lexsort((place, ~same, place % 10))
    return distances[folds], same[folds]


@pytest.mark.parametrize(("pairs", "published", "off"), [(human, HUMAN_ACCURACY, 1e-3), (deepface, DEEPFACE_ACCURACY, 5e-4)])
def test_published_accuracies(pairs, published, off):
    distances, same = dealt(*pairs())
    assert same.sum() == (~same).sum() == EACH and (same.reshape(10, -1).sum(axis=1) == EACH // 10).all()
    report = score_pairs(distances, same, resamples=0)
    assert report.accuracy == pytest.approx(published, abs=off)


def test_published_points():
    """Every point of the curve is a published one, and TAR@FAR is read off it."""
    distances, same = human()
    points = OperatingPoints.of_scores(1 - distances / 2, same)
    published = {tuple(map(int, point.split(","))) for point in HUMAN.split()} | {(0, 0), (EACH, EACH)}
    assert set(zip(points.true_accepts_P.tolist(), points.false_accepts_P.tolist(), strict=True)) == published
    report = score_pairs(distances, same, resamples=0)
    far, tar = report.roc
    assert set(zip(np.rint(tar * EACH).astype(int).tolist(), np.rint(far * EACH).astype(int).tolist(), strict=True)) <= published
    assert report.tar_at_far["1e-2"] == max(true for true, false in published if false <= EACH * 1e-2) / EACH
    assert report.tar_at_far["1e-4"] is None
