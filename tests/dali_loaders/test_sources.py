"""Folder, tar and RecordIO give the same images and labels; whatever holds no labelled images ends in a sentence."""

import pickle
import tarfile

import numpy as np
import pytest
from pictures import picture

from dali_loaders import open_source, pack
from dali_loaders.recordio.records import IRHeader, RecordWriter, pack_record
from dali_loaders.sources import single_image_identities


def test_folder_tar_and_record_are_the_same_set(folder, tar):
    rec = str(folder.with_suffix(".rec"))
    pack(open_source(str(folder)), rec)
    a, b, c = (open_source(str(path)) for path in (folder, tar, rec))
    assert a.identities == b.identities == c.identities == [f"person{n:02}" for n in range(6)]
    for source in (a, b, c):
        assert source.labels.dtype == np.int64
        assert source.labels.tolist() == np.repeat(np.arange(6), 4).tolist()
        assert len(source) == 24
    for index in range(24):
        assert a.read(index) == b.read(index) == c.read(index) == picture(index)


def test_names_say_where_an_image_is(folder, tar):
    pack(open_source(str(folder)), str(folder.with_suffix(".rec")))
    assert open_source(str(folder)).name(5) == f"{folder}/person01/01.jpg"
    assert open_source(f"{folder}/").name(5) == f"{folder}/person01/01.jpg"
    assert open_source(str(tar)).name(5) == "set.tar:person01/01.jpg"
    assert open_source(str(folder.with_suffix(".rec"))).name(5) == "set.rec:record 6"


def test_sources_survive_pickling(folder, tar):
    pack(open_source(str(folder)), str(folder.with_suffix(".rec")))
    for path in (folder, tar, folder.with_suffix(".rec")):
        assert pickle.loads(pickle.dumps(open_source(str(path)))).read(7) == picture(7)


def test_other_files_and_hidden_ones_are_left_out(folder):
    (folder / "person00" / "notes.txt").write_text("not an image")
    (folder / "person00" / "._00.jpg").write_text("not an image")
    (folder / "README.md").write_text("about")
    assert len(open_source(str(folder))) == 24


def test_tar_members_with_a_leading_dot_and_a_common_folder(tmp_path):
    path = tmp_path / "a.tar"
    (tmp_path / "x.jpg").write_bytes(picture(1))
    with tarfile.open(path, "w") as out:
        out.add(tmp_path / "x.jpg", "./train/anna/1.jpg")
        out.add(tmp_path / "x.jpg", "./train/ben/1.JPEG")
    source = open_source(str(path))
    assert source.identities == ["train/anna", "train/ben"]
    assert source.read(1) == picture(1)


def test_identities_with_one_image_are_named(folder):
    for number in (1, 2, 3):
        (folder / "person02" / f"{number:02}.jpg").unlink()
    assert single_image_identities(open_source(str(folder))) == ["person02"]


def test_labels_of_a_record_file_are_made_contiguous(tmp_path):
    with RecordWriter(str(tmp_path / "a.rec")) as writer:
        for key, label in enumerate((700.0, 20.0, 700.0, 3.0)):
            writer.write(key, pack_record(IRHeader(0, label, key, 0), picture(key)))
    source = open_source(str(tmp_path / "a.rec"))
    assert source.labels.tolist() == [2, 1, 2, 0]
    assert source.identities == ["3", "20", "700"]


def test_records_come_in_the_order_of_their_keys(tmp_path):
    with RecordWriter(str(tmp_path / "a.rec")) as writer:
        for key in (5, 1, 3):
            writer.write(key, pack_record(IRHeader(0, float(key), key, 0), picture(key)))
    source = open_source(str(tmp_path / "a.rec"))
    assert [source.name(index) for index in range(3)] == ["a.rec:record 1", "a.rec:record 3", "a.rec:record 5"]
    assert source.read(2) == picture(5)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match=r"none does not exist; expected a folder, a \.tar"):
        open_source(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no data given"):
        open_source("")
    with pytest.raises(ValueError, match="holds no images"):
        open_source(str(tmp_path))
    (tmp_path / "person").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        open_source(str(tmp_path))


def test_images_without_identity_folders(tmp_path):
    (tmp_path / "1.jpg").write_bytes(picture(1))
    with pytest.raises(ValueError, match=r"holds 1\.jpg outside any identity folder"):
        open_source(str(tmp_path))


def test_a_file_that_is_no_tar(tmp_path):
    (tmp_path / "a.tar").write_text("text " * 500)
    with pytest.raises(ValueError, match=r"a\.tar is not a readable uncompressed \.tar"):
        open_source(str(tmp_path / "a.tar"))


@pytest.mark.parametrize("left", [0.99, 0.5])
def test_a_tar_that_is_cut_off(tar, left):
    data = tar.read_bytes().rstrip(b"\0")
    tar.write_bytes(data[: int(len(data) * left)])
    with pytest.raises(ValueError, match=r"set\.tar is (cut off|not a readable)"):
        open_source(str(tar))


def test_a_record_file_without_images(tmp_path):
    with RecordWriter(str(tmp_path / "a.rec")) as writer:
        writer.write(0, pack_record(IRHeader(2, np.array([1, 1]), 0, 0), b""))
    with pytest.raises(ValueError, match="holds 1 records but no image"):
        open_source(str(tmp_path / "a.rec"))


def test_reader_names(folder):
    with pytest.raises(ValueError, match="unknown reader 'mx'"):
        open_source(str(folder), "mx")
    with pytest.raises(ValueError, match=r"reads \.rec files only"):
        open_source(str(folder), "mxnet")


def test_links_are_followed_but_not_in_circles_and_hidden_folders_are_passed_over(tmp_path):
    (tmp_path / "set" / "anna").mkdir(parents=True)
    (tmp_path / "set" / ".cache").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for folder in ("set/anna", "set/.cache", "elsewhere"):
        (tmp_path / folder / "0.jpg").write_bytes(b"x")
    (tmp_path / "set" / "berta").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "anna" / "circle").symlink_to(tmp_path / "set")
    source = open_source(str(tmp_path / "set"))
    assert source.identities == ["anna", "berta"] and len(source) == 2
