"""Several sets as one: every image once under the right name, identities apart or joined, and paths with commas."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import picture, write_folder

from dali_loaders import DataConfig, open_source, pack
from dali_loaders.account import ReadError
from dali_loaders.sources import SeveralSources, TarSource, distinct_names, fingerprint, open_data, read_many
from dali_loaders.sources.several import split_paths


@pytest.fixture
def other(tmp_path):
    """2 identities with 3 images each; one name of an identity is that of one in `folder`."""
    path = write_folder(tmp_path / "more", identities=2, images=3)
    os.rename(path / "person01", path / "new")
    return path


def test_identities_are_kept_apart(folder, tar, other):
    source = open_source(f"{tar},{other}")
    assert isinstance(source, SeveralSources)
    assert source.identities == [f"set/person{n:02}" for n in range(6)] + ["more/new", "more/person00"]
    assert len(source) == 30 and np.array_equal(source.labels, np.repeat(np.arange(8), [4] * 6 + [3] * 2))
    parts = [open_source(str(tar)), open_source(str(other))]
    assert [source.read(i) for i in range(30)] == [part.read(i) for part in parts for i in range(len(part))]


def test_identities_are_joined_by_name(tar, other):
    source = open_data(DataConfig(train=f"{tar}, {other}", identities="joined"))
    assert source.identities == [f"person{n:02}" for n in range(6)] + ["new"]
    assert np.array_equal(source.labels, np.repeat([*range(6), 6, 0], [4] * 6 + [3] * 2))
    assert source.remarks == ["set: 24 images", "more: 6 images", "1 of 7 identities are in more than one set"]


def test_joined_by_numbers_is_said(folder, tmp_path):
    paths = [str(tmp_path / name / "train.rec") for name in "ab"]
    for path in paths:
        os.makedirs(os.path.dirname(path))
        pack(open_source(str(folder)), path)
        os.remove(path.replace(".rec", ".identities.txt"))
    source = open_source(",".join(paths), joined=True)
    assert source.identities == [str(n) for n in range(6)] and len(source) == 48
    assert source.remarks[-1].endswith("right only if the sets number the same people")
    assert [source.name(0), source.name(47)] == [f"{paths[0]}:record 1", f"{paths[1]}:record 24"]
    assert open_source(",".join(paths)).identities == [f"{name}/train/{n}" for name in "ab" for n in range(6)]


def test_many_images_are_read_from_each_set_in_one_call(tar, other, monkeypatch):
    source = open_source(f"{tar},{other}")
    indices = np.array([25, 3, 29, 3, 0])
    calls = []

    def many(self, own):
        calls.append(own.tolist())
        return [self.read(index) for index in own.tolist()]

    monkeypatch.setattr(TarSource, "read_many", many, raising=False)
    assert read_many(source, indices) == [source.read(int(index)) for index in indices]
    assert calls == [[3, 3, 0]]


def test_an_image_that_cannot_be_read_has_its_reason(tar, other):
    source = open_source(f"{tar},{other}")
    os.remove(source.name(24))
    with pytest.raises(ReadError, match=r"no such file or directory|vanished"):
        read_many(source, np.array([0, 24]))


def test_the_account_is_the_sum(folder, other):
    (other / "new" / "notes.txt").write_text("no image")
    account = open_source(f"{folder},{other}").account
    assert (account.seen, account.used) == (31, 30)
    assert [passed.examples for passed in account.passed_over.values()] == [["more: new/notes.txt"]]


def test_it_can_be_pickled_and_packed(tar, other, tmp_path):
    source = open_source(f"{tar},{other}")
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(i) for i in (0, 29)] == [source.read(i) for i in (0, 29)]
    pack(source, str(tmp_path / "all.rec"))
    packed = open_source(str(tmp_path / "all.rec"))
    assert packed.identities == source.identities and np.array_equal(packed.labels, source.labels)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["x/a.rec", "y/b.tar"], ["a", "b"]),
        (["x/lfw.bin", "y/lfw.bin"], ["x/lfw.bin", "y/lfw.bin"]),
        (["x/train.rec", "y/z/train.rec"], ["x/train", "z/train"]),
        (["a.rec", "a.tar"], ["a.rec", "a.tar"]),
        (["/q/v1.5", "/r/v1.6/"], ["v1.5", "v1.6"]),
        (["s3://bucket/a.rec", "a.REC"], ["bucket/a", f"{os.path.basename(os.getcwd())}/a"]),
    ],
)
def test_distinct_names(paths, names):
    assert distinct_names(paths) == names


def test_the_same_data_twice_is_refused(folder, tmp_path):
    os.symlink(folder, tmp_path / "link")
    for text in (f"{folder},{folder}", f"{folder},{tmp_path / 'link'}", f"{folder}/person01,{folder}"):
        with pytest.raises(ValueError, match="are the same data, or one is within the other"):
            open_source(text)


def test_a_path_with_a_comma(folder, tmp_path):
    path = tmp_path / "a,b"
    os.rename(folder, path)
    assert len(open_source(str(path))) == 24
    assert split_paths(f"x.rec,{path},{path}, y.tar") == ["x.rec", str(path), str(path), "y.tar"]
    assert split_paths("{a,b}.tar,c_{0..3}.tar") == ["{a,b}.tar", "c_{0..3}.tar"]
    assert split_paths("") == [""]


@given(st.lists(st.text("ab{}., ", max_size=4), min_size=1, max_size=5))
def test_splitting_loses_nothing(pieces):
    text = ",".join(pieces)
    try:
        assert "".join(split_paths(text)).replace(",", "").replace(" ", "") == text.replace(",", "").replace(" ", "")
    except ValueError as error:
        assert "separated by one comma" in str(error)


@pytest.mark.parametrize(
    ("train", "options", "words"),
    [
        ("{a},", {}, "nothing before, between or after its commas"),
        ("{a},{b}", {"weights": (1.0,)}, "data.weights has 1 numbers, but data.train names 2 sets"),
        ("{a}", {"weights": (1.0,)}, "data.weights is given for several sets, but data.train names one"),
        ("{a},missing", {}, "missing does not exist"),
        ("{a},{b}", {"reader": "mxnet"}, "reader='mxnet' reads .rec files only"),
    ],
)
def test_sentences(folder, other, train, options, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        open_data(DataConfig(train=train.format(a=folder, b=other), **options))


def test_settings_are_checked():
    for options, words in (
        ({"weights": (1.0, 0.0)}, "positive numbers"),
        ({"identities": "both"}, "apart or joined"),
        ({"changed": "x"}, "refuse"),
    ):
        with pytest.raises(ValueError, match=words):
            DataConfig(**options)


def test_a_fingerprint_tells_sets_apart_but_not_places(folder, tmp_path):
    def of(path):
        return fingerprint(open_source(str(path)))

    before = of(folder)
    assert before["images"] == 24 and before["num_classes"] == 6
    moved = tmp_path / "moved"
    os.rename(folder, moved)
    assert of(moved) == before
    os.rename(moved / "person02" / "00.jpg", moved / "person02" / "09.jpg")  # the same labels, another order
    assert {key for key, value in of(moved).items() if value != before[key]} == {"image_order"}
    os.rename(moved / "person02" / "09.jpg", moved / "person02" / "00.jpg")
    os.rename(moved / "person02" / "00.jpg", moved / "person03" / "00a.jpg")
    assert {key for key, value in of(moved).items() if value != before[key]} == {"labels", "image_order"}
    (moved / "person04" / "77.jpg").write_bytes(picture(77))
    assert of(moved)["images"] == 25


def test_a_tar_of_a_folder_is_the_same_data_and_a_rec_is_not(folder, tar, tmp_path):
    pack(open_source(str(folder)), str(tmp_path / "packed.rec"))
    of_folder, of_tar, of_record = (fingerprint(open_source(str(path))) for path in (folder, tar, tmp_path / "packed.rec"))
    assert of_tar == of_folder
    assert {key for key, value in of_record.items() if value != of_folder[key]} == {"image_order"}


def test_fingerprints_of_several_sets_know_their_order_and_weights(folder, other):
    config = DataConfig(train=f"{folder},{other}", weights=(1.0, 2.0))
    first = fingerprint(open_data(config))
    assert first["weights"] == [[24, 1.0], [6, 2.0]]
    assert fingerprint(open_data(config)) == first
    assert fingerprint(open_data(replace(config, weights=(2.0, 2.0)))) != first
    assert fingerprint(open_data(replace(config, train=f"{other},{folder}")))["image_order"] != first["image_order"]
