"""Reading a .rec: one by one, in bulk, through mxnet; and files that are damaged or change meanwhile."""

import logging
import os
import pickle

import numpy as np
import pytest
from record_sets import IMAGES, LABELS, MAGIC_BYTES, NAMES, everything, expected, offsets_of, relabel, write_plain, write_set

from dali_loaders.account import ChangedError, ReadError, Unreadable
from dali_loaders.recordio.mxnet_reader import import_recordio
from dali_loaders.sources import RecordSource
from dali_loaders.sources.recordio import find_record


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


def test_a_set_that_changed_before_another_process_opened_it(tmp_path):
    path = write_set(tmp_path / "a.rec", LABELS, IMAGES)
    source = RecordSource(path)
    assert everything(pickle.loads(pickle.dumps(source))) == expected("0123")
    sent = pickle.dumps(source)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ChangedError):
        pickle.loads(sent)
