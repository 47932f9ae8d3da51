"""A background iterator runs ahead, passes exceptions on, and stops its thread."""

import gc
import threading
import time

import pytest

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


def iter_of(items):
    yield from items
