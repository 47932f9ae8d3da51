"""A background iterator runs ahead, passes exceptions on, and stops its thread."""

import gc
import multiprocessing
import threading
import time

import pytest
import torch

from dali_loaders import background, waiting
from dali_loaders.background import Background


def test_items_come_in_order_and_end():
    assert list(Background(iter_of(range(20)), 3)) == list(range(20))


def test_it_runs_ahead_while_the_consumer_works():
    def slow():
        for n in range(10):
            time.sleep(0.02)
            yield n

    items = Background(slow(), 2)
    next(items)
    waited = items.wait_seconds
    for _ in range(5):
        time.sleep(0.04)
        next(items)
    assert items.wait_seconds - waited < 0.02
    items.close()


def test_exceptions_reach_the_consumer():
    def failing():
        yield 1
        raise ValueError("the reason")

    items = Background(failing(), 2)
    assert next(items) == 1
    with pytest.raises(ValueError, match="the reason"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)


@pytest.mark.parametrize("end", [SystemExit(0), KeyboardInterrupt(), GeneratorExit()])
def test_whatever_else_ends_the_thread_is_an_error(end):
    """Raised as it is, SystemExit would end a training as if it were done."""

    def failing():
        yield 1
        raise end

    items = Background(failing(), 2)
    assert next(items) == 1
    with pytest.raises(RuntimeError, match=rf"loading data was ended by {type(end).__name__}"):
        next(items)


def test_errors_of_python_itself_reach_the_consumer():
    def failing():
        yield 1
        raise MemoryError

    with pytest.raises(MemoryError):
        list(Background(failing(), 2))


def test_a_thread_that_ends_without_a_word(monkeypatch):
    monkeypatch.setattr(background, "_produce", lambda *_: None)
    monkeypatch.setattr(background, "_LOOK", 0.05)
    with pytest.raises(RuntimeError, match="the thread that loads data has ended without a word"):
        next(Background(iter_of([1]), 2))


def test_a_long_wait_is_said(monkeypatch, caplog):
    monkeypatch.setattr(waiting, "FIRST", 0.2)
    monkeypatch.setattr(waiting, "_watched_in", 0)  # a watching thread with that time
    work = iter(["reading 1.jpg", "reading 2.jpg"])

    def slow():
        time.sleep(0.7)
        yield 1

    assert next(Background(slow(), 2, work=lambda: next(work))) == 1
    assert [record.message for record in caplog.records] == [f"waiting 0 s for data: reading {number}.jpg" for number in (1, 2)]


def test_work_that_hangs_is_left_behind(monkeypatch):
    monkeypatch.setattr(background, "_GRACE", 0.2)
    end = threading.Event()

    def hanging():
        end.wait(20)
        yield 1

    items = Background(hanging(), 2, work=lambda: "hanging")
    assert items.doing() == "hanging"
    begun = time.monotonic()
    items.close()
    assert time.monotonic() - begun < 5
    with pytest.raises(StopIteration):
        next(items)
    end.set()


def test_an_exception_at_the_end_reaches_the_consumer():
    class Failing:
        def __iter__(self):
            return self

        def __next__(self):
            raise StopIteration

        def close(self):
            raise ValueError("while closing")

    with pytest.raises(ValueError, match="while closing"):
        next(Background(Failing(), 2))


@pytest.mark.parametrize("device", ["cuda:3", "cpu", None])
def test_the_thread_sets_its_gpu_before_it_does_anything(monkeypatch, device):
    done = []

    def record(what):
        done.append((what, threading.current_thread().name))

    def items():
        record("first item")
        yield 1

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: record(str(device)))
    assert next(Background(items(), 1, device and torch.device(device))) == 1
    expected = ["cuda:3", "first item"] if device == "cuda:3" else ["first item"]
    assert done == [(what, "protoshard-data") for what in expected]


def test_a_gpu_that_cannot_be_set_ends_the_iteration(monkeypatch):
    def refuse(device):
        raise RuntimeError("invalid device ordinal")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        next(Background(iter_of([1]), 1, torch.device("cuda:9")))


@pytest.mark.parametrize("by", ["close", "drop"])
def test_the_thread_ends(by):
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    items = Background(endless(), 2)
    next(items)
    if by == "close":
        items.close()
        with pytest.raises(StopIteration):
            next(items)
    del items
    gc.collect()
    assert closed.wait(5)


def test_whoever_waits_is_told_of_the_end():
    stopped = threading.Event()

    def never():
        stopped.wait(20)
        yield from ()

    items, found = Background(never(), 2), []
    waiting = threading.Thread(target=lambda: found.extend(items), daemon=True)
    waiting.start()
    threading.Timer(0.1, stopped.set).start()
    items.close()
    waiting.join(5)
    assert not waiting.is_alive() and not found


def test_it_may_be_collected_by_a_thread_that_its_own_waits_for():
    """Python looks for cycles in whatever thread allocates something."""

    class Owner:
        pass

    dropped, collected = threading.Event(), threading.Event()

    def work():
        dropped.wait(5)
        gc.collect()
        collected.set()

    def items():
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        worker.join()
        yield 0

    owner = Owner()
    owner.itself, owner.items = owner, Background(items(), 2)
    gc.disable()
    try:
        del owner
        dropped.set()
        assert collected.wait(5)
    finally:
        gc.enable()


def _next_of(items, found):
    try:
        next(items)
    except RuntimeError as error:
        found.put(str(error))


def test_a_forked_process_is_told_that_nothing_will_come():
    fork = multiprocessing.get_context("fork")
    items, found = Background(iter_of(range(9)), 2), fork.Queue()
    child = fork.Process(target=_next_of, args=(items, found))
    child.start()
    assert "this process was forked" in found.get(timeout=20)
    child.join()
    assert list(items) == list(range(9))


def iter_of(items):
    yield from items
