"""Tar shards: WebDataset's samples and identity folders, joined over shards; every member is an image, a label, or passed over."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import picture
from tar_sets import member

from dali_loaders.account import ChangedError, ReadError
from dali_loaders.sources import TarSource, webdataset
from dali_loaders.sources.patterns import expand, tars_in
from dali_loaders.sources.samples import split
from dali_loaders.sources.webdataset import ShardedTarSource, open_tars


def shard(path: Path, *members: tuple[str, bytes]) -> str:
    path.write_bytes(b"".join(member(name, data) for name, data in members) + bytes(1024))
    return str(path)


def reasons(source) -> dict[str, list[str]]:
    account = source.account
    assert account.seen == account.used + sum(passed.count for passed in account.passed_over.values()) and account.used == len(source)
    return {reason: passed.examples for reason, passed in account.passed_over.items()}


def samples(numbers: range, label=lambda number: number // 2) -> list[tuple[str, bytes]]:
    return [pair for n in numbers for pair in ((f"{n:06}.jpg", picture(n)), (f"{n:06}.cls", f"{label(n)}\n".encode()))]


def test_samples_of_several_shards(tmp_path):
    for number in range(12):
        shard(tmp_path / f"{number:03}.tar", *samples(range(number * 2, number * 2 + 2)))
    source = open_tars(expand(f"{tmp_path}/{{000..011}}.tar"), "the shards")
    assert source.path == "the shards" and len(source) == 24 and reasons(source) == {}
    assert source.identities == [str(label) for label in range(12)]  # by number, so that label 10 stays 10
    assert source.labels.dtype == np.int64 and source.labels.tolist() == [number // 2 for number in range(24)]
    assert [source.read(index) for index in range(24)] == [picture(number) for number in range(24)]
    assert source.name(5) == "002.tar:000005.jpg"
    order = np.array([23, 0, 7, 7, 1])
    assert [bytes(image) for image in source.read_many(order)] == [picture(number) for number in order]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(7) == picture(7) and copy.name(7) == source.name(7)
    assert len(tars_in(str(tmp_path))) == 12


@pytest.mark.parametrize("field", ["label", "identity", "cls", "class", "id"])
@pytest.mark.parametrize(
    ("values", "expected"), [([10, 9], ["9", "10"]), (["b", "a"], ["a", "b"]), ([1.0, "x"], ["1", "x"]), ([-1, 2], ["-1", "2"])]
)
def test_labels_in_json(tmp_path, field, values, expected):
    members = [
        (f"k/{n}.{kind}", data)
        for n, value in enumerate(values)
        for kind, data in (("json", json.dumps({"a": 0, field: value}).encode()), ("png", picture(n, extension=".png")))
    ]
    source = TarSource(shard(tmp_path / "a.tar", *members))
    assert source.identities == expected
    assert [source.identities[label] for label in source.labels] == [
        f"{value:g}" if value != value or isinstance(value, float) else str(value) for value in values
    ]


def test_the_first_of_several_fields_and_cls_before_json(tmp_path):
    source = TarSource(
        shard(
            tmp_path / "a.tar",
            ("0.jpg", picture(0)),
            ("0.json", b'{"id": 5, "label": "anna"}'),
            ("1.jpg", picture(1)),
            ("1.json", b'{"label": "anna"}'),
            ("1.cls", b" berta "),
            ("1.txt", b"a caption"),
        )
    )
    assert source.identities == ["anna", "berta"] and reasons(source) == {"no image by its content (.txt)": ["1.txt"]}


def test_samples_that_lack_something_are_accounted_for(tmp_path):
    source = TarSource(
        shard(
            tmp_path / "a.tar",
            ("good.jpg", picture(0)),
            ("good.cls", b"+7"),
            ("other.image", picture(1)),
            ("other.cls", b"007"),
            ("no_label.jpg", picture(2)),
            ("no_image.cls", b"7"),
            ("no_image.json", b"{}"),
            ("empty.jpg", picture(2)),
            ("empty.cls", b" "),
            ("good.png", picture(3)),
            ("two.left.jpg", picture(4)),
            ("two.cls", b"1"),
            ("bad.jpg", picture(5)),
            ("bad.json", b"[" * 100_000),
            ("list.jpg", picture(5)),
            ("list.json", b'{"label": [1]}'),
            ("truth.jpg", picture(5)),
            ("truth.json", b'{"label": true}'),
            ("half.jpg", picture(5)),
            ("half.json", b'{"label": "\\ud800"}'),
            ("@eaDir/x.cls", b"3"),
        )
    )
    assert source.identities == ["7"] and len(source) == 2
    no_label = "sample whose .json has no label (label, identity, cls, class, id)"
    assert reasons(source) == {
        "thumbnail of a NAS (@eaDir)": ["@eaDir/x.cls"],
        "sample whose .json cannot be read": ["bad.jpg"],
        "sample whose .cls holds no label": ["empty.jpg"],
        "further image of a sample": ["good.png"],
        "sample whose .json has a label that is no text": ["half.jpg"],
        no_label: ["list.jpg", "truth.jpg"],
        "sample without a label": ["no_label.jpg"],
        "second dot in the name of a sample's image": ["two.left.jpg"],
        "label without an image": ["no_image.cls", "no_image.json"],
    }


def test_metadata_beside_images_of_identity_folders_are_no_labels(tmp_path):
    members = [(f"{name}/1.{kind}", data) for name in ("anna", "berta") for kind, data in (("jpg", picture(1)), ("json", b'{"pose": 3}'))]
    source = TarSource(shard(tmp_path / "a.tar", *members))
    assert source.identities == ["anna", "berta"] and reasons(source) == {
        "no image by its content (.json)": ["anna/1.json", "berta/1.json"]
    }


def test_folders_and_labels_that_differ_are_refused(tmp_path):
    def tar(*pairs: tuple[str, int]) -> str:
        members = [
            (f"{name}.{kind}", data) for name, label in pairs for kind, data in (("jpg", picture(1)), ("json", b'{"id": %d}' % label))
        ]
        return shard(tmp_path / "a.tar", *members)

    assert TarSource(tar(("a/1", 7), ("a/2", 7), ("b/1", 8))).identities == ["7", "8"]
    assert TarSource(tar(("a/1", 7), ("a/2", 8))).identities == ["7", "8"]  # one folder tells nothing
    for pairs in ([("a/1", 7), ("a/2", 8), ("b/1", 9)], [("a/1", 7), ("b/1", 7)]):
        with pytest.raises(ValueError, match=r"a\.tar names identities twice, by 2 folders and by a label in its \.json members"):
            TarSource(tar(*pairs))


def test_identity_folders_are_joined_by_name(tmp_path):
    one = shard(tmp_path / "1.tar", ("anna/1.jpg", picture(1)), ("carl/1.jpg", picture(2)))
    two = shard(tmp_path / "2.tar", ("10/1.jpg", picture(3)), ("9/1.jpg", picture(3)), ("anna/1.jpg", picture(4)), ("anna/n.txt", b"x"))
    three = shard(tmp_path / "3.tar")
    source = ShardedTarSource([one, two, three])
    assert source.identities == ["10", "9", "anna", "carl"]
    assert source.labels.tolist() == [2, 3, 0, 1, 2]
    assert [source.name(index) for index in (0, 4)] == ["1.tar:anna/1.jpg", "2.tar:anna/1.jpg"]
    assert reasons(source) == {"no image by its content (.txt)": ["anna/n.txt"], "shard without an image": [three]}


def test_shards_that_do_not_belong_together(tmp_path):
    folders = shard(tmp_path / "1.tar", ("anna/1.jpg", picture(1)))
    labels = shard(tmp_path / "2.tar", *samples(range(2)))
    with pytest.raises(
        ValueError, match=r"the set mixes two forms: \S+2\.tar has labels in \.cls or \.json members, \S+1\.tar has a folder"
    ):
        open_tars([folders, labels], "the set")
    with pytest.raises(ValueError, match=r"the set names the same tar twice, as \S+1\.tar and as \S+1\.tar"):
        open_tars([folders, str(tmp_path / "." / "1.tar")], "the set")
    with pytest.raises(ValueError, match=r"cannot open \S+none\.tar: No such file"):
        open_tars([folders, str(tmp_path / "none.tar")], "the set")
    with pytest.raises(ValueError, match="the set holds no images"):
        open_tars([shard(tmp_path / "3.tar"), shard(tmp_path / "4.tar")], "the set")
    bare = shard(tmp_path / "5.tar", ("1.jpg", picture(1)), ("1.json", b'{"url": "x"}'))
    with pytest.raises(ValueError, match=r"holds 1\.jpg outside any identity folder; expected IDENTITY.*, or KEY\.jpg beside KEY\.cls"):
        TarSource(bare)


def test_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "_opened", webdataset.lru_cache(2)(webdataset._opened.__wrapped__))
    source = ShardedTarSource([shard(tmp_path / f"{number}.tar", (f"a/{number}.jpg", picture(number))) for number in range(6)])
    for index in (0, 5, 3, 0, 1):
        assert source.read(index) == picture(index)
    assert webdataset._opened.cache_info().currsize == 2
    (tmp_path / "4.tar").unlink()
    (tmp_path / "5.tar").write_bytes(b"another one")
    with pytest.raises(ReadError, match=r"its tar cannot be opened: .*No such file"):
        source.read(4)
    assert "No such file" in source.read_many(np.array([0, 4]))[1].reason
    with pytest.raises(ChangedError):
        source.read_many(np.array([0, 5]))


def test_keys():
    assert split(b"a.b/c.D.JPG") == (b"a.b/c", b"d.jpg")
    assert split(b"x") == (b"x", b"")


_names = st.builds(
    "{}{}.{}".format,
    st.sampled_from(["", "a/", "b/"]),
    st.sampled_from("01"),
    st.sampled_from(["jpg", "PNG", "cls", "json", "txt", "x.jpg", "x"]),
)
_contents = st.sampled_from([b"", b"1", b"2", b"anna", b"{}", b'{"label": 1}', b'{"id": "x"}', b"[1", picture(1)])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(st.tuples(_names, _contents), max_size=6), min_size=1, max_size=3))
def test_whatever_shards_hold(tmp_path, shards):
    """Every member but a used label is used once or passed over once."""
    paths = [shard(tmp_path / f"{number}.tar", *members) for number, members in enumerate(shards)]
    try:
        source = open_tars(paths, "the set")
    except ValueError as error:
        assert "the set" in str(error) or any(path in str(error) for path in paths)
        return
    passed = reasons(source)
    labels = sum(1 for members in shards for name, _ in members if name.lower().endswith((".cls", ".json")))
    extra = sum(source.account.passed_over[reason].count for reason in passed if "shard" in reason or "identity folder" in reason)
    members = sum(map(len, shards))
    assert members - labels <= source.account.seen - extra <= members
    assert sorted(set(source.labels.tolist())) == list(range(len(source.identities)))
    assert len({source.name(index) for index in range(len(source))}) == len(source)
