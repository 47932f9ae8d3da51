"""What a path is: every form opens by itself, in lists and by patterns, and what is no set ends in a sentence."""

from __future__ import annotations

import errno
import os
import shutil
import tarfile

import numpy as np
import pytest

from dali_loaders import DataConfig, open_source, pack
from dali_loaders.sources import FolderSource, RecordSource, SeveralSources, TarSource, fingerprint, open_data


@pytest.fixture
def shards(folder, tmp_path):
    """The set in three .rec and three .tar, two identities each, and an InsightFace folder with all of it."""
    for number in range(3):
        part = tmp_path / f"part{number}"
        for identity in range(2 * number, 2 * number + 2):
            shutil.copytree(folder / f"person{identity:02}", part / f"person{identity:02}")
        pack(open_source(str(part)), str(tmp_path / f"s{number}.rec"))
        with tarfile.open(tmp_path / f"s{number}.tar", "w") as tar:
            tar.add(part, ".")
    (tmp_path / "ms1m").mkdir()
    pack(open_source(str(folder)), str(tmp_path / "ms1m" / "train.rec"))
    (tmp_path / "ms1m" / "property").write_text("6,32,32")
    (tmp_path / "tars").mkdir()
    for number in range(3):
        shutil.copy(tmp_path / f"s{number}.tar", tmp_path / "tars")
    return tmp_path


@pytest.mark.parametrize("path", ["s{0..2}.rec", "s?.rec", "s[0-2].tar", "s{0..2}.tar", "ms1m", "ms1m/*.rec", "tars", "part*", "set"])
def test_one_set_whatever_its_form(shards, folder, path):
    plain, source = FolderSource(str(folder)), open_source(f"{shards}/{path}")
    assert source.identities == plain.identities
    assert np.array_equal(source.labels, plain.labels)
    assert [bytes(source.read(i)) for i in range(24)] == [plain.read(i) for i in range(24)]
    assert source.account.used == 24


def test_patterns_in_a_list_are_sets_of_their_own(shards):
    source = open_data(DataConfig(train=f"{shards}/s{{0..2}}.rec,{shards}/s{{0,1}}.tar", weights=(1.0, 2.0)))
    assert isinstance(source, SeveralSources)
    assert [tuple(part) for part in source.parts] == [("s{0..2}", 0, 24, 1.0), ("s{0,1}", 24, 40, 2.0)]
    assert source.identities[0] == "s{0..2}/person00" and len(source.identities) == 10
    assert source.name(0) == f"{shards}/s0.rec:record 1"


def test_a_remote_set_in_a_list(shards, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").put(str(shards / "s0.tar"), "/bucket/s0.tar")
    source = open_data(DataConfig(train=f"memory://bucket/s0.tar,{shards}/s1.rec", cache=str(tmp_path / "cache")))
    assert source.identities == [f"s0/person{n:02}" for n in (0, 1)] + [f"s1/person{n:02}" for n in (2, 3)]
    assert len(source.read(0)) and len(source) == 16


def test_a_parquet_in_a_list(shards, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = [open_source(f"{shards}/s0.rec").read(i) for i in range(4)]
    pq.write_table(
        pa.table({"image": [{"bytes": bytes(image), "path": None} for image in images], "label": [0, 0, 7, 7]}), tmp_path / "x.parquet"
    )
    source = open_source(f"{tmp_path}/x.parquet,{shards}/s1.tar")
    assert source.identities == ["x/0", "x/7", "s1/person02", "s1/person03"]
    assert [bytes(source.read(i)) for i in range(4)] == images


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("s{0..3}.rec", r"1 of the 4 files of .* are missing"),
        ("s0.{rec,tar}", r"stands for .*s0\.rec, .*s0\.tar: expected RecordIO files only, or none"),
        ("{part0,s1.tar}", r"stands for .*part0, a folder, and for files"),
        ("mss1m", r"does not exist; expected a folder.* there is .*ms1m"),
    ],
)
def test_sentences(shards, path, words):
    with pytest.raises(ValueError, match=words):
        open_source(f"{shards}/{path}")


def test_mxnet_reads_records_only(shards):
    for path in ("s?.tar", "set", "tars"):
        with pytest.raises(ValueError, match=r"reads \.rec files only"):
            open_source(f"{shards}/{path}", "mxnet")


def test_a_folder_of_identities_may_hold_other_files(folder, shards):
    shutil.copy(shards / "s0.rec", folder)
    shutil.copy(shards / "s0.tar", folder)
    source = open_source(str(folder))
    assert isinstance(source, FolderSource) and source.account.seen == 26


def test_a_tar_of_a_folder_is_the_same_data(folder, tar, tmp_path):
    """So a run may go on with the one or the other."""
    assert isinstance(open_source(str(tar)), TarSource)
    assert fingerprint(open_source(str(tar))) == fingerprint(open_source(str(folder)))
    path = str(tmp_path / "packed.rec")
    pack(open_source(str(folder)), path)
    packed = open_source(path)
    assert isinstance(packed, RecordSource)
    assert {key for key, value in fingerprint(packed).items() if value != fingerprint(open_source(str(folder)))[key]} == {"image_order"}
    assert os.path.exists(path)


@pytest.mark.parametrize(("path", "own"), [("tars", ("s1.tar.cache", "s1.idx")), ("ms1m", ("train.lst", "train.rec.cache"))])
def test_what_else_a_folder_holds_is_accounted_for(shards, path, own):
    for name in (*own, "s3.tar.gz", "more.zip", "0.jpg", "lfw.bin", ".DS_Store"):
        (shards / path / name).write_bytes(b"anything")
    account = open_source(f"{shards}/{path}").account
    assert {why: sorted(passed.examples) for why, passed in account.passed_over.items()} == {
        "data beside the files that the folder is opened by": ["0.jpg", "more.zip", "s3.tar.gz"],
        "no image by its name": ["lfw.bin"],
        "hidden file": [".DS_Store"],
    }
    assert account.seen == 29


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_that_cannot_be_listed(folder, monkeypatch, number):
    def refuse(path):
        raise OSError(number, os.strerror(number), path)

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(ValueError, match=rf"set cannot be read: {os.strerror(number)}"):
        open_source(str(folder))


def test_a_path_that_cannot_be_looked_at_is_not_said_to_be_missing(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(ValueError, match=r"set/person00 cannot be read: Permission denied"):
        open_source(f"{folder}/person00")


@pytest.mark.parametrize("name", ["s.rec", "s.idx", "s.identities.txt", "s.tar", "s.parquet", "{s,t}.tar"])
def test_pipes_are_refused_and_not_waited_for(shards, tmp_path, name):
    shutil.copy(shards / "s0.rec", tmp_path / "s.rec")
    for pipe in ["s.tar", "t.tar"] if "{" in name else [name]:
        (tmp_path / pipe).unlink(missing_ok=True)
        os.mkfifo(tmp_path / pipe)
    path = name if name.endswith((".tar", ".parquet")) else "s.rec"
    with pytest.raises(ValueError, match="is a named pipe, not a file"):
        open_source(f"{tmp_path}/{path}")
