""".rec and identities file as people have them: every image under its own label, or accounted for, or a sentence."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from record_sets import IMAGES, LABELS, NAMES, everything, expected, idx, offsets_of, relabel, write_plain, write_set

from dali_loaders import set_cache
from dali_loaders.account import ChangedError
from dali_loaders.identities import identities_path, read_identities, write_identities
from dali_loaders.recordio.records import IRHeader, RecordWriter, index_path, pack_record
from dali_loaders.sources import RecordSource


def test_a_set_with_names_and_without(tmp_path):
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES, NAMES)
    assert everything(RecordSource(path)) == expected(NAMES)
    os.unlink(identities_path(path))
    source = RecordSource(path)
    assert everything(source) == expected("0123")
    assert (source.account.seen, source.account.used) == (8, 8)


@pytest.mark.parametrize("key", [1, 4, 8])
def test_a_set_that_was_relabelled_beside_its_identities_file(tmp_path, key):
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES, NAMES)
    relabel(path, key, 2.0 if LABELS[key - 1] != 2 else 1.0)
    with pytest.raises(ValueError, match=rf"a\.identities\.txt does not match .*a\.rec: record {key} has the label"):
        RecordSource(path)


@pytest.mark.parametrize(
    ("counts", "names"),
    [
        ([2, 3, 2, 2], NAMES),  # another total
        ([3, 2, 2, 1], NAMES),  # the same one
        ([2, 3, 3], NAMES[:3]),
        ([2, 3, 2, 1], ["anna", "ben", "dora", "clara"]),  # another set's names
        ([], []),
    ],
)
def test_an_identities_file_of_another_set(tmp_path, counts, names):
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES, NAMES)
    write_identities(identities_path(path), np.array(counts, np.int64), names)
    with pytest.raises(ValueError, match=r"a\.identities\.txt does not match .*a\.rec: .*; delete it"):
        RecordSource(path)


def test_sets_packed_before_names_were_marked(tmp_path):
    assert RecordSource(write_set(tmp_path / "a.rec", LABELS, IMAGES, NAMES, marked=False)).identities == NAMES


@pytest.mark.parametrize(
    "name", ["a\nb", "a\tb", "a\r", '"quoted"', '"', "a\r\nb", "", "名前", os.fsdecode(b"\xc4\xe3"), "a\u2028b", "\ufeff"]
)
def test_names_of_any_kind_come_back(tmp_path, name):
    write_identities(str(tmp_path / "a.identities.txt"), np.array([1, 2]), [name, "other"])
    counts, names = read_identities(str(tmp_path / "a.rec"))
    assert counts.tolist() == [1, 2] and names == [name, "other"]


def test_identities_files_of_editors(tmp_path):
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES, NAMES)
    file = Path(identities_path(path))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert RecordSource(path).identities == NAMES


def test_an_identities_file_that_is_cut_at_any_byte(tmp_path):
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES, NAMES, marked=False)
    file = Path(identities_path(path))
    whole = file.read_bytes()
    for cut in range(len(whole)):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"a\.identities\.txt does not (match|hold lines)"):
            RecordSource(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2\tanna\n3\tben\nor not\n2\tclara\n1\tdora\n", "line 3 is 'or not'"),
        ("2\tanna\n-3\tben\n", "line 2 is"),
        ("2 anna\n", "line 1 is"),
        ("99999999999999999999\tanna\n", "does not hold lines"),
        ("2\tanna\n3\tben\n2\tanna\n1\tdora\n", "has the identity 'anna' 2 times"),
    ],
)
def test_identities_files_that_cannot_be_used(tmp_path, text, message):
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES, NAMES)
    Path(identities_path(path)).write_text(text)
    with pytest.raises(ValueError, match=message):
        RecordSource(path)


@pytest.mark.parametrize("named", [True, False])
def test_empty_images_are_accounted_for_and_shift_no_label(tmp_path, named):
    images = [b"" if n in (2, 7) else image for n, image in enumerate(IMAGES)]
    source = RecordSource(write_set(tmp_path / "a.rec", LABELS, images, NAMES if named else None))
    names = NAMES if named else "0123"
    assert everything(source) == [pair for pair in zip(images, (names[label] for label in LABELS), strict=True) if pair[0]]
    assert source.identities == list(names[:3])
    account = source.account
    assert (account.seen, account.used) == (8, 6)
    assert account.passed_over["no image in the record"].examples == ["a.rec:record 3", "a.rec:record 8"]


def test_records_too_short_for_their_header(tmp_path):
    with RecordWriter(str(tmp_path / "a.rec")) as writer:
        writer.write(0, pack_record(IRHeader(0, 0.0, 0, 0), b"image"))
        writer.write(1, b"short")
        writer.write(2, b"")
        writer.write(3, IRHeader(0, 0, 0, 0).flag.to_bytes(4, "little") + b"\xff" * 19)
        writer.write(4, (10**9).to_bytes(4, "little") + bytes(40))
    source = RecordSource(str(tmp_path / "a.rec"))
    assert everything(source) == [(b"image", "0")]
    assert source.account.passed_over["too short for its header"].count == 4 and source.account.seen == 5


def test_more_examples_than_are_kept(tmp_path):
    source = RecordSource(write_plain(tmp_path / "a.rec", [1.0] * 9, [b"image"] + [b""] * 8))
    assert source.account.passed_over["no image in the record"].count == 8
    assert json.loads(json.dumps(source.account.as_dict()))["seen"] == 9


def test_images_that_record_0_announces_but_that_are_not_there(tmp_path):
    with RecordWriter(str(tmp_path / "a.rec")) as writer:
        writer.write(0, pack_record(IRHeader(2, np.array([11, 13]), 0, 0), b""))
        for key in range(1, 8):
            writer.write(key, pack_record(IRHeader(0, 0.0, key, 0), b"image"))
    account = RecordSource(str(tmp_path / "a.rec")).account
    assert (account.seen, account.used) == (10, 7)
    assert account.passed_over["announced by record 0, but not there"].count == 3


def test_images_in_the_place_of_headers_and_sets_one_after_the_other_are_refused(tmp_path):
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES)
    with open(path, "r+b") as file:  # the header of the first identity loses its flag
        file.seek(offsets_of(path)[9] + 8)
        file.write(bytes(4))
    with pytest.raises(ValueError, match="record 9 holds an image, but record 0 announces headers of identities from 9 to 12"):
        RecordSource(path)
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES)
    Path(path).write_bytes(Path(path).read_bytes() * 2)
    with pytest.raises(ValueError, match=r"covers \d+ of \d+ bytes"):
        RecordSource(path)
    idx(path).unlink()
    with pytest.raises(ValueError, match="record 13 begins another set"):
        RecordSource(path)


def test_the_first_of_several_labels_counts(tmp_path):
    path = write_plain(tmp_path / "a.rec", [np.array([7, 1]), np.array([3, 0, 5]), 7.0], [b"image"] * 3)
    source = RecordSource(path)
    assert source.identities == ["3", "7"] and source.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("label", [float("nan"), float("inf"), -1.0, 0.5, 2.0**24, 1e30])
def test_labels_that_are_no_identities(tmp_path, label):
    with pytest.raises(ValueError, match=r"a\.rec: record 1 has the label .*, but an identity is a whole number"):
        RecordSource(write_plain(tmp_path / "a.rec", [0.0, label], [b"image"] * 2))


def test_record_0_of_a_set_whose_numbers_float32_rounds(tmp_path):
    """Its labels say 2**24 and 2**24 + 4 in place of 2**24 + 1 and 2**24 + 3."""
    images = 1 << 24
    keys = [0, images - 1, images, images + 1, images + 2]
    with RecordWriter(str(tmp_path / "a.rec")) as writer:
        for key in keys:
            zero = key == 0 or key > images
            label = np.array([images + 1, images + 3] if key == 0 else [1, images]) if zero else 5.0
            writer.write(key, pack_record(IRHeader(0, label, key, 0), b"" if zero else b"image"))
    source = RecordSource(str(tmp_path / "a.rec"))
    assert [source.name(index) for index in range(2)] == [f"a.rec:record {images - 1}", f"a.rec:record {images}"]
    assert source.account.passed_over.keys() == {"announced by record 0, but not there"}


@pytest.fixture
def cached(monkeypatch):
    monkeypatch.setattr(set_cache, "SMALLEST", 1)


def old(path: str) -> str:
    for file in (path, index_path(path), identities_path(path)):
        if os.path.exists(file):
            os.utime(file, ns=(1, 1_700_000_000_123_456_789))
    return path


@pytest.mark.parametrize("named", [True, False])
def test_a_cached_set_is_the_same(tmp_path, cached, named):
    images = [b"" if n == 2 else image for n, image in enumerate(IMAGES)]
    path = old(write_set(tmp_path / "a.rec", LABELS, images, NAMES if named else None, zero_last=True))
    first, second = RecordSource(path), RecordSource(path)
    assert os.path.exists(f"{path}.cache")
    assert everything(first) == everything(second) and len(second) == 7
    assert first.account == second.account and second.account.seen == 8
    assert [first.name(n) for n in range(7)] == [second.name(n) for n in range(7)]


def test_a_relabelled_set_is_noticed_in_spite_of_the_cache(tmp_path, cached, monkeypatch):
    monkeypatch.setattr(set_cache, "_HEAD", 16)  # as if the record stood further on
    path = old(write_set(tmp_path / "a.rec", LABELS, IMAGES, NAMES))
    RecordSource(path)
    relabel(path, 3, 3.0)
    with pytest.raises(ValueError, match="does not match"):
        RecordSource(path)
    old(path)  # even where the time of the file was set back
    with pytest.raises(ValueError, match="does not match"):
        RecordSource(path)
    relabel(path, 3, 1.0)
    source = RecordSource(old(path))
    relabel(path, 3, 3.0)
    old(path)
    with pytest.raises(ChangedError):  # reading tells
        source.read_many(np.arange(8))


def test_a_rebuilt_index_is_cached_too(tmp_path, cached):
    path = old(write_set(tmp_path / "a.rec", LABELS, IMAGES))
    idx(path).unlink()
    RecordSource(path)
    old(path)
    RecordSource(path)
    assert os.path.exists(f"{path}.cache")


def test_names_that_were_lost_are_missed(tmp_path, caplog):
    path = write_set(tmp_path / "a.rec", [0, 0, 1], [b"a", b"b", b"c"], ["anna", "ben"])
    assert RecordSource(path).identities == ["anna", "ben"] and not caplog.records
    os.unlink(identities_path(path))
    assert RecordSource(path).identities == ["0", "1"]
    assert "was packed with names of identities" in caplog.text
