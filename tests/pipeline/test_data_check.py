"""`protoshard data check`: what it prints, draws and writes, and how it ends."""

import json

import cv2
import numpy as np
import pytest

from pipeline.cli import main

pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")


@pytest.fixture
def data(tmp_path):
    for identity in range(3):
        (tmp_path / "set" / f"id{identity}").mkdir(parents=True)
        for image in range(2):
            pixels = np.full((32, 32, 3), 40 * identity + 20 * image, np.uint8)
            (tmp_path / "set" / f"id{identity}" / f"{image}.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    return tmp_path / "set"


def ends(arguments: list[str]) -> int:
    """The exit code."""
    try:
        return main(arguments)
    except SystemExit as ending:
        return ending.code


def test_a_sound_set(data, capsys):
    assert ends(["data", "check", str(data)]) == 0
    assert "wrong: nothing" in capsys.readouterr().out


def test_a_set_with_faults_has_an_exit_code_of_its_own(data, tmp_path, capsys):
    (data / "id1" / "0.png").write_bytes(b"GIF89a")
    figure, clean = tmp_path / "curve.png", tmp_path / "clean.rec"
    assert ends(["data", "check", str(data), "--json", "--figure", str(figure), "--fix", str(clean)]) == 1
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert report["unreadable"] == [{"name": str(data / "id1" / "0.png"), "reason": "GIF, which nothing here decodes"}]
    assert "near" not in report and "checking" not in output.err
    image = cv2.imread(str(figure))
    assert image is not None and image.std() > 10
    assert ends(["data", "check", str(clean)]) == 0
    assert (tmp_path / "clean.left_out.txt").read_text() == f"{data}/id1/0.png\tGIF, which nothing here decodes\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nowhere"], "nowhere does not exist"),
        (["--near", "2"], "2 is no cosine from 0 to below 1"),
        (["--fix", "clean.tar"], "give it a name that ends in .rec"),
    ],
)
def test_options_that_cannot_be(data, arguments, words, capsys):
    assert ends(["data", "check", str(data), *arguments]) == 2
    assert words in capsys.readouterr().err
