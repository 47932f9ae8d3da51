"""Identities to merge and misplaced images are found where they were planted; the list is one that data.subset reads."""

import csv

import cv2
import numpy as np
import pytest
import torch

from dali_loaders import DataConfig
from dali_loaders.sources import open_source
from dali_loaders.sources.subset import select
from pipeline.evaluation import evaluate
from pipeline.evaluation.cleaning import check_path, doubts, list_path


def planted() -> tuple[torch.Tensor, np.ndarray]:
    """12 identities of 5 images: 4 and 7 are one person, image 11 of identity 2 shows identity 9."""
    generator = torch.Generator().manual_seed(0)
    labels = np.repeat(np.arange(12), 5)
    person = labels.copy()
    person[labels == 7] = 4
    person[11] = 9
    centres = torch.randn(12, 64, generator=generator)
    return centres[torch.from_numpy(person)] + 0.4 * torch.randn(60, 64, generator=generator), labels


def test_planted_errors_are_found_and_nothing_else():
    embeddings, labels = planted()
    shuffled = np.random.default_rng(0).permutation(60)
    merge, doubt = doubts(embeddings[torch.from_numpy(shuffled)], 10 * labels[shuffled], 0.4)
    assert (merge.what, merge.identity, merge.other) == ("merge", 40, 70)
    unit = torch.nn.functional.normalize(embeddings)
    assert merge.cosine == pytest.approx(float((unit[20:25] @ unit[35:40].T).mean()), abs=1e-5)
    assert (doubt.what, shuffled[doubt.image], doubt.identity, doubt.other) == ("misplaced", 11, 20, 90)
    own = torch.nn.functional.normalize(unit[[10, 12, 13, 14]].sum(dim=0), dim=0) @ unit[11]
    assert doubt.own_cosine == pytest.approx(float(own), abs=1e-5) and doubt.cosine > doubt.own_cosine


def test_clean_sets_and_tiny_ones_raise_no_doubt():
    assert doubts(torch.eye(6), np.arange(6) // 2, 0.4) == []  # orthogonal images: nothing is near anything
    assert doubts(torch.eye(3), np.zeros(3, int), 0.4) == []


@pytest.fixture
def folder(tmp_path):
    """Patterns: people 0 and 3 are the same, one image of 1 is of 2."""
    rng = np.random.default_rng(0)
    patterns = [np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((4, 4, 1))) for _ in range(3)]
    for identity, shown in enumerate([[0] * 4, [1] * 4 + [2], [2] * 4, [0] * 3]):
        for i, person in enumerate(shown):
            path = tmp_path / "people" / f"id{identity}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.clip(patterns[person] + rng.normal(0, 12, (16, 16, 3)), 0, 255).astype(np.uint8))
    (tmp_path / "people" / "id2" / "0.png").write_bytes(b"no image")
    return tmp_path


def test_the_report_names_images_and_its_list_is_a_subset(folder):
    path, data = str(folder / "doubts.csv"), str(folder / "people")
    report = evaluate(torch.nn.Flatten(), data, DataConfig(image_size=16, threads=1), options={"cleaning": path})
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert report.unreadable == 1
    assert [(row["what"], row["image"].removeprefix(data), row["identity"], row["other_identity"]) for row in rows] == [
        ("merge", "", "id0", "id3"),
        ("misplaced", "/id1/4.png", "id1", "id2"),
    ]
    left = select(open_source(data), list_path(path))
    names = {left.name(i) for i in range(len(left))}
    assert "id3" not in left.identities and not any(name.endswith(("id1/4.png", "id2/0.png")) for name in names)
    assert len(left) == 16 - 3 - 1 - 1


@pytest.mark.parametrize(("path", "sentence"), [("doubts.txt", r"name of a \.csv"), ("nowhere/doubts.csv", "no file can be written there")])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(tmp_path, path, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_path(str(tmp_path / path))


def test_a_pair_set_has_no_identities_to_clean(tmp_path):
    with pytest.raises(ValueError, match=r"x.bin has no option --cleaning; it has --resamples"):
        evaluate(torch.nn.Flatten(), str(tmp_path / "x.bin"), DataConfig(), options={"cleaning": str(tmp_path / "x.csv")})
