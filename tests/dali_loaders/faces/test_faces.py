"""Procedural faces: the same arguments give the same bytes, whoever draws them and whatever else is drawn."""

import os
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from dali_loaders.faces import FacesConfig, face_image, face_jpeg, write_faces
from dali_loaders.faces.traits import Conditions, Traits, draw_record
from dali_loaders.sources import open_source

SMALL = FacesConfig(identities=3, images_per_identity=2, size=32, seed=5)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*.jpg"))}


@pytest.mark.parametrize("size", [16, 64, 112, 161])
def test_image_has_the_asked_size(size):
    image = face_image(0, 0, 0, size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    decoded = cv2.imdecode(np.frombuffer(face_jpeg(0, 0, 0, size), np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape == (size, size, 3)


def test_same_arguments_give_the_same_pixels_in_any_order():
    wanted = [(seed, identity, image) for seed in (0, 1) for identity in (0, 7) for image in (0, 3)]
    first = {key: face_image(*key, 48) for key in wanted}
    for key in reversed(wanted):
        np.testing.assert_array_equal(face_image(*key, 48), first[key])
    flat = np.array([image.ravel() for image in first.values()])
    assert len(np.unique(flat, axis=0)) == len(wanted)


def test_jpeg_shows_the_image_in_rgb():
    image = face_image(3, 1, 4)
    decoded = cv2.imdecode(np.frombuffer(face_jpeg(3, 1, 4), np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1].astype(float)
    as_drawn, swapped = np.abs(decoded - image).mean(), np.abs(decoded[:, :, ::-1] - image).mean()
    assert as_drawn < 12 and as_drawn < swapped


def test_hundred_faces_are_drawn_without_a_blank_one():
    for identity in range(100):
        assert face_image(11, identity, identity, 32).std() > 8


def test_record_fields_stay_in_their_ranges():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        traits, conditions = draw_record(Traits, rng), draw_record(Conditions, rng)
        assert 0.82 <= traits.cheek_width < 1.0 and (traits.skin >= 0).all() and (traits.skin <= 255).all()
        assert traits.beard == 0 or 0.25 <= traits.beard < 0.9
        assert len(traits.moles) <= 3 and 35 <= conditions.quality < 96


def test_average_colour_does_not_identify():
    """Light and background swamp the skin: two images of one identity are hardly closer in mean colour than two of different ones."""
    means_ND = np.array([face_image(0, identity, image, 32).mean((0, 1)) for identity in range(60) for image in range(5)])
    distances_NN = np.linalg.norm(means_ND[:, None] - means_ND, axis=2)
    same_NN = np.arange(300)[:, None] // 5 == np.arange(300) // 5
    genuine = distances_NN[same_NN & ~np.eye(300, dtype=bool)]
    farther = np.searchsorted(np.sort(distances_NN[~same_NN]), genuine) / (~same_NN).sum()
    assert 0.3 < farther.mean() < 0.5  # the share of impostor pairs that are closer than a genuine pair; 0.5 is chance


def test_folder(tmp_path):
    out = tmp_path / "deep" / "faces"
    write_faces(str(out), SMALL)
    files = contents(out)
    assert list(files) == [f"{identity:06d}/{image:03d}.jpg" for identity in range(3) for image in range(2)]
    assert files["000002/001.jpg"] == face_jpeg(5, 2, 1, 32)
    assert [path.name for path in out.parent.iterdir()] == ["faces"]


@pytest.mark.timeout(60)
def test_tar_does_not_depend_on_workers_and_holds_what_the_folder_holds(tmp_path):
    config = FacesConfig(identities=5, images_per_identity=2, size=24, seed=1, first_identity=100)
    for workers in (1, 2):
        write_faces(str(tmp_path / f"{workers}.tar"), config, workers)
    write_faces(str(tmp_path / "folder"), config, 1)
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()
    with tarfile.open(tmp_path / "1.tar") as tar:
        in_tar = {entry.name: tar.extractfile(entry).read() for entry in tar}
    assert in_tar == contents(tmp_path / "folder")


def test_recordio_holds_the_same_images_labels_and_names(tmp_path):
    for name in ("faces.rec", "faces.tar"):
        write_faces(str(tmp_path / name), SMALL)
    records, tar = open_source(str(tmp_path / "faces.rec")), open_source(str(tmp_path / "faces.tar"))
    assert records.labels.tolist() == tar.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert records.identities == tar.identities == ["000000", "000001", "000002"]
    assert [records.read(index) for index in range(6)] == [tar.read(index) for index in range(6)]


def test_sets_with_other_first_identities_share_nobody_and_overlap_exactly(tmp_path):
    write_faces(str(tmp_path / "train"), SMALL)
    write_faces(str(tmp_path / "test"), FacesConfig(identities=3, images_per_identity=2, size=32, seed=5, first_identity=3))
    write_faces(str(tmp_path / "both"), FacesConfig(identities=6, images_per_identity=2, size=32, seed=5))
    train, test, both = (contents(tmp_path / name) for name in ("train", "test", "both"))
    assert not set(train) & set(test) and not set(train.values()) & set(test.values())
    assert train | test == both


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"identities": 0}, "identities of at least 1"),
        ({"images_per_identity": -2}, "images_per_identity of at least 1"),
        ({"size": 4}, "16 to 1024 pixels wide, not 4"),
        ({"seed": -1}, "seed of at least 0"),
        ({"first_identity": -5}, "first_identity of at least 0"),
    ],
)
def test_bad_numbers_are_named(tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        write_faces(str(tmp_path / "faces"), FacesConfig(**change))
    assert not os.listdir(tmp_path)


def test_bad_output_and_workers_are_named(tmp_path):
    with pytest.raises(ValueError, match="no output named"):
        write_faces("", SMALL)
    with pytest.raises(ValueError, match="-1 processes"):
        write_faces(str(tmp_path / "faces"), SMALL, workers=-1)
    (tmp_path / "there.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"there\.tar exists already"):
        write_faces(str(tmp_path / "there.tar"), SMALL)
    with pytest.raises(ValueError, match=r"cannot be written to .*there\.tar is no folder"):
        write_faces(str(tmp_path / "there.tar" / "faces"), SMALL)


def test_an_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def break_down(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dali_loaders.faces.face_jpeg", break_down)
    with pytest.raises(KeyboardInterrupt):
        write_faces(str(tmp_path / "faces.tar"), SMALL)
    assert not os.listdir(tmp_path)
