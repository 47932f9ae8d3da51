"""The command `protoshard data preview`."""

import cv2
import pytest

from dali_loaders.faces import FacesConfig, write_faces
from pipeline.cli import main


@pytest.fixture
def faces(tmp_path):
    write_faces(str(tmp_path / "faces.tar"), FacesConfig(identities=3, images_per_identity=4, size=32), workers=1)
    return str(tmp_path / "faces.tar")


def test_a_sheet_of_the_recipes_augmentation(faces, tmp_path, capsys):
    sheets = []
    for settings in (["data.augment=adaface"], ["data.augment=adaface", "data.augment.grey=1"]):
        out = str(tmp_path / "sheet.png")
        options = ["--images", "5", "--versions", "3", "--out", out, "--set", "data.image_size=48", *settings]
        assert main(["data", "preview", faces, "faces_small", *options]) == 0
        sheets.append(cv2.imread(out))
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 6 and "sheet.png: " in said[-1]
    first, second = sheets
    assert first.shape == second.shape == (5 * 50 - 2, 4 * 50 - 2, 3)
    assert (first[:, :48] == second[:, :48]).all() and (second[:48, 50:] == second[:48, 50:, :1]).all()


@pytest.mark.parametrize(
    ("data", "recipe", "options", "sentence"),
    [
        ("missing.tar", "faces_small", [], "missing.tar does not exist"),
        ("faces.tar", "face_small", [], "did you mean 'faces_small'"),
        ("faces.tar", "faces_small", ["--out", "sheet.jpg"], "--out would be named sheet.jpg; give it a name that ends in .png"),
        ("faces.tar", "faces_small", ["--out", "no/sheet.png"], "--out cannot be written to no/sheet.png (there is no folder "),
        ("faces.tar", "faces_small", ["--images", "0"], "a sheet of 0 images"),
        ("faces.tar", "faces_small", ["--set", "data.augment.blur=2"], "augment.blur is 2.0; expected a number from 0 to 1"),
    ],
)
def test_bad_input_ends_in_a_sentence(faces, tmp_path, monkeypatch, capsys, data, recipe, options, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "preview", data, recipe, *options]) == 2
    said = capsys.readouterr().err
    *starting, refused = said.splitlines()
    assert all(line.endswith("  starting") for line in starting) and refused.startswith("protoshard: ") and sentence in refused
    assert not (tmp_path / "preview.png").exists()


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["data", "preview", "--help"])
    assert "example: protoshard data preview" in capsys.readouterr().out
