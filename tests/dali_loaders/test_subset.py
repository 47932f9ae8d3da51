"""Lists of what to use and what not: image numbers, image names and identity names, and a sentence with the line for anything else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dali_loaders import DataConfig, open_source, pack
from dali_loaders.skipped import Skipped
from dali_loaders.sources import fingerprint, open_data, read_many


def selected(tmp_path, path, subset="", exclude="", **options):
    for name, text in (("subset", subset), ("exclude", exclude)):
        if text:
            (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    files = {name: str(tmp_path / name) for name, text in (("subset", subset), ("exclude", exclude)) if text}
    return open_data(DataConfig(train=str(path), **files, **options))


def test_numbers_names_and_identities(folder, tmp_path):
    whole = open_source(str(folder))
    source = selected(tmp_path, folder, "23\nperson03\n\nperson01/02.jpg\tblurred\n22\nimage:21\n21\n")
    kept = [6, 12, 13, 14, 15, 21, 22, 23]
    assert [source.read(i) for i in range(len(source))] == [whole.read(i) for i in kept]
    assert read_many(source, np.array([7, 0])) == [whole.read(23), whole.read(6)]
    assert source.name(0) == whole.name(6)
    assert source.identities == ["person01", "person03", "person05"]
    assert source.labels.dtype == np.int64 and source.labels.tolist() == [0, 1, 1, 1, 1, 2, 2, 2]
    assert (source.account.seen, source.account.used) == (24, 8)
    passed = source.account.passed_over["left out by data.subset"]
    assert passed.count == 16 and passed.examples == [whole.name(i) for i in range(5)]
    assert source.remarks == ["left out by data.subset: 16 images", "8 of 24 images and 3 of 6 identities are left"]


def test_what_is_excluded(folder, tmp_path):
    whole = open_source(str(folder))
    skipped = f"{whole.name(0)}\tcut off\r\n{whole.name(1)}\tno image\r\n"  # as a run writes it, edited on Windows
    source = selected(tmp_path, folder, subset="\ufeffperson00\r\nperson02\r\n", exclude=skipped + "person02/00.jpg\r\nperson03\r\n")
    assert source.labels.tolist() == [0, 0, 1, 1, 1]
    account = source.account
    assert account.seen == 24 and account.used == 5
    assert {reason: passed.count for reason, passed in account.passed_over.items()} == {
        "left out by data.subset": 16,
        "left out by data.exclude": 3,
    }


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 23), min_size=1), st.booleans())
def test_any_list_of_numbers(folder, tmp_path, numbers, excluded):
    kept = sorted(set(range(24)) - set(numbers) if excluded else set(numbers))
    lists = {"exclude" if excluded else "subset": "\n".join(map(str, numbers))}
    if not kept:
        with pytest.raises(ValueError, match=r"all 24 images are left out by data\.exclude"):
            selected(tmp_path, folder, **lists)
        return
    whole, source = open_source(str(folder)), selected(tmp_path, folder, **lists)
    assert [source.name(i) for i in range(len(source))] == [whole.name(i) for i in kept]
    assert [source.identities[label] for label in source.labels] == [whole.identities[label] for label in whole.labels[kept]]
    assert source.account.seen == source.account.used + sum(p.count for p in source.account.passed_over.values()) == 24


def test_bytes_that_are_no_utf8(folder, tmp_path):
    name = "b\udcff\udcfe"
    (folder / "person04").rename(folder / name)
    source = selected(tmp_path, folder, f"{name}\n")
    assert source.identities == [name] and len(source) == 4
    assert fingerprint(source)["images"] == 4


def test_the_list_of_skipped_images_leaves_them_out(folder, tmp_path):
    (folder / "person04").rename(folder / "back\\slash and\tb\udcff")
    source = open_source(str(folder))
    skipped = Skipped(source, str(tmp_path / "skipped.txt"))
    for index in (0, 1, 23):
        skipped.add(index, "cut off")
    left = selected(tmp_path, folder, exclude=(tmp_path / "skipped.txt").read_text())
    assert [left.name(i) for i in range(len(left))] == [source.name(i) for i in range(2, 23)]


def test_parts_of_several_sets_shrink(folder, tar, tmp_path):
    (folder).rename(tmp_path / "other")
    source = selected(tmp_path, f"{tar},{tmp_path / 'other'}", "set/person01\nother/person05\n25\n", weights=(1.0, 3.0))
    assert [tuple(part) for part in source.parts] == [("set", 0, 4, 1.0), ("other", 4, 9, 3.0)]
    assert source.identities == ["set/person01", "other/person00", "other/person05"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0\n24\n", r"subset, line 2: '24' is nothing of .*set; expected the number of an image \(0 to 23\).*'person00'.*00.jpg"),
        ("1\nperson1\nperson2\n", "line 2: 'person1' is nothing.*2 lines are like that"),
        ("-1\n", "line 1: '-1' is nothing"),
        ("007\n", "line 1: '007' is nothing"),
        ("identity:7\n", "line 1: no identity of .*set is called '7'; they are called like 'person00'"),
        ("image:person01\n", "line 1: 'person01' is nothing"),
        ("00.jpg\n", "line 1: '00.jpg' is the name of several images .*person00/00.jpg and .*person01/00.jpg.; write more of it"),
        ("\n", "all 24 images are left out by data.subset"),
    ],
)
def test_sentences(folder, tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        selected(tmp_path, folder, text)


def test_no_such_list(folder, tmp_path):
    with pytest.raises(ValueError, match=r"data.exclude: .*gone cannot be read \(No such file or directory\)"):
        open_data(DataConfig(train=str(folder), exclude=str(tmp_path / "gone")))


def test_a_number_that_is_also_an_identity_is_refused(folder, tmp_path):
    path = str(tmp_path / "set.rec")
    pack(open_source(str(folder)), path)
    (tmp_path / "set.identities.txt").unlink()
    with pytest.raises(ValueError, match="line 2: '3' is the number of an image and the name of an identity; write image:3 or identity:3"):
        selected(tmp_path, path, "20\n3\n")
    assert len(selected(tmp_path, path, "identity:3\n")) == 4
    assert len(selected(tmp_path, path, "image:3\nrecord 9\nset.rec:record 10\n")) == 3


def test_the_fingerprint_knows_the_list(folder, tmp_path):
    prints = [fingerprint(selected(tmp_path, folder, text)) for text in ("0\n1\n", "0\n2\n", "1\n0\n")]
    assert prints[0] == prints[2] and prints[0] != prints[1]
