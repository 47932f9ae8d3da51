"""evaluate on a folder and on a `.bin` file, through the real image decoder."""

import cv2
import numpy as np
import pytest
import torch

from dali_loaders import DataConfig
from pipeline.evaluation import Report, evaluate, write_bin

SIDE = 16
DATA = DataConfig(image_size=SIDE, threads=1)


def flat(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)


@pytest.fixture
def folder(tmp_path):
    """4 identities of 3 images: one pattern each with a little noise."""
    rng = np.random.default_rng(0)
    for identity in range(4):
        (tmp_path / "people" / f"id{identity}").mkdir(parents=True)
        pattern = np.kron(rng.integers(40, 216, (4, 4, 3)), np.ones((SIDE // 4, SIDE // 4, 1)))
        for i in range(3):
            image = np.clip(pattern + rng.normal(0, 10, pattern.shape), 0, 255).astype(np.uint8)
            cv2.imwrite(str(tmp_path / "people" / f"id{identity}" / f"{i}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    return tmp_path / "people"


def test_folder(folder):
    report = evaluate(flat, str(folder), DATA, batch_size=5)
    assert isinstance(report, Report)
    assert (report.eer, report.rank1, report.images, report.identities, report.unreadable) == (0.0, 1.0, 12, 4, 0)
    assert (report.genuine_pairs, report.impostor_pairs) == (12, 54)


def test_unreadable_image_is_counted(folder):
    (folder / "id1" / "2.jpg").write_bytes(b"no image")
    report = evaluate(flat, str(folder), DATA, batch_size=5)
    assert (report.images, report.unreadable, report.genuine_pairs) == (11, 1, 10)


def test_bin(folder):
    images = [(folder / f"id{i}" / f"{j}.jpg").read_bytes() for i in range(4) for j in range(2)]
    images += [(folder / f"id{i}" / "2.jpg").read_bytes() for i in (0, 1, 1, 2, 2, 3, 3, 0)]
    path = str(folder.parent / "pairs.bin")
    write_bin(path, images, [True] * 4 + [False] * 4)
    report = evaluate(flat, path, DATA)
    assert isinstance(report, Report)
    assert (report.eer, report.folds, report.unreadable) == (0.0, 8, 0)
    assert report.accuracy >= 7 / 8  # the loosest genuine pair, left out, may miss the threshold that the others choose


def test_missing_path_ends_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        evaluate(flat, str(tmp_path / "nowhere"), DATA)


def test_one_identity_ends_in_a_sentence(folder):
    for identity in ("id1", "id2", "id3"):
        for image in (folder / identity).iterdir():
            image.unlink()
        (folder / identity).rmdir()
    with pytest.raises(ValueError, match=r"people.*expected at least 2 identities"):
        evaluate(flat, str(folder), DATA)
