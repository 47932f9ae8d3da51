"""Runs that come to one folder at the same time, in every order of their steps: exactly one gets it, also where nothing has locks."""

from __future__ import annotations

import itertools
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import lease_hold
from pipeline.checkpoint import OwnerError
from pipeline.lease_hold import Hold

END = 40.0  # beats after which a course is over


class Course:
    """Runs functions in threads, of which one moves at a time. `choices` says which one does its next step; time passes when all pause, or,
    where runs may stall, whenever `choices` wants it."""

    def __init__(self, choices, stalls=False):
        self.choices, self.stalls = itertools.chain(choices, itertools.repeat(0)), stalls
        self.now, self.is_over = 0.0, False
        self.wakes, self.turns = {}, {}
        self.back = threading.Semaphore(0)

    def step(self, seconds=0.0):
        """Called by a run before each of its steps."""
        me = threading.current_thread().name
        self.wakes[me] = self.now + seconds
        self.back.release()
        self.turns[me].acquire()

    def run(self, functions):
        def enter(function):
            self.turns[threading.current_thread().name].acquire()
            try:
                function()
            finally:
                del self.wakes[threading.current_thread().name]
                self.back.release()

        for number, function in enumerate(functions):
            self.turns[str(number)], self.wakes[str(number)] = threading.Semaphore(0), 0.0
            threading.Thread(target=enter, args=(function,), name=str(number), daemon=True).start()
        while self.wakes:
            ready = [name for name, wake in sorted(self.wakes.items()) if wake <= self.now]
            later = [wake for wake in self.wakes.values() if wake > self.now]
            choice = next(self.choices) % (len(ready) + (self.stalls and bool(later))) if ready else 0
            if choice == len(ready):
                self.now = min(later)
                continue
            self.is_over = self.now > END
            self.turns[ready[choice]].release()
            assert self.back.acquire(timeout=10)


class Shelf:
    """Files in memory that every run of a course sees. kernel, locks: none."""

    where, kernel, is_locked = "shelf", None, False

    def __init__(self, course, content, atomic):
        self.course, self.content, self.atomic, self.mine = course, content, atomic, None

    def numbers(self):
        self.course.step()
        return list(self.content)

    def read(self, number):
        self.course.step()
        return self.content.get(number)

    def claim(self, number):
        self.course.step()
        if number in self.content:
            return False
        if not self.atomic:
            self.course.step()
        self.content[number] = b"{}"
        return True

    def write(self, number, content):
        self.course.step()
        self.content[number] = content

    def delete(self, number):
        self.course.step()
        self.content.pop(number, None)

    def try_lock(self, number):
        return None

    def unlock(self):
        pass

    def is_still_there(self):
        return True

    def leave(self, content):
        pass


def compete(monkeypatch, choices, before, atomic, contenders=2, stalls=False):
    """What each run says in the end: "holds", "refused" or "lost". before: what is found: nothing, or a lease that is "stale", "released"
    or "alive", that of a run of its own, the last one."""
    course, content, told = Course(choices, stalls), {}, {}
    monkeypatch.setattr(lease_hold, "_pause", course.step)

    def hold(name):
        return Hold(Shelf(course, content, atomic), name, 1.0)

    def live(name, mine):
        try:
            while not course.is_over:
                course.step(1.0)
                mine.renew()
            mine.check()
            told[name] = "holds"
        except OwnerError:
            told[name] = "lost"

    def contend(name):
        mine = hold(name)
        try:
            mine.take(set())
        except ValueError:
            told[name] = "refused"
            return
        live(name, mine)

    runs = [lambda name=name: contend(name) for name in "AB"[:contenders]]
    if before:
        earlier = hold("earlier")
        earlier._number = 3
        content[3] = earlier._note(released=before == "released")
        if before == "alive":
            runs.append(lambda: live("earlier", earlier))
    course.run(runs)
    return told


orders = st.lists(st.integers(0, 5), max_size=60)


@pytest.mark.parametrize("atomic", [True, False])
@pytest.mark.parametrize("before", ["", "stale", "released"])
@settings(max_examples=60, deadline=None)
@given(orders)
def test_exactly_one_of_two_gets_it(atomic, before, choices):
    with pytest.MonkeyPatch.context() as patch:
        told = compete(patch, choices, before, atomic)
    assert sorted(told.values()) == ["holds", "refused"], told


@pytest.mark.parametrize("before", ["", "stale"])
def test_every_order_of_the_first_steps(before, monkeypatch):
    for atomic in (True, False):
        for choices in itertools.product((0, 1), repeat=6):
            told = compete(monkeypatch, choices, before, atomic)
            assert sorted(told.values()) == ["holds", "refused"], (choices, told)


@settings(max_examples=60, deadline=None)
@given(orders)
def test_nobody_takes_the_place_of_one_that_lives(choices):
    with pytest.MonkeyPatch.context() as patch:
        told = compete(patch, choices, "alive", atomic=True)
    assert told == {"A": "refused", "B": "refused", "earlier": "holds"}


@pytest.mark.parametrize("before", ["", "stale", "alive"])
@settings(max_examples=120, deadline=None)
@given(orders)
def test_where_runs_are_suspended_for_any_time_one_is_left_in_the_end(before, choices):
    """A run that did not move for long may lose its folder; that it learns before it commits."""
    with pytest.MonkeyPatch.context() as patch:
        told = compete(patch, choices, before, atomic=True, stalls=True)
    assert list(told.values()).count("holds") == 1, told
