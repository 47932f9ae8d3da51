"""CFP in the layout of its authors' archive: frontal against profile images."""

import numpy as np
import pytest

from pipeline.evaluation import evaluate
from tests.pipeline.people import DATA, distance, feature, flat, loop_over_folds, write_images

PEOPLE, FRONTAL, PROFILE, EACH = 20, 10, 4, 4


@pytest.fixture
def cfp(tmp_path):
    """20 people, two of them in each fold, with 10 frontal and 4 profile images; the pairs of files, and whether they are genuine."""
    root, rng = tmp_path / "cfp-dataset", np.random.default_rng(0)
    (root / "Protocol").mkdir(parents=True)
    paths = {}
    for kind, folder, number in (("F", "frontal", FRONTAL), ("P", "profile", PROFILE)):
        paths[kind] = [
            f"Data/Images/{person:03d}/{folder}/{image:02d}.jpg" for person in range(1, PEOPLE + 1) for image in range(1, number + 1)
        ]
        lines = [f"{at} ../{path}" for at, path in enumerate(paths[kind], start=1)]
        (root / "Protocol" / f"Pair_list_{kind}.txt").write_text("\n".join(lines) + "\n")
        write_images(root, paths[kind], lambda name: name.split("/")[2])
    pairs, same = [], []
    for fold in range(10):
        (root / "Protocol" / "Split" / "FP" / f"{fold + 1:02d}").mkdir(parents=True)
        for file, shift in (("same.txt", 0), ("diff.txt", 1)):
            drawn = []
            for at in range(EACH):
                person, other = 2 * fold + at % 2, 2 * fold + (at + shift) % 2
                drawn.append((person * FRONTAL + rng.integers(FRONTAL), other * PROFILE + at % PROFILE))
            text = "".join(f"{frontal + 1},{profile + 1}\n" for frontal, profile in drawn)
            (root / "Protocol" / "Split" / "FP" / f"{fold + 1:02d}" / file).write_text(text)
            pairs += [(root / paths["F"][frontal], root / paths["P"][profile]) for frontal, profile in drawn]
            same += [shift == 0] * EACH
    return root, pairs, np.array(same)


def test_folds_of_frontal_and_profile_images(cfp):
    root, pairs, same = cfp
    report = evaluate(flat, str(root), DATA, protocol="cfp_fp")
    distances = np.array([distance(feature(first), feature(second)) for first, second in pairs])
    accuracies = loop_over_folds(distances, same, np.arange(len(same)) // (2 * EACH))
    assert (report.accuracy, report.std) == pytest.approx((np.mean(accuracies), np.std(accuracies)), abs=1e-12)
    assert (report.pairs, report.folds, report.identities, report.images) == (80, 10, 20, len({file for pair in pairs for file in pair}))
    assert "accuracy" in report.intervals


def test_images_of_another_folder(cfp, tmp_path):
    root, *_ = cfp
    (root / "Data").rename(tmp_path / "Data")
    with pytest.raises(ValueError, match=r"lacks \d+ of the \d+ images of .*Protocol"):
        evaluate(flat, str(root), DATA, protocol="cfp_fp")
    assert evaluate(flat, str(root), DATA, protocol="cfp_fp", options={"images": str(tmp_path), "resamples": 0}).pairs == 80


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("Split/FP/03/diff.txt", "1,2,3\n", r"03/diff.txt, line 1 is '1,2,3'; expected i,j"),
        ("Split/FP/03/same.txt", "1,81\n", r"line 1 is '1,81'; expected i,j with numbers of the lists"),
        ("Split/FP/03/same.txt", "1,2\n", r"fold 3 of Protocol/Split/FP has 5 pairs; expected as many in each fold"),
        ("Pair_list_P.txt", "one ../Data/x.jpg\n", r"Pair_list_P.txt, line 1 is 'one ../Data/x.jpg'; expected a number and a path"),
        ("Pair_list_F.txt", "1 ../../../../etc/passwd\n", "lies outside|expected i,j"),
    ],
)
def test_bad_lists(cfp, file, text, words):
    root, *_ = cfp
    (root / "Protocol" / file).write_text(text)
    with pytest.raises(ValueError, match=words):
        evaluate(flat, str(root), DATA, protocol="cfp_fp")


def test_another_folder_is_no_cfp(tmp_path):
    with pytest.raises(ValueError, match=r"Pair_list_F.txt cannot be read .*expected the folder of CFP"):
        evaluate(flat, str(tmp_path), DATA, protocol="cfp_fp")
