"""What cannot be packed is left out, named with its reason, and labels stay contiguous."""

import errno
import os

import cv2
import numpy as np
import pytest
from pictures import picture

from dali_loaders import open_source, pack, reading
from dali_loaders.account import ReadError, Unreadable
from dali_loaders.encoded import read_image
from dali_loaders.packing import PackConfig
from dali_loaders.reading import StorageError


def listed(path):
    return dict(line.split("\t") for line in path.read_text().splitlines())


def test_empty_and_unreadable_files(folder, tmp_path, monkeypatch):
    """person01 loses an image, person02 all of them, person04 one that the system refuses."""
    (folder / "person01" / "02.jpg").write_bytes(b"")
    for image in (folder / "person02").iterdir():
        image.write_bytes(b"")
    source = open_source(str(folder))
    read = type(source).read

    def refuse(self, index):
        if self.name(index).endswith("person04/03.jpg"):
            raise ReadError.of(PermissionError(13, "Permission denied"))
        return read(self, index)

    monkeypatch.setattr(type(source), "read", refuse)
    report = pack(source, str(tmp_path / "out.rec"))
    account = report.account
    assert (account.seen, account.used) == (24, 18)
    assert {reason: passed.count for reason, passed in account.passed_over.items()} == {"empty": 5, "permission denied": 1}
    assert report.lost == ["person02"] and report.identities == 5
    for words in ("18 images of 5 identities", "left out: 6 of 24", "5 empty", "1 permission denied", "left out: 1 (person02)"):
        assert words in str(report)
    names = listed(tmp_path / "out.left_out.txt")
    assert len(names) == 6 and names[str(folder / "person04" / "03.jpg")] == "permission denied"

    packed = open_source(str(tmp_path / "out.rec"))
    assert packed.labels.tolist() == np.repeat(np.arange(5), [4, 3, 4, 3, 4]).tolist()
    assert packed.identities == ["person00", "person01", "person03", "person04", "person05"]
    os.unlink(tmp_path / "out.identities.txt")  # then the labels are those of the records
    assert open_source(str(tmp_path / "out.rec")).labels.tolist() == packed.labels.tolist()

    for file in folder.rglob("*.jpg"):
        file.write_bytes(picture(1))
    monkeypatch.undo()
    assert pack(open_source(str(folder)), str(tmp_path / "out.rec")).left_out_list is None
    assert not (tmp_path / "out.left_out.txt").exists()


def test_nothing_to_pack_leaves_nothing(folder, tmp_path):
    for file in folder.rglob("*.jpg"):
        file.write_bytes(b"")
    before = set(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=r"none of its 24 images can be packed; the first: empty"):
        pack(open_source(str(folder)), str(tmp_path / "out.rec"))
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("config", [PackConfig(verify=True), PackConfig(resize=16)])
def test_what_cannot_be_decoded_where_it_has_to_be(folder, tmp_path, config):
    whole = (folder / "person00" / "01.jpg").read_bytes()
    (folder / "person00" / "01.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "person03" / "02.jpg").write_bytes(b"<html>not found</html>")
    report = pack(open_source(str(folder)), str(tmp_path / "out.rec"), config)
    names = listed(tmp_path / "out.left_out.txt")
    assert names[str(folder / "person00" / "01.jpg")] == "cut off"
    assert names[str(folder / "person03" / "02.jpg")].startswith("HTML page")
    assert report.account.used == 22


def test_a_source_that_changes_is_noticed(folder, tmp_path, monkeypatch):
    source = open_source(str(folder))
    reads = iter(range(1000))
    monkeypatch.setattr(type(source), "read", lambda self, index: picture(next(reads)))
    before = set(os.listdir(tmp_path))
    with pytest.raises(ValueError, match="does not come back from the packed set as it was read"):
        pack(source, str(tmp_path / "out.rec"), PackConfig(verify=True), workers=1, resume=True)
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("config", [PackConfig(verify=True), PackConfig(resize=16)], ids=["verify", "resize"])
def test_what_training_refuses_is_not_decoded_by_other_means(folder, tmp_path, config):
    """OpenCV makes noise of pixels in floating point, and its decoder of JPEG 2000 crashes on damaged files."""
    pixels = np.random.default_rng(0).random((32, 32, 3), np.float32)
    (folder / "person01" / "float.tif").write_bytes(cv2.imencode(".tif", pixels)[1])
    (folder / "person01" / "other.jp2").write_bytes(cv2.imencode(".jp2", np.uint8(255 * pixels))[1])
    source = open_source(str(folder))
    report = pack(source, str(tmp_path / "out.rec"), config)
    expected = {source.name(index): data.reason for index in range(26) if isinstance(data := read_image(source, index), Unreadable)}
    assert report.account.used == 24 and listed(tmp_path / "out.left_out.txt") == expected


def test_a_hiccup_of_the_storage_leaves_nothing_out(folder, tmp_path, monkeypatch):
    source, fails = open_source(str(folder)), [True]
    read = type(source).read

    def hiccup(self, index):
        if index == 7 and fails:
            fails.pop()
            raise OSError(errno.EIO, "Input/output error")
        return read(self, index)

    monkeypatch.setattr(type(source), "read", hiccup)
    monkeypatch.setattr(reading, "WAITS", (0.0,))
    assert pack(source, str(tmp_path / "out.rec")).account.used == 24
    fails += [True] * 9
    with pytest.raises(StorageError, match="cannot be read: Input/output error"):
        pack(source, str(tmp_path / "other.rec"))
