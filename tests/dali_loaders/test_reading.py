"""Faults of the machine are tried again and then end the run in a sentence; faults of a file make that image unreadable."""

import errno
import os

import numpy as np
import pytest
from pictures import picture, write_folder

from dali_loaders import DataConfig, TrainLoader, open_source, reading
from dali_loaders.account import Account, ChangedError, ReadError
from dali_loaders.encoded import Unreadable, read_image, read_images
from dali_loaders.reading import StorageError


class Failing:
    """A source whose reads raise these errors first; `error_of` makes them as a source would."""

    path, identities, account = "set", ["anna"], Account()
    labels = np.zeros(8, np.int64)

    def __init__(self, *errors):
        self.errors, self.reads = list(errors), 0

    def __len__(self):
        return 8

    def read(self, index):
        self.reads += 1
        if self.errors:
            raise self.errors.pop(0)
        return picture(index)

    def name(self, index):
        return f"image {index}"


def wrapped(number):
    """As folders raise it: the system's error is the cause of theirs."""
    try:
        try:
            raise OSError(number, os.strerror(number), "set/anna/1.jpg")
        except OSError as error:
            raise ReadError.of(error) from error
    except ReadError as error:
        return error


def plain(number):
    return OSError(number, os.strerror(number))


@pytest.fixture
def waits(monkeypatch):
    found = []
    monkeypatch.setattr(reading.time, "sleep", found.append)
    return found


@pytest.mark.parametrize("form", [wrapped, plain])
@pytest.mark.parametrize("name", ["EIO", "ESTALE", "ENOMEM", "EMFILE", "ENFILE", "ENETDOWN", "ETIMEDOUT", "ECONNRESET", "ENOTCONN"])
def test_a_fault_of_the_machine_that_passes(waits, form, name):
    source = Failing(form(getattr(errno, name)), form(getattr(errno, name)))
    assert read_image(source, 3) == picture(3)
    assert waits == [0.5, 2.0]


@pytest.mark.parametrize("form", [wrapped, plain])
def test_a_fault_of_the_machine_that_stays(waits, form):
    source = Failing(*[form(errno.ESTALE)] * 4)
    with pytest.raises(StorageError, match=r"set cannot be read: Stale file handle .* 3 further tries; .* mend the storage"):
        read_image(source, 3)
    assert len(waits) == 3


@pytest.mark.parametrize("form", [wrapped, plain])
@pytest.mark.parametrize(("name", "reason"), [("EACCES", "permission denied"), ("ENOENT", "no such file or directory")])
def test_a_fault_of_the_file(waits, form, name, reason):
    assert read_image(Failing(form(getattr(errno, name))), 3) == Unreadable(reason)
    assert not waits


def test_a_set_that_changed_ends_the_run():
    with pytest.raises(ChangedError, match="changed"):
        read_image(Failing(ChangedError("set has changed since it was opened; start again.")), 3)


def test_reasons_of_sources_are_kept():
    assert read_image(Failing(ReadError("cut off")), 3) == Unreadable("cut off")
    assert read_image(Failing(ValueError("a record of 3 bytes is too short")), 3) == Unreadable("a record of 3 bytes is too short")


class Many(Failing):
    """Reads in one call, where image 5 cannot be read; nor by itself."""

    def read(self, index):
        if index == 5:
            raise ReadError("cut off")
        return super().read(index)

    def read_many(self, indices):
        self.reads += 1
        if self.errors:
            raise self.errors.pop(0)
        found = [np.frombuffer(picture(index), np.uint8) if index % 2 else picture(index) for index in indices.tolist()]
        special = {5: Unreadable("cut off"), 6: np.zeros(0, np.uint8)}
        return [special.get(index, data) for index, data in zip(indices.tolist(), found, strict=True)]


def test_sources_that_read_many_images_at_once(waits):
    source = Many()
    expected = [picture(4), Unreadable("cut off"), Unreadable("empty"), picture(7)]
    assert list(read_images(source, np.arange(4, 8))) == expected and source.reads == 1
    assert list(read_images(Failing(), np.arange(4, 8))) == [picture(index) for index in range(4, 8)]


def test_what_failed_in_one_call_is_read_image_by_image(waits):
    assert list(read_images(Many(plain(errno.EACCES), plain(errno.EACCES)), np.arange(2))) == [Unreadable("permission denied"), picture(1)]
    assert list(read_images(Many(plain(errno.EIO), plain(errno.EIO)), np.arange(2))) == [picture(0), picture(1)]
    assert len(waits) == 1
    with pytest.raises(StorageError):
        list(read_images(Many(*[plain(errno.EIO)] * 9), np.arange(2)))
    with pytest.raises(ChangedError):
        list(read_images(Many(ChangedError("changed")), np.arange(2)))


def test_a_run_ends_with_the_sentence(waits, tmp_path):
    pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")
    source = open_source(str(write_folder(tmp_path / "set", identities=4, images=4)))

    def stale(index):
        raise wrapped(errno.ESTALE)

    source.read = stale
    loader = TrainLoader(source, DataConfig(image_size=32, threads=2), seed=1, global_batch=8, skipped_path=str(tmp_path / "skipped.txt"))
    with pytest.raises(StorageError, match="Stale file handle"):
        next(loader)
    assert loader.skipped == [] and not (tmp_path / "skipped.txt").exists()
