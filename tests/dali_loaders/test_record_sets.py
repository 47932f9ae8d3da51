""".rec, .idx and identities file as people have them: every image under its own label, or accounted for, or a sentence."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from record_sets import offsets_of, relabel, write_plain, write_set

from dali_loaders import set_cache
from dali_loaders.account import ChangedError, ReadError, Unreadable
from dali_loaders.identities import identities_path, read_identities, write_identities
from dali_loaders.mxnet_records import import_recordio
from dali_loaders.records import MAGIC, IRHeader, RecordWriter, index_path, pack_record
from dali_loaders.sources import RecordSource
from dali_loaders.sources.recordio import find_record

MAGIC_BYTES = MAGIC.to_bytes(4, "little")
LABELS = [0, 0, 1, 1, 1, 2, 2, 3]
IMAGES = [b"an image of eight " + bytes([65 + n]) * n for n in range(7)] + [b"1234" + MAGIC_BYTES + b"in parts"]
NAMES = ["anna", "ben", "clara", "dora"]


def idx(path: str) -> Path:
    return Path(index_path(path))


def everything(source: RecordSource) -> list[tuple[bytes, str]]:
    """Images with the names of their identities, read one by one and in bulk."""
    images = [source.read(index) for index in range(len(source))]
    assert [bytes(image) for image in source.read_many(np.arange(len(source)))] == images
    return [(image, source.identities[label]) for image, label in zip(images, source.labels.tolist(), strict=True)]


def expected(names) -> list[tuple[bytes, str]]:
    return [(image, names[label]) for image, label in zip(IMAGES, LABELS, strict=True)]


# Identities files


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
    file.write_bytes(file.read_bytes().rstrip())
    assert RecordSource(path).identities == NAMES


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


# The .idx


@pytest.mark.parametrize("named", [True, False])
def test_an_index_that_is_cut_at_any_byte(tmp_path, named):
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES, NAMES if named else None)
    whole = idx(path).read_bytes()
    for cut in range(len(whole)):
        idx(path).write_bytes(whole[:cut])
        if cut == len(whole) - 1:  # only the last line's end is missing
            assert len(RecordSource(path)) == 8
            continue
        with pytest.raises(ValueError, match=r"a\.idx (does not match|is not an index) .*delete (it|the \.idx)"):
            RecordSource(path)


LINES = {
    "one missing": lambda lines: lines[:4] + lines[5:],
    "the first missing": lambda lines: lines[1:],
    "half missing": lambda lines: lines[::2],
    "one twice": lambda lines: lines[:4] + lines[3:],
    "all twice": lambda lines: lines + lines,
    "a key twice": lambda lines: [*lines[:4], "3" + lines[4][1:], *lines[5:]],
    "keys exchanged": lambda lines: [*lines[:3], "4" + lines[3][1:], "3" + lines[4][1:], *lines[5:]],
    "another key": lambda lines: [*lines[:3], "99" + lines[3][1:], *lines[4:]],
    "keys of another start": lambda lines: [f"{int(key) + (place > 5)}\t{at}" for place, (key, at) in enumerate(map(str.split, lines))],
    "one more": lambda lines: [*lines, "13\t4"],
    "one beyond": lambda lines: [*lines, "13\t99999"],
    "no lines": lambda lines: ["x" * 5000],
    "huge": lambda lines: [*lines, "13\t99999999999999999999999"],
    "a byte off": lambda lines: [f"{key}\t{int(at) + 1}" for key, at in map(str.split, lines)],
    "binary": lambda lines: ["\0\1\2\3" * 10],
    "decimal": lambda lines: [f"{line}.0" for line in lines],
}


@pytest.mark.parametrize("change", list(LINES))
def test_an_index_of_other_lines(tmp_path, change):
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES)
    idx(path).write_text("\n".join(LINES[change](idx(path).read_text().splitlines())) + "\n")
    with pytest.raises(ValueError, match=r"a\.idx (does not match|is not an index|has two records) .*delete (it|the \.idx)"):
        RecordSource(path)
    idx(path).unlink()
    assert everything(RecordSource(path)) == expected("0123")


def test_how_much_an_index_covers_is_said(tmp_path):
    path = write_plain(tmp_path / "a.rec", [0.0, 0.0, 1.0], [b"1234"] * 3)
    idx(path).write_text("0\t0\n2\t72\n")
    with pytest.raises(ValueError, match="it covers 72 of 108 bytes; delete the"):
        RecordSource(path)


@pytest.mark.parametrize(
    "change", [lambda text: text.replace("\n", "\r\n"), lambda text: text + "\n\n", lambda text: "\n".join(text.split()[0:0]) + text]
)
def test_an_index_of_other_line_ends(tmp_path, change):
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES)
    idx(path).write_bytes(change(idx(path).read_text()).encode())
    assert everything(RecordSource(path)) == expected("0123")


def test_lines_in_any_order(tmp_path):
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES)
    lines = idx(path).read_text().splitlines()
    idx(path).write_text("\n".join(lines[::-1]))
    assert everything(RecordSource(path)) == expected("0123")


def test_an_index_of_another_set_of_the_same_size(tmp_path):
    path, other = (
        write_plain(tmp_path / name, [0.0, 1.0], images)
        for name, images in (("a.rec", [b"1234", b"12345678"]), ("b.rec", [b"12345678", b"1234"]))
    )
    assert os.path.getsize(path) == os.path.getsize(other)
    idx(path).write_bytes(idx(other).read_bytes())
    with pytest.raises(ValueError, match=r"a\.idx does not match"):
        RecordSource(path)


def test_keys_that_need_not_be_the_records_own_numbers(tmp_path):
    """As in a shuffled copy of a set, and in one with some records left out, whose .idx counts anew."""
    with RecordWriter(str(tmp_path / "a.rec")) as writer:
        for key, number in enumerate([5, 2, 9]):
            writer.write(key, pack_record(IRHeader(0, float(number), number, 0), b"%d" % number))
    with RecordWriter(str(tmp_path / "b.rec")) as writer:
        for key, number in enumerate([1, 2, 5]):
            writer.write(key, pack_record(IRHeader(0, float(number), number, 0), b"%d" % number))
    assert [image for image, _ in everything(RecordSource(str(tmp_path / "a.rec")))] == [b"5", b"2", b"9"]
    assert [image for image, _ in everything(RecordSource(str(tmp_path / "b.rec")))] == [b"1", b"2", b"5"]


def test_a_rebuilt_index_has_the_records_own_numbers(tmp_path):
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES, zero_last=True)
    whole = idx(path).read_bytes()
    idx(path).unlink()
    source = RecordSource(path)
    assert everything(source) == expected("0123") and source.account.seen == 8
    assert idx(path).read_bytes() == whole


# Records without an image, and other labels


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


# Folders, readers, pickling, change


def test_the_record_file_of_a_folder(tmp_path, caplog):
    assert find_record(str(tmp_path)) is None
    path = write_set(tmp_path / "any.rec", LABELS, IMAGES)
    assert find_record(str(tmp_path)) == path
    write_set(tmp_path / "other.rec", LABELS, IMAGES)
    assert find_record(str(tmp_path)) is None
    path = write_set(tmp_path / "train.rec", LABELS, IMAGES)
    assert find_record(str(tmp_path)) == path
    (tmp_path / "property").write_text("4,112,112\n")
    RecordSource(path)
    assert not caplog.records
    (tmp_path / "property").write_text("5,112,112")
    RecordSource(path)
    (tmp_path / "property").write_text("about")
    RecordSource(path)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "announces 5 identities, but" in caplog.text and "property cannot be read" in caplog.text


def test_the_mxnet_reader_gives_the_same(tmp_path):
    try:
        import_recordio()
    except ValueError as error:
        pytest.skip(str(error))
    images = [b"" if n == 2 else image for n, image in enumerate(IMAGES)]
    path = write_set(tmp_path / "a.rec", LABELS, images, NAMES)
    native, mxnet = RecordSource(path), RecordSource(path, "mxnet")
    assert everything(mxnet) == everything(native)
    assert mxnet.account == native.account
    mxnet = RecordSource(path, "mxnet")  # which reads in large blocks, once
    relabel(path, 4, 3.0)
    for source in (native, mxnet):
        with pytest.raises(ChangedError):
            source.read(2)


def test_reading_in_bulk_in_any_order(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.bytes(int(size)) for size in rng.integers(1, 3000, 60)]
    images[7] = b"12345678" + MAGIC_BYTES + b"more"
    source = RecordSource(write_plain(tmp_path / "a.rec", np.arange(60) // 3 * 1.0, images))
    for indices in (np.arange(60), rng.integers(0, 60, 100), np.array([59]), np.arange(60)[::-1]):
        found = source.read_many(indices)
        assert [bytes(image) for image in found] == [images[index] for index in indices]
        assert all(image.dtype == np.uint8 for image in found)
    assert source.read_many(np.zeros(0, np.int64)) == []


def damage(path: str, key: int, at: int, value: bytes) -> None:
    """Keeps the time of the file, as damage of a disk does."""
    times = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(offsets_of(path)[key] + at)
        file.write(value)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(("at", "reason"), [(0, "no record starts"), (4, "(another length|cut off|no record)"), (8, "too short")])
def test_damage_while_a_set_is_open_is_one_unreadable_image(tmp_path, at, reason):
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES)
    source = RecordSource(path)
    damage(path, 3, at, b"\1\2\3\1")
    with pytest.raises(ReadError, match=reason):
        source.read(2)
    found = source.read_many(np.array([3, 2, 1]))
    assert isinstance(found[1], Unreadable)
    assert [bytes(found[0]), bytes(found[2])] == [IMAGES[3], IMAGES[1]]


@pytest.mark.parametrize("kept", [True, False])
def test_a_set_that_is_written_again_while_it_is_open_ends_the_run(tmp_path, kept):
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES)
    source = RecordSource(path)
    if kept:
        damage(path, 3, 12, np.float32(2).tobytes())  # another label is enough, whatever the time says
    else:
        with open(path, "wb") as file:
            file.write(bytes(100))
        os.utime(path, ns=(0, 0))
    for read in (lambda: source.read(2), lambda: source.read_many(np.arange(8))):
        with pytest.raises(
            ChangedError, match=r"a\.rec changed since this run opened it .*leave sets alone while they are read, and start again"
        ):
            read()


def test_a_set_that_shrinks_while_it_is_open_ends_the_run(tmp_path):
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES)
    source = RecordSource(path)
    os.truncate(path, offsets_of(path)[5] + 20)
    assert source.read(0) == IMAGES[0]
    with pytest.raises(ChangedError):
        source.read_many(np.arange(8))


def test_a_set_that_is_replaced_while_it_is_open_stays_as_it_was(tmp_path):
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES)
    source = RecordSource(path)
    write_set(tmp_path / "b.rec", LABELS, IMAGES[::-1])
    os.replace(tmp_path / "b.rec", path)
    assert everything(source) == expected("0123")


# The cache


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
    old(path)  # even where the time of the file was set back, reading tells
    with pytest.raises(ChangedError):
        RecordSource(path).read_many(np.arange(8))


def test_a_rebuilt_index_is_cached_too(tmp_path, cached):
    path = old(write_set(tmp_path / "a.rec", LABELS, IMAGES))
    idx(path).unlink()
    RecordSource(path)
    old(path)
    RecordSource(path)
    assert os.path.exists(f"{path}.cache")
