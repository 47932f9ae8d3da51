"""The list of skipped images: why, each once, whatever is in its name; and the sentence when there are too many."""

import multiprocessing
import os

import pytest

from dali_loaders.skipped import Skipped


class Named:
    path = "set"

    def __init__(self, names):
        self.name, self.count = names.__getitem__, len(names)

    def __len__(self):
        return self.count


def test_any_name_takes_one_line(tmp_path):
    """Names as messages have them stay as they are, since data.exclude finds images by those."""
    names = [os.fsdecode(b"\xc4\xe3/1.jpg"), "two\nlines\t.jpg", r"\xc4\xe3/1.jpg", "plain.jpg"]
    path = tmp_path / "runs" / "skipped.txt"
    skipped = Skipped(Named(names), str(path))
    for index in range(4):
        skipped.add(index, "cut off" if index else "no\nimage")
    assert path.read_bytes().splitlines() == [
        b"\\xc4\\xe3/1.jpg\tno\\nimage",
        b"two\\nlines\\t.jpg\tcut off",
        rb"\xc4\xe3/1.jpg" + b"\tcut off",
        b"plain.jpg\tcut off",
    ]
    assert skipped.names == names


def test_ranks_and_resumes_list_an_image_once(tmp_path):
    path = str(tmp_path / "skipped.txt")
    ranks = [Skipped(Named("abcdef"), path) for _ in range(3)]
    for index in (0, 1, 0, 2, 5, 2):
        for skipped in ranks:
            skipped.add(index, "cut off")
    assert ranks[0].names == ["a", "b", "c", "f"]
    resumed = Skipped(Named("abcdef"), path)
    for index in (3, 2, 0):
        resumed.add(index, "cut off")
    with open(path) as file:
        assert file.read() == "".join(f"{name}\tcut off\n" for name in "abcfd")


def _add_all(path):
    skipped = Skipped(Named([f"image {n}" for n in range(200)]), path)
    for index in range(200):
        skipped.add(index, "cut off")


def test_processes_at_the_same_time(tmp_path):
    path = str(tmp_path / "skipped.txt")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(_add_all, [path] * 3)
    with open(path) as file:
        assert sorted(file.read().splitlines()) == sorted(f"image {n}\tcut off" for n in range(200))


def test_the_sentence_names_the_most_frequent_reasons(tmp_path):
    names = [f"image {n}" for n in range(1000)]
    for path in (None, str(tmp_path / "skipped.txt")):
        skipped = Skipped(Named(names), path)
        reasons = ["cut off"] * 6 + ["permission denied"] * 3 + ["no image"] * 2 + ["empty", "too large"]
        for index, reason in enumerate(reasons):
            skipped.add(index, reason)
            skipped.add(index, "unreadable before")
        where = f"they are listed in {path}" if path else "the first are image 0, image 1, image 2"
        with pytest.raises(ValueError) as error:
            skipped.stop_above(13, 500)
        assert str(error.value).startswith(
            "13 unreadable images among the first 500 of set are more than 1%: "
            f"6 cut off, 3 permission denied, 2 no image, 2 for other reasons; {where}. Mend"
        )


def test_one_percent_is_admitted():
    skipped = Skipped(Named([str(n) for n in range(100_000)]), None)
    skipped.add(0, "cut off")
    skipped.stop_above(100, 500)  # of the 10,000 that are read before chance is ruled out
    with pytest.raises(ValueError, match="101 unreadable images"):
        skipped.stop_above(101, 500)
    skipped.stop_above(500, 50_000)


@pytest.mark.parametrize("place", ["folder", "file/skipped.txt", "device", "pipe"])
def test_a_list_that_cannot_be_written_ends_no_run(tmp_path, caplog, place):
    """A full disk, say: the log has the name too."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "device").symlink_to("/dev/full")
    os.mkfifo(tmp_path / "pipe")
    skipped = Skipped(Named("abc"), str(tmp_path / place))
    skipped.add(1, "cut off")
    assert skipped.names == ["b"] and 1 in skipped
    assert "skipping unreadable image b: cut off" in caplog.text and f"{tmp_path / place} cannot be written (" in caplog.text
