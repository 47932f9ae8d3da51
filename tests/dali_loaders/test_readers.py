"""Reads that hang are given up: one image is left out, and where nothing answers any more the storage is named."""

import itertools
import random
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_loaders import DataConfig
from dali_loaders import readers as module
from dali_loaders.account import ReadError, StorageError, Unreadable
from dali_loaders.readers import MOST_HANGING, Readers

LIMIT = 0.5
GIVEN_UP = Unreadable("no answer within 0.5 s")


class Storage:
    """Image n is "n"; reads of `hanging` wait until the end of the test."""

    def __init__(self, hanging=(), together=False):
        self.hanging, self.together, self.end = set(hanging), together, threading.Event()
        self.threads, self.made = set(), []

    def one(self, number):
        self.threads.add(threading.current_thread())
        if number in self.hanging:
            self.end.wait(60)
        return str(number)

    def read(self, numbers):
        images = map(self.one, map(int, numbers))
        return iter(list(images)) if self.together else images

    def readers(self, threads=2, timeout=LIMIT, read=None, **options):
        options.setdefault("together", self.together)
        self.made.append(Readers(read or self.read, "set", "image {}".format, threads, timeout, **options))
        return self.made[-1]


@pytest.fixture
def storage():
    made = []

    def make(*arguments, **options):
        made.append(Storage(*arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.end.set()
        for readers in one.made:
            readers.close()
        for thread in one.threads:
            thread.join(10)


def results(readers, numbers, size):
    parts = [readers.submit(numbers[start : start + size]) for start in range(0, len(numbers), size)]
    return [image for part in parts for image in readers.result(part)]


@pytest.mark.parametrize("together", [False, True])
def test_images_come_in_order_from_a_few_threads(storage, together):
    made = storage(together=together)
    assert results(made.readers(3), np.arange(100), 7) == list(map(str, range(100)))
    assert len(made.threads) <= 3


def test_threads_that_are_idle_are_used_again(storage):
    made = storage()
    readers = made.readers(8)
    for number in range(20):
        assert readers.result(readers.submit([number])) == [str(number)]
        time.sleep(0.001)
    assert len(made.threads) <= 3


@pytest.mark.parametrize("error", [ReadError("cut off"), MemoryError(), SystemExit(0), KeyboardInterrupt()])
def test_whatever_ends_a_read_is_raised_where_it_is_waited_for(storage, error):
    def read(numbers):
        yield "0"
        raise error

    readers = storage().readers(read=read)
    with pytest.raises(type(error)):
        readers.result(readers.submit([0, 1]))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("hanging", [0, 5, 11])
def test_one_image_that_hangs_is_left_out(storage, together, hanging, threads):
    made = storage([hanging], together)
    begun = time.monotonic()
    found = results(made.readers(threads), np.arange(12), 4)
    assert found == [GIVEN_UP if number == hanging else str(number) for number in range(12)]
    assert time.monotonic() - begun < 4 * LIMIT + 2


@settings(max_examples=12, deadline=None)
@given(
    hanging=st.sets(st.integers(0, 39), max_size=2),
    size=st.integers(1, 40),
    threads=st.integers(2, 4),
    together=st.booleans(),
)
def test_whichever_images_hang(hanging, size, threads, together):
    made = Storage(hanging, together)
    readers = made.readers(threads, 0.4)
    expected = [Unreadable("no answer within 0.4 s") if number in hanging else str(number) for number in range(40)]
    try:
        found = results(readers, np.arange(40), size)
        assert found == expected
    except StorageError as error:  # two, between which nothing was read: that may be the storage
        assert len(hanging) == 2 and all(f"image {number}" in str(error) for number in hanging)
    finally:
        made.end.set()
        readers.close()


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("together", [False, True])
def test_a_storage_that_answers_nothing_ends_it(storage, together, threads):
    made = storage(range(100), together)
    begun = time.monotonic()
    with pytest.raises(
        StorageError,
        match=r"^set cannot be read: no answer within 0\.5 s, neither for image \d+ nor for image \d+",
    ):
        results(made.readers(threads), np.arange(100), 10)
    assert time.monotonic() - begun < 3 * LIMIT + 4


def test_a_storage_that_stops_to_answer(storage):
    made = storage(range(50, 100))
    with pytest.raises(StorageError, match=r"neither for image \d+ nor for image \d+"):
        results(made.readers(3), np.arange(100), 10)


def test_many_images_that_hang_are_no_chance_though_others_are_read(storage):
    made = storage(range(0, 100, 2))
    begun = time.monotonic()
    with pytest.raises(StorageError, match=f"nor for {MOST_HANGING - 1} more; that is"):
        results(made.readers(1), np.arange(100), 10)
    assert time.monotonic() - begun < (MOST_HANGING + 1) * LIMIT + 4


def test_a_few_that_hung_for_long_do_not_count_with_the_next_one(storage):
    """One in a day is an image's fault, although the one before has never come back."""
    made = storage([3, 9, 15])
    assert results(made.readers(1), np.arange(20), 1).count(GIVEN_UP) == 3


def test_a_read_that_comes_back_late_counts_no_longer(storage):
    made = storage(range(0, 16, 2))
    readers = made.readers(1)
    for number in range(16):
        readers.result(readers.submit([number]))
        if number % 6 == 4:
            assert len(readers._hanging) == 3
            made.end.set()  # all that hang come back
            for _ in range(100):
                time.sleep(0.01 if readers._hanging else 0)
            made.end.clear()
            assert not readers._hanging


def test_a_slow_storage_is_waited_for(storage):
    """The limit is that of one image, not of a part."""

    def read(numbers):
        for number in numbers:
            time.sleep(LIMIT / 3)
            yield str(number)

    assert results(storage().readers(1, read=read), range(9), 9) == list(map(str, range(9)))


def test_without_a_limit_nothing_is_given_up(storage):
    made = storage([1])
    threading.Timer(1.0, made.end.set).start()
    assert results(made.readers(1, timeout=0), range(3), 3) == ["0", "1", "2"]


def test_a_process_that_was_stopped_gives_nothing_up(storage, monkeypatch):
    """After SIGSTOP and SIGCONT all clocks have run on, but no read has had the time."""
    clock, hours = time.monotonic, itertools.count(1)

    def read(numbers):
        for number in numbers:
            hour = next(hours)
            monkeypatch.setattr(module.time, "monotonic", lambda hour=hour: clock() + 3600 * hour)
            time.sleep(0.05)
            yield str(number)

    assert results(storage().readers(1, read=read), range(10), 5) == list(map(str, range(10)))


def test_who_stops_does_not_wait(storage):
    made, stop = storage(range(9)), threading.Event()
    readers = made.readers(1, timeout=60, stop=stop)
    threading.Timer(0.2, stop.set).start()
    begun = time.monotonic()
    with pytest.raises(module.CancelledError):
        readers.result(readers.submit([0]))
    assert time.monotonic() - begun < 5


def test_closing_waits_a_moment_and_drops_what_has_not_begun(storage, monkeypatch):
    monkeypatch.setattr(module, "_GRACE", 0.3)
    made = storage([0])
    readers = made.readers(1, timeout=60)
    parts = [readers.submit([number]) for number in range(9)]
    time.sleep(0.1)
    begun = time.monotonic()
    readers.close()
    assert 0.2 < time.monotonic() - begun < 5 and not any(part.done.is_set() for part in parts)


def test_a_thread_that_dies_without_a_word(storage, monkeypatch):
    monkeypatch.setattr(module.Readers, "_work", lambda self, first: setattr(self._queue.get(), "thread", threading.current_thread()))
    readers = storage().readers(1)
    with pytest.raises(RuntimeError, match="the thread that read set has ended without a word"):
        readers.result(readers.submit([0]))


@pytest.mark.parametrize(("together", "said"), [(False, "reading image 3 for "), (True, "reading image 0 and 5 others for ")])
def test_it_says_what_is_being_read(storage, together, said):
    made = storage([3], together)
    readers = made.readers(1, timeout=60)
    assert readers.doing() == ""
    part = readers.submit(range(6))
    time.sleep(0.1)
    assert readers.doing() == f"{said}0 s"
    made.end.set()
    readers.result(part)
    assert readers.doing() == ""


def test_reads_of_any_duration_come_in_order(storage):
    chance = random.Random(5)

    def read(numbers):
        for number in numbers:
            time.sleep(chance.choice([0, 0, 0.001, 0.01]))
            yield str(number)

    assert results(storage().readers(4, timeout=60, read=read), range(400), 9) == list(map(str, range(400)))


@pytest.mark.parametrize("timeout", [-1.0, float("nan")])
def test_a_limit_that_is_none(timeout):
    with pytest.raises(ValueError, match=r"data\.timeout is .*; expected at least 0"):
        DataConfig(timeout=timeout)
