"""A .rec and its .idx: whatever makes them disagree ends in a sentence, and a missing .idx is rebuilt."""

import os

import pytest
from record_sets import IMAGES, LABELS, NAMES, everything, expected, idx, write_plain, write_set

from dali_loaders import set_cache
from dali_loaders.recordio import index as record_index
from dali_loaders.recordio.records import IRHeader, RecordWriter, pack_record
from dali_loaders.sources import RecordSource


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


def test_a_set_that_cannot_be_written_is_walked_once(tmp_path, monkeypatch):
    """Its .idx cannot be rebuilt on the disk, but what it is good for is in the cache."""
    monkeypatch.setattr(set_cache, "SMALLEST", 1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES)
    idx(path).unlink()
    walks, walk = [], record_index._walk
    monkeypatch.setattr(record_index, "_walk", lambda file: walks.append(file) or walk(file))
    monkeypatch.setattr(record_index, "_write", lambda *_: None)
    for _ in range(3):
        assert everything(RecordSource(path)) == expected("0123")
    assert len(walks) == 1 and not idx(path).exists()
