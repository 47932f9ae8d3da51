"""What cannot be written is refused before the work, and the look leaves nothing behind."""

from __future__ import annotations

import os

import pytest

from dali_loaders.outputs import check_file, check_folder


def test_what_can_be_written_leaves_nothing(tmp_path):
    check_file(str(tmp_path / "a.png"), "the figure", ".png")
    check_file(str(tmp_path / "A.PNG"), "the figure", ".png")
    check_file(str(tmp_path / "new" / "er" / "a.png"), "the figure", ".png", makes_folder=True)
    check_file(str(tmp_path / "anything"), "the list")
    assert os.listdir(tmp_path) == []
    (tmp_path / "a.png").write_bytes(b"before")
    check_file(str(tmp_path / "a.png"), "the figure", ".png")
    assert (tmp_path / "a.png").read_bytes() == b"before"


@pytest.mark.parametrize(
    ("path", "makes_folder", "words"),
    [
        ("{folder}/a b/c.png", False, "written to '{folder}/a b/c.png' (there is no folder '{folder}/a b')"),
        ("", True, "the figure has no name: give it one that ends in .png."),
        ("a.svg", True, "would be named a.svg; give it a name that ends in .png."),
        ("{folder}/there.png", True, "there.png (it is a folder): choose another place."),
        ("{folder}/pipe.png", True, "it is no regular file"),
        ("{folder}/none/a.png", False, "there is no folder {folder}/none"),
        ("{folder}/file/a.png", True, "{folder}/file"),
        ("{folder}/file/deeper/a.png", True, "{folder}/file"),
        ("/proc/a.png", True, "cannot be written to /proc/a.png (no file can be made there)"),
        ("/proc/none/a.png", True, "cannot be written to /proc/none/a.png"),
        ("{folder}/" + "a" * 300 + ".png", True, "File name too long"),
    ],
)
def test_what_cannot_be_written(tmp_path, path, makes_folder, words):
    (tmp_path / "there.png").mkdir()
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="the figure") as fault:
        check_file(path.format(folder=tmp_path), "the figure", ".png", makes_folder=makes_folder)
    assert words.format(folder=tmp_path) in str(fault.value)


def test_a_folder_is_not_called_like_a_file(tmp_path):
    for path in ("runs/a", "runs/lr0.1", "runs/a.zip/"):
        check_folder(path, "run.folder")
    (tmp_path / "a.zip").mkdir()
    check_folder(str(tmp_path / "a.zip"), "run.folder")
    with pytest.raises(ValueError, match=r"run\.folder is a folder, but b\.ZIP is the name of a file: choose another, or write b\.ZIP/"):
        check_folder("b.ZIP", "run.folder")
