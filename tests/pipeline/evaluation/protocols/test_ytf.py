"""YouTube Faces in its layout: videos compared by the mean of their frames."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation import evaluate
from pipeline.evaluation.protocols.ytf import means, read_splits
from tests.pipeline.people import DATA, distance, feature, flat, loop_over_folds, write_images

HEADER = "split number, pair number, first name, second name, is same\n"


@pytest.fixture
def ytf(tmp_path):
    """splits.txt beside aligned_images_DB: in each of 10 splits 2 genuine and 2 impostor pairs of two people with two videos."""
    lines, frames = [], []
    for split in range(1, 11):
        one, two = (f"Ann_Bo_{split}/{number}" for number in (0, 3))
        three, four = (f"Cy_{split}/{number}" for number in (1, 2))
        pairs = [(one, two, 1), (three, four, 1), (one, three, 0), (two, four, 0)]
        lines += [f"{split}, {at}, {first}, {second}, {same}" for at, (first, second, same) in enumerate(pairs, start=1)]
        for length, video in enumerate((one, two, three, four), start=1):
            frames += [f"{video}/aligned_detect_{video.split('/')[1]}.{frame}.jpg" for frame in range(10, 10 + length)]
    write_images(tmp_path / "aligned_images_DB", frames, lambda name: name.split("/")[0], noise=200)
    (tmp_path / "splits.txt").write_text(HEADER + "\n".join(lines) + "\n")
    return tmp_path


def want(folder):
    """Accuracies of the splits, from the mean of frames as the network gives them."""
    listed = read_splits(str(folder / "splits.txt"))
    mean_of = {}
    for video in {video for pair in listed.pairs for video in pair}:
        mean_of[video] = np.mean([feature(file) for file in (folder / "aligned_images_DB" / video).iterdir()], axis=0)
    distances = np.array([distance(mean_of[first], mean_of[second]) for first, second in listed.pairs])
    return loop_over_folds(distances, np.array(listed.issame), np.arange(40) // 4)


def test_ten_splits(ytf):
    report = evaluate(flat, str(ytf / "splits.txt"), DATA, protocol="ytf", batch_size=7)
    accuracies = want(ytf)
    assert 0.6 < np.mean(accuracies) < 1
    assert (report.accuracy, report.std) == pytest.approx((np.mean(accuracies), np.std(accuracies)), abs=1e-12)
    assert [row["accuracy"] for row in report.tables["thresholds"]] == pytest.approx(accuracies, abs=1e-12)
    assert (report.pairs, report.folds, report.videos, report.images, report.identities) == (40, 10, 40, 100, 20)
    assert "accuracy" in report.intervals


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(0, 99))
def test_means_are_those_of_a_loop(videos, seed):
    rows = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(videos), 5))).float()
    found, numbers = means(rows, np.array(videos))
    assert numbers.tolist() == sorted(set(videos))
    for row, number in zip(found.numpy(), numbers, strict=True):
        mean = np.mean([rows[at].double().numpy() for at, video in enumerate(videos) if video == number], axis=0)
        assert row == pytest.approx(mean / np.linalg.norm(mean), abs=1e-12)


def test_videos_without_frames(ytf):
    path = str(ytf / "splits.txt")
    for file in (ytf / "aligned_images_DB" / "Cy_4" / "1").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"has no frames of 1 of the 40 videos of .* \(Cy_4/1\): looked for images in .* --allow-missing"):
        evaluate(flat, path, DATA, protocol="ytf")
    report = evaluate(flat, path, DATA, protocol="ytf", options={"allow_missing": True})
    assert (report.left_out, report.pairs, report.videos, report.folds) == (2, 38, 39, 10)


def test_unreadable_frames_and_features_that_are_not_finite(ytf):
    (ytf / "aligned_images_DB" / "Cy_4" / "2" / "aligned_detect_2.10.jpg").write_bytes(b"no image")
    (ytf / "aligned_images_DB" / "Ann_Bo_1" / "0" / "aligned_detect_0.10.jpg").write_bytes(b"no image")  # its only frame
    report = evaluate(flat, str(ytf / "splits.txt"), DATA, protocol="ytf")
    assert (report.unreadable, report.images, report.videos, report.pairs) == (2, 98, 39, 38)
    with pytest.raises(ValueError, match=r"splits.txt: \d+ of \d+ embeddings are not finite"):
        evaluate(lambda images: flat(images) * torch.nan, str(ytf / "splits.txt"), DATA, protocol="ytf")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no pairs"),
        (HEADER, "names no pairs"),
        (HEADER + "1, 1, Ann/0, Bob/1, 2\n", "line 2 is '1, 1, Ann/0, Bob/1, 2'; expected split, pair, NAME/NUMBER"),
        ("1, Ann/0, Bob, 1\n", "line 1 is"),
        ("1, 1, Ann/0, ../Bob, 1\n", "line 1 is"),
        ("1, Ann/0, Ann/1, 1\n1, Ann/0, Bob/1, 0\n2, Ann/0, Ann/1, 1\n", "splits of 1 to 2 pairs; expected as many in each"),
        ("\xff", "has no|cannot be read|line 1"),
    ],
)
def test_bad_lists(tmp_path, text, words):
    (tmp_path / "splits.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"splits.txt.*(?:{words})"):
        evaluate(flat, str(tmp_path / "splits.txt"), DATA, protocol="ytf")


def test_the_number_of_the_pair_may_be_left_out(ytf):
    path = ytf / "splits.txt"
    with_number = read_splits(str(path))
    rows = [line.split(", ") for line in path.read_text().splitlines()[1:]]
    path.write_text("\n".join(", ".join([row[0], *row[2:]]) for row in rows))
    assert read_splits(str(path)) == with_number


def on_a_rank(path: str) -> dict:
    return evaluate(flat, path, DATA, protocol="ytf", batch_size=7, rank=dist.get_rank(), world_size=dist.get_world_size()).numbers()


def test_any_number_of_ranks_gives_the_same(ytf, ranks):
    one = evaluate(flat, str(ytf / "splits.txt"), DATA, protocol="ytf", batch_size=7).numbers()
    for size in (2, 4):
        assert all(found == one for found in ranks(size).run(on_a_rank, str(ytf / "splits.txt")))
