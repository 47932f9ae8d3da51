"""What becomes of unreadable images, against a plain model, and when reading, headers and decoding happen; DALI is left out."""

import itertools
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_loaders import AugmentConfig, DataConfig
from dali_loaders.account import Account
from dali_loaders.background import Background
from dali_loaders.decode import UnreadableImagesError
from dali_loaders.feed import Feed
from dali_loaders.order import UniformOrder, build_order
from dali_loaders.skipped import Skipped

PNG = b"\x89PNG\r\n\x1a\n"


class Numbers:
    """Image n is a PNG's mark and the number n; some have bad headers, some are damaged behind them."""

    path, account = "set", Account()

    def __init__(self, count, bad=(), damaged=()):
        self.bad, self.damaged, self.reads = set(bad), set(damaged), []
        self.labels = np.arange(count) % 4
        self.identities = list("abcd")

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        self.reads.append(index)
        return PNG + index.to_bytes(4, "little")

    def name(self, index):
        return f"image {index}"


class NumberDecoder:
    """Gives the numbers as images, and notes what it is asked for."""

    device = torch.device("cpu")

    def __init__(self, source, batch_size):
        self.source, self.batch_size, self.events, self.running = source, batch_size, [], None

    def sizes(self, encoded):
        self.events.append("sizes")
        numbers = [None if not isinstance(data, bytes) else int.from_bytes(data[8:], "little") for data in encoded]
        why = {at: "bad header" for at, number in enumerate(numbers) if number is None or number in self.source.bad}
        return np.full((len(encoded), 2), 32), why

    def start(self, encoded, sizes_b2, arguments):
        assert self.running is None and len(encoded) == len(sizes_b2) and (sizes_b2 == 32).all()
        assert all(len(values) == len(encoded) for values in arguments.values())
        self.events.append("start")
        self.running = [int.from_bytes(data[8:], "little") for data in encoded]

    def finish(self):
        self.events.append("finish")
        numbers, self.running = self.running, None
        why = {at: "damaged" for at, number in enumerate(numbers) if number in self.source.damaged}
        if why:
            raise UnreadableImagesError(why)
        return torch.tensor(numbers)

    def to_device(self, labels):
        return labels


def feed(source, batch_size, threads=1):
    skipped = Skipped(source, None)
    config = DataConfig(threads=threads, augment=AugmentConfig())
    return Feed(source, config, NumberDecoder(source, batch_size), skipped), skipped


@settings(max_examples=30, deadline=None)
@given(data=st.data(), group=st.sampled_from([1, 2, 4]), batch=st.integers(5, 40), threads=st.integers(1, 3))
def test_replacements_are_those_of_a_plain_model(data, group, batch, threads):
    """Whatever is found in the header or later, in whichever batch: the next readable image stands there."""
    count = data.draw(st.integers(400, 500))
    broken = data.draw(st.lists(st.integers(0, count - 1), max_size=2, unique=True))
    cut = data.draw(st.integers(0, len(broken)))
    source = Numbers(count, broken[:cut], broken[cut:])
    order = build_order(source, group, 3)
    made, skipped = feed(source, batch * group, threads)
    batches = made.train_batches(order, 3, itertools.count(0, batch * group))
    for number, found in zip(range(800 // (batch * group)), batches, strict=False):
        wanted = order.indices(number * batch * group, (number + 1) * batch * group)
        expected = [next(i for i in order.replacements(int(index)) if i not in set(broken)) for index in wanted]
        assert found.images.tolist() == found.indices.tolist() == expected
        assert found.labels.tolist() == source.labels[expected].tolist()
    batches.close()
    assert {f"image {index}" for index in broken} >= set(skipped.names)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 30), batch=st.integers(1, 7))
def test_evaluation_leaves_out_the_unreadable(data, count, batch):
    broken = data.draw(st.sets(st.integers(0, count - 1)))
    bad = data.draw(st.sets(st.sampled_from(sorted(broken)))) if broken else set()
    made, skipped = feed(Numbers(count, bad, broken - bad), batch)
    found = [batch.indices.tolist() for batch in made.evaluation_batches(np.arange(count))]
    readable = [[index for index in range(s, min(s + batch, count)) if index not in broken] for s in range(0, count, batch)]
    assert found == [part for part in readable if part]
    assert len(skipped) == len(broken)


def test_evaluation_says_what_it_left_out(caplog):
    made, _ = feed(Numbers(30, bad=[3, 4], damaged=[9]), 8)
    list(made.evaluation_batches(np.arange(30)))
    assert "3 unreadable images of set are left out: 2 bad header, 1 damaged" in caplog.text


def test_headers_are_read_while_a_batch_is_decoded():
    made, _ = feed(Numbers(100), 4)
    batches = made.train_batches(UniformOrder(100, 1), 1, itertools.count(0, 4))
    for _ in range(3):
        next(batches)
    assert made.decoder.events == ["sizes", "start"] + ["sizes", "finish", "start"] * 3
    batches.close()


def test_one_unreadable_image_costs_one_more_read():
    source = Numbers(400, bad=[7])
    made, _ = feed(source, 100)
    batches = made.train_batches(UniformOrder(400, 1), 1, range(0, 1200, 100))
    assert len(list(batches)) == 12
    assert len(source.reads) == 1200 + 3 - 2  # the image itself is read once only


def test_one_unreadable_image_leaves_reads_together():
    class Together(Numbers):
        calls = 0

        def read_many(self, indices):
            self.calls += 1
            return [PNG + index.to_bytes(4, "little") for index in indices.tolist()]

    source = Together(400, bad=[7])
    made, skipped = feed(source, 100)
    assert len(list(made.train_batches(UniformOrder(400, 1), 1, range(0, 1200, 100)))) == 12
    assert len(skipped) == 1 and source.calls == 12 and set(source.reads) == {8}


def test_closing_does_not_wait_for_reads_that_have_not_begun():
    class Slow(Numbers):
        def read(self, index):
            begun.set()
            going_on.wait(5)
            return super().read(index)

    source, begun, going_on = Slow(100), threading.Event(), threading.Event()
    made, _ = feed(source, 10)
    batches = Background(made.train_batches(UniformOrder(100, 1), 1, itertools.count(0, 10)), 1, stop=made.stop)
    begun.wait(5)
    threading.Timer(0.2, going_on.set).start()
    batches.close()
    assert len(source.reads) <= 10


def test_a_set_without_a_readable_image_ends_soon():
    source = Numbers(100_000, bad=range(100_000))
    made, _ = feed(source, 128)
    with pytest.raises(ValueError, match=r"128 unreadable images among the first 128 of set are more than 1%: 128 bad header;"):
        next(made.train_batches(UniformOrder(100_000, 1), 1, itertools.count(0, 128)))
    assert len(source.reads) <= 3 * 128


def test_more_threads_read_a_batch_while_decoding_waits_for_storage():
    class Slow(Numbers):
        def read(self, index):
            readers.add(threading.get_ident())
            time.sleep(0.002)
            return super().read(index)

    readers = set()
    source = Slow(1000)
    made, _ = feed(source, 16, threads=4)
    batches = made.train_batches(UniformOrder(1000, 1), 1, itertools.count(0, 16))
    found = torch.cat([next(batches).images for _ in range(12)])
    batches.close()
    assert found.tolist() == UniformOrder(1000, 1).indices(0, 12 * 16).tolist()
    assert len(readers) == 4


def test_threads_end_with_the_batches():
    before = threading.active_count()
    made, _ = feed(Numbers(100), 4, threads=3)
    batches = made.train_batches(UniformOrder(100, 1), 1, itertools.count(0, 4))
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before
