"""Whoever waits long says for what, in the log and to others of the process."""

import os
import threading
import time

from dali_loaders import waiting as module
from dali_loaders.waiting import waiting, waits


def test_a_short_wait_says_nothing(caplog):
    with waiting("a lock"):
        assert waits() == ["waiting 0 s for a lock"]
    assert waits() == [] and not caplog.records


def test_a_long_wait_is_said_again_when_its_time_has_doubled(monkeypatch, caplog):
    monkeypatch.setattr(module, "FIRST", 0.2)
    monkeypatch.setattr(module, "_watched_in", 0)  # a watching thread with that time
    places = iter(range(100))
    with waiting(lambda: f"image {next(places)}"):
        time.sleep(1.2)
    assert [record.message for record in caplog.records] == [
        f"waiting {second} s for image {place}" for place, second in enumerate([0, 0, 1])
    ]


def test_waits_of_all_threads_are_listed_the_longest_first():
    end = threading.Event()

    def wait(what):
        with waiting(what):
            end.wait(10)

    threads = [threading.Thread(target=wait, args=(what,)) for what in ("one", "two")]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    assert [wait.rpartition(" ")[2] for wait in waits()] == ["one", "two"]
    end.set()
    for thread in threads:
        thread.join()


def test_a_forked_process_watches_by_itself():
    with waiting("something"):
        pass
    child = os.fork()
    if not child:
        with waiting("something"):
            found = any(thread.name == "protoshard-waiting" and thread.is_alive() for thread in threading.enumerate())
        os._exit(0 if found else 1)
    assert os.waitpid(child, 0)[1] == 0
