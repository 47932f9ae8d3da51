"""The 10-fold pair protocol against a plain loop, and `.bin` sets written, read, decoded and evaluated."""

import json
import logging
import pickle

import cv2
import numpy as np
import pytest
import torch

from dali_loaders import DataConfig
from pipeline.evaluation import evaluate
from pipeline.evaluation.bin_pairs import read_bin, score_pairs, write_bin

SIDE = 16
DATA = DataConfig(image_size=SIDE, threads=1)


def looped_protocol(distances: np.ndarray, issame: np.ndarray, folds: int) -> dict:
    """Fold by fold and threshold by threshold, in Python."""
    n = len(distances)
    sizes = [n // folds + (f < n % folds) for f in range(folds)]
    accuracies, tars, start = [], [], 0
    for size in sizes:
        test = range(start, start + size)
        train = [i for i in range(n) if i not in test]
        start += size
        right = [sum((distances[i] < t / 100) == issame[i] for i in train) for t in range(400)]
        threshold = right.index(max(right)) / 100
        accuracies.append(sum((distances[i] < threshold) == issame[i] for i in test) / size)

        impostors = [distances[i] for i in train if not issame[i]]
        genuine = [distances[i] for i in test if issame[i]]
        previous = (0.0, 0.0)
        for t in range(4000):
            far = sum(d < t / 1000 for d in impostors) / len(impostors)
            if far > 1e-3:
                break
            previous = (far, t / 1000)
        cut = previous[1] + (1e-3 - previous[0]) / (far - previous[0]) * (t / 1000 - previous[1])
        if genuine:
            tars.append(sum(d < cut for d in genuine) / len(genuine))
    return {"accuracy": np.mean(accuracies), "std": np.std(accuracies), "tar": np.mean(tars)}


def random_pairs(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    issame = rng.random(number) < 0.5
    return np.clip(np.where(issame, 0.9, 1.7) + 0.3 * rng.normal(size=number), 0.001, 3.9), issame


@pytest.mark.parametrize(("number", "seed"), [(200, 0), (203, 1), (57, 2)])
def test_equals_the_looped_protocol(number, seed):
    distances, issame = random_pairs(number, seed)
    report, want = score_pairs(distances, issame), looped_protocol(distances, issame, 10)
    assert (report.accuracy, report.std) == pytest.approx((want["accuracy"], want["std"]), abs=1e-12)
    assert report.tar_at_far["1e-3"] is None
    assert (report.pairs, report.genuine_pairs, report.folds) == (number, issame.sum(), 10)


def test_tar_at_far_equals_the_looped_protocol():
    distances, issame = random_pairs(2100, 3)
    assert (~issame).sum() >= 1000
    distances[np.flatnonzero(~issame)[:5]] = [0.3, 0.4, 0.5, 0.61, 0.82]
    want = looped_protocol(distances, issame, 10)
    report = score_pairs(distances, issame)
    assert report.tar_at_far["1e-3"] == pytest.approx(want["tar"], abs=1e-12)
    assert report.accuracy == pytest.approx(want["accuracy"], abs=1e-12)


@pytest.mark.parametrize("number", [2, 3, 9, 10, 11])
def test_small_sets_leave_one_pair_out(number):
    issame = np.arange(number) % 2 == 0
    report = score_pairs(np.where(issame, 0.5, 1.5), issame)
    assert report.folds == min(number, 10)
    assert (report.accuracy, report.eer) == ((1.0, 0.0) if number > 3 else (report.accuracy, 0.0))


def test_equal_error_rate_of_ties():
    issame = np.arange(20) % 2 == 0
    assert score_pairs(np.ones(20), issame).eer == 0.5


@pytest.mark.parametrize(("issame", "kind"), [([True] * 4, "impostor"), ([False] * 4, "genuine"), ([], "genuine")])
def test_one_kind_of_pair_ends_in_a_sentence(issame, kind):
    with pytest.raises(ValueError, match=f"lfw.bin: none of its .* readable pairs is a {kind} pair"):
        score_pairs(np.ones(len(issame)), np.array(issame, dtype=bool), name="lfw.bin")


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


@pytest.fixture
def pair_set() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 RGB [2P, SIDE, SIDE, 3] and issame [P]: coarse patterns, one per identity, with noise that blurs some."""
    rng = np.random.default_rng(0)
    issame = np.arange(40) // 4 % 2 == 0
    images = []
    for same in issame:
        first = rng.integers(0, 256, (2, 2, 3))
        second = first if same else rng.integers(0, 256, (2, 2, 3))
        images += [np.kron(pattern, np.ones((SIDE // 2, SIDE // 2, 1))) + rng.normal(0, 40, (SIDE, SIDE, 3)) for pattern in (first, second)]
    return np.clip(images, 0, 255).astype(np.uint8), issame


class Projection(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3 * SIDE * SIDE, 24)

    def forward(self, images):
        return self.linear(images.flatten(1))


def test_evaluates_a_written_set_as_the_protocol_says(tmp_path, pair_set):
    images, issame = pair_set
    path = str(tmp_path / "set.bin")
    write_bin(path, [png(image) for image in images], issame)
    model = Projection()
    report = evaluate(model, path, DATA, batch_size=7)

    pixels = torch.from_numpy((images.astype(np.float64) - 127.5) / 127.5).permute(0, 3, 1, 2)
    with torch.no_grad():
        features = (model.double()(pixels) + model(pixels[..., range(SIDE - 1, -1, -1)])).numpy()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    distances = ((unit[0::2] - unit[1::2]) ** 2).sum(axis=1)
    want = looped_protocol(distances, issame, 10)
    assert 0.5 < want["accuracy"] < 1
    assert (report.accuracy, report.std) == pytest.approx((want["accuracy"], want["std"]), abs=1e-12)
    assert (report.pairs, report.images, report.unreadable) == (40, 80, 0)
    numbers = json.loads(json.dumps(report.as_dict()))
    assert {"eer", "tar_at_far", "rank1", "images", "identities", "accuracy"} <= set(numbers)


def test_pairs_with_an_unreadable_image_are_left_out(tmp_path, pair_set, caplog):
    images, issame = pair_set
    encoded = [png(image) for image in images]
    encoded[4] = b"no image"
    write_bin(str(tmp_path / "set.bin"), encoded, issame)
    with caplog.at_level(logging.WARNING):
        report = evaluate(Projection(), str(tmp_path / "set.bin"), DATA, batch_size=8)
    assert (report.pairs, report.unreadable) == (39, 1)
    assert "pair 2, first image" in caplog.text


def test_written_sets_are_plain_pickles_and_read_back(tmp_path):
    path = tmp_path / "set.bin"
    write_bin(str(path), [b"a", np.array([[1], [2]], np.uint8), b"c", b""], np.array([True, False]))
    assert pickle.loads(path.read_bytes()) == ([b"a", b"\x01\x02", b"c", b""], [True, False])
    images, issame = read_bin(str(path))
    assert images == [b"a", b"\x01\x02", b"c", b""]
    assert issame.dtype == bool and issame.tolist() == [True, False]


def test_numbers_of_images_and_pairs_must_match(tmp_path):
    path = str(tmp_path / "set.bin")
    with pytest.raises(ValueError, match="3 images were given for 2 pairs"):
        write_bin(path, [b"a"] * 3, [True, False])
    with open(path, "wb") as file:
        pickle.dump(([b"a"] * 3, [True, False]), file)
    with pytest.raises(ValueError, match=r"set.bin: 3 images for 2 pairs"):
        read_bin(path)


def test_a_set_that_cannot_be_written_ends_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="cannot be written"):
        write_bin(str(tmp_path / "no" / "set.bin"), [b"a", b"b"], [True])


def test_the_threshold_as_a_cosine_separates_pairs():
    cosines = np.concatenate([np.linspace(0.5, 0.9, 40), np.linspace(-0.2, 0.3, 40)])
    order = np.random.default_rng(0).permutation(80)
    issame = (np.arange(80) < 40)[order]
    report = score_pairs(2 - 2 * cosines[order], issame)
    assert 0.3 < report.best_cosine < 0.5
    assert ((cosines[order] > report.best_cosine) == issame).all()


def test_thresholds_are_cosines_with_the_distance_beside_the_protocol_s_own():
    distances, issame = random_pairs(2400, 5)
    report = score_pairs(distances, issame, resamples=0)
    numbers = report.as_dict()
    assert numbers["threshold"] == report.best_cosine == pytest.approx(1 - numbers["threshold_distance"] / 2, abs=1e-12)
    cosines = 1 - distances / 2
    for name, threshold in report.threshold_at_far.items():
        if threshold is not None:
            assert (cosines[~issame] >= threshold).mean() <= float(name)
            assert report.fnmr_at_fmr[name] == pytest.approx((cosines[issame] < threshold).mean(), abs=1e-12)
    assert {name for name, tar in report.tar_at_far.items() if tar is None} == {"1e-4", "1e-5", "1e-6"}
    folds = report.tables["thresholds"]
    assert len(folds) == 10 and np.std([row["threshold"] for row in folds]) == pytest.approx(report.threshold_std)
    assert report.genuine_histogram.sum() == issame.sum() and report.impostor_histogram.sum() == (~issame).sum()


def test_intervals_of_a_pair_set_draw_pairs():
    distances, issame = random_pairs(2400, 5)
    report = score_pairs(distances, issame, resamples=300)
    low, high = report.intervals["accuracy"]
    spread = 1.96 * np.sqrt(report.accuracy * (1 - report.accuracy) / 2400)
    assert (report.accuracy - low, high - report.accuracy) == pytest.approx((spread, spread), rel=0.35)
    assert report.intervals["tar_at_far/1e-3"][0] <= report.tar_at_far["1e-3"] <= report.intervals["tar_at_far/1e-3"][1]
    assert score_pairs(distances, issame, resamples=0).intervals == {}
