"""Whatever happens to a folder of checkpoints, in whatever order: the newest sound one is found, and none that is needed is deleted."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pipeline import checkpoint
from pipeline.checkpoint.stores import STEP
from tests.pipeline.checkpoint.breaking import KilledError, breaking, broken, full
from tests.pipeline.checkpoint.states import state
from tests.pipeline.checkpoint.test_damage import DAMAGES, flipped, rewrite
from tests.pipeline.checkpoint.threads import on_threads

# Of what is there, by its remainder: two threads save, so what a fault leaves may differ when a course is played again. What is drawn may
# not.
WHICH = st.integers(0, 10**6)


def contents(folder):
    """Of every file, by name; None for what is no file."""
    paths = {name: Path(folder, name) for name in os.listdir(folder)}
    return {name: path.read_bytes() if path.is_file() and not path.is_symlink() else None for name, path in paths.items()}


class Course(RuleBasedStateMachine):
    """A run that saves, is broken off, begins again; and a hand that damages files between its steps."""

    @initialize()
    def begin(self):
        self.folder = tempfile.mkdtemp(prefix="protoshard-course-")
        self.step = 0  # of the run
        self.written = {}  # the files of every checkpoint that was ever complete, by step and course
        self.course = 0  # a run that goes back gives other contents to the same step
        self.must_last = []  # (step, course) of what nothing but a newer checkpoint may remove

    def teardown(self):
        shutil.rmtree(self.folder)

    def is_as_written(self, name):
        """The key in `written` of a folder that is sound."""
        path = f"{self.folder}/{name}"
        if not os.path.isdir(path):
            return None
        now = contents(path)
        return next((key for key, files in self.written.items() if now == files), None)

    def sound(self):
        """By name in the folder, what is sound there and would be found: (step, course)."""
        names = filter(STEP.fullmatch, os.listdir(self.folder))
        found = {name: self.is_as_written(name) for name in names}
        return {name: key for name, key in found.items() if key and key[0] == int(name.removeprefix("step-"))}

    def save(self, keep, keep_every, ranks):
        config = checkpoint.CheckpointConfig(asynchronous=False, keep=keep, keep_every=keep_every)

        def write(agreement):
            saver = checkpoint.Saver(self.folder, config, agreement)
            parts = state(self.step + 1000 * self.course, of=(agreement.rank, agreement.ranks))
            saver.start(self.step, parts, {"consumed": self.step, "attempt": self.course}, ["a", "b"])
            return saver.trouble

        return on_threads(ranks, write)[0]

    def note(self, name):
        self.written[self.step, self.course] = contents(f"{self.folder}/{name}")

    @rule(keep=st.integers(1, 3), keep_every=st.sampled_from([0, 0, 2]), ranks=st.integers(1, 2))
    def saves(self, keep, keep_every, ranks):
        self.step += 1
        name = f"step-{self.step:08d}"
        before = set(os.listdir(self.folder))
        stands_in_the_way = os.path.lexists(f"{self.folder}/{name}")
        sound = self.sound()
        trouble = self.save(keep, keep_every, ranks)
        assert (trouble is not None) == stands_in_the_way
        if trouble is None:
            self.note(name)
            gone = before - set(os.listdir(self.folder))
            assert all(STEP.fullmatch(left) or left.endswith((".partial", ".removed")) for left in gone)
            after = self.sound()
            assert after[name] == (self.step, self.course)
            # What looked as it should but was damaged may have counted among those kept, so that fewer sound ones stay, but never
            # more than `keep` newer ones were there when one went.
            assert len(after) <= len(sound) + 1 and set(after) <= {*sound, name}
            for left in set(sound) - set(after):
                newer = [other for other in os.listdir(self.folder) if STEP.fullmatch(other) and other > left]
                assert len(newer) >= keep and not (keep_every and sound[left][0] % keep_every == 0)

    @rule(keep=st.integers(1, 3), number=st.integers(0, 60), error=st.sampled_from([KilledError, full, broken]), lasts=st.booleans())
    def saves_in_trouble(self, keep, number, error, lasts):
        self.step += 1
        name = f"step-{self.step:08d}"
        before, is_taken = self.sound(), os.path.lexists(f"{self.folder}/{name}")
        with breaking(number, error, lasts=lasts), suppress(KilledError):
            self.save(keep, 0, 2)
        if not is_taken and os.path.isdir(f"{self.folder}/{name}"):
            self.note(name)
        after = self.sound()
        assert not before or max(after) >= max(before)
        if name not in after:
            assert before == after

    @rule(which=WHICH, part=WHICH, bit=WHICH, step=st.integers(0, 30), kind=st.sampled_from([*DAMAGES, "a bit", "all of it", "its name"]))
    def damage(self, which, part, bit, step, kind):
        names = sorted(name for name in os.listdir(self.folder) if os.path.isdir(f"{self.folder}/{name}") and STEP.fullmatch(name))
        if not names or kind == "of another checkpoint":
            return
        path = f"{self.folder}/{names[which % len(names)]}"
        files = sorted(file for file in os.listdir(path) if os.path.isfile(f"{path}/{file}") and os.path.getsize(f"{path}/{file}"))
        if kind == "all of it":
            shutil.rmtree(path)
            os.mkdir(path)
        elif kind == "its name":
            with suppress(OSError):
                os.rename(path, f"{self.folder}/step-{step:08d}")
        elif files:
            file = f"{path}/{files[part % len(files)]}"
            if kind == "a bit":
                content = Path(file).read_bytes()
                rewrite(file, flipped(content, bit % (8 * len(content))))
            elif not os.path.islink(file):
                DAMAGES[kind](file)

    @rule(
        name=st.sampled_from(
            ["step-00000004", "step-00000009.partial", "step-00000002.removed", "notes", "step-x", "step-00000003.partial"]
        )
    )
    def litter(self, name):
        with suppress(OSError):
            if len(name) % 2:
                os.symlink("nowhere", f"{self.folder}/{name}")
            else:
                os.mkdir(f"{self.folder}/{name}")

    @rule()
    def restarts(self):
        """The same command again."""
        everything = {name: self.is_as_written(name) for name in os.listdir(self.folder)}
        try:
            found = checkpoint.newest(self.folder)
        except ValueError as error:
            assert "can be used" in str(error) and not self.sound()
            for name in os.listdir(self.folder):  # --resume none
                os.rename(f"{self.folder}/{name}", f"{self.folder}/kept-{self.course}-{name}")
            found = None
        if found:
            self.step = found.info["step"]
            checkpoint.supersede(self.folder, self.step, saved=found)
            assert max(map(int, (name[5:] for name in checkpoint.complete(self.folder)))) == self.step
        else:
            self.step = 0
        self.course += 1
        still = [self.is_as_written(name) for name in os.listdir(self.folder)]
        assert all(key in still for key in everything.values() if key)

    @rule(which=WHICH)
    def goes_back(self, which):
        """--resume PATH: an earlier one, or one that was put aside."""
        names = sorted(name for name in os.listdir(self.folder) if self.is_as_written(name) and ".p" not in name and ".r" not in name)
        if not names:
            return
        name = names[which % len(names)]
        if STEP.fullmatch(name) and name not in self.sound():
            with pytest.raises(ValueError, match="cannot be used: it is the checkpoint of step"):
                checkpoint.locate(f"{self.folder}/{name}")
            return
        everything = sorted(filter(None, map(self.is_as_written, os.listdir(self.folder))))
        found = checkpoint.locate(f"{self.folder}/{name}")
        self.step = found.info["step"]
        checkpoint.supersede(self.folder, self.step, saved=found)
        self.course += 1
        assert everything == sorted(filter(None, map(self.is_as_written, os.listdir(self.folder))))
        assert all(step <= self.step for step, _ in self.sound().values())

    @invariant()
    def the_newest_sound_one_is_found(self):
        if not hasattr(self, "folder"):
            return
        sound = self.sound()
        if sound:
            found = checkpoint.newest(self.folder)
            assert found.name == max(sound) and (found.info["step"], found.info["attempt"]) == sound[found.name]
            assert found.whole("backbone.weight")[0] == found.info["step"] + 1000 * found.info["attempt"]


def play(examples, steps):
    run_state_machine_as_test(
        Course,
        settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)),
    )


def test_any_course_of_a_folder():
    play(25, 15)


@pytest.mark.long
def test_many_courses_of_a_folder():
    play(150, 30)
