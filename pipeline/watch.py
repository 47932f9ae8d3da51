"""One rank's heartbeat and its watch over the others: a line when it waits long, and after run.timeout, or when a collective failed, the
end with a sentence that names the rank that was lost, and exit code 76."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import NoReturn

import torch.distributed as dist

from dali_loaders import progress
from pipeline import heartbeat
from pipeline.distributed import STORE, Place, describe
from pipeline.endings import LOST, REFUSED, flush_output
from pipeline.heartbeat import DATA, Beat, Peers, of_error, of_thread, place_in_code, shown
from pipeline.stopping import STOPPED, Stop, Stopped

SPEAK_SECONDS = 60.0  # in one place, before a line says so
LOOK_SECONDS = 3.0  # in one place, before a rank reads the files of the others
LEAVE_SECONDS = 5.0  # in one place, before a rank ends because another one did
ENDS = {"refused": "ended", "error": "ended", "hung": "stood still", "lost": "gave up"}  # what is said of a rank that has ended so
_FAILED = re.compile(r"gloo/|NCCL|Connection (closed|reset) by peer|Broken pipe")
_TIMED_OUT = re.compile("[Tt]imed out|[Tt]imeout")


@dataclass
class Cause:
    """Ranks for which the others waited in vain, a sentence about the first of them, and the exit code of those that lost them."""

    ranks: list[int]
    sentence: str
    code: int = LOST


class Watch:
    """What the main thread is at is told with `at`; inside `with`, a thread writes it down and looks at the other ranks."""

    def __init__(self, folder: str, place: Place, minutes: float, stop: Stop, run: str = "") -> None:
        """run: a text that all ranks of this start of the run have, and no other start"""
        self.stop = stop
        self.begin(None, None)
        self._folder, self._place, self._timeout = folder, place, 60 * minutes
        self._main, self._host = threading.get_ident(), socket.gethostname()
        self._at = ("starting", -1)  # replaced, so that its identity tells whether the rank goes on
        self._seen = self._at
        self._stood, self._longest, self._last = 0.0, 0.0, time.monotonic()
        self._speaks_after = SPEAK_SECONDS
        self._run, self._count, self._warned = run, 0, False
        self._over, self._ending, self._writing = threading.Event(), threading.Lock(), threading.Lock()
        self._pause = min(heartbeat.interval(place.world_size), self._timeout / 4)

    def at(self, doing: str, step: int | None = None) -> None:
        """Called whenever the main thread goes on to something else. Costs an assignment."""
        self._at = (doing, self._at[1] if step is None else step)

    def begin(self, say: Callable[[str], None] | None, reading: Callable[[], str | None] | None) -> None:
        """say: where lines go; to standard error if not given. reading: what the loader of training data waits for."""
        self._say, self._reading = say or _say, reading

    def __enter__(self) -> Watch:
        self._peers = Peers(self._folder, self._run, self._place.rank, self._place.world_size)
        if self._place.is_first:
            heartbeat.remove_old(self._folder, self._place.world_size)
        self._write(self._beat())
        self._thread = threading.Thread(target=self._watch, name="protoshard-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        if error is None:  # otherwise others may want to know how this rank ended
            with suppress(OSError):
                os.unlink(heartbeat.path_of(self._folder, self._place.rank))
                os.rmdir(os.path.join(self._folder, heartbeat.FOLDER))  # succeeds for the last one

    def note(self, error: BaseException) -> None:
        """Leaves word of what ends this rank. Does not return if that is the loss of another one."""
        if isinstance(error, Stopped):
            self._leave("stopped", str(error))
        if isinstance(error, Exception) and self._place.world_size > 1 and failed_collective(error):
            self._lose(stood_too_long=bool(_TIMED_OUT.search(str(error))), error=error)
        sentence = describe(error) if isinstance(error, ValueError) else None
        if sentence is not None:
            self._leave("refused", sentence)
        elif not isinstance(error, Stopped):
            lines = str(error).strip().splitlines()
            self._leave("error", type(error).__name__ + (f": {lines[0]}" if lines else ""))

    def _watch(self) -> None:
        while not self._over.wait(self._pause):
            self._look()

    def _look(self) -> None:
        now = time.monotonic()
        if self._at is not self._seen:
            self._longest = max(self._longest, self._stood)
            self._seen, self._stood, self._speaks_after = self._at, 0.0, max(SPEAK_SECONDS, 2 * self._longest)
        else:  # in beats of its own: a job that was suspended as a whole does not hang
            self._stood += min(now - self._last, 2 * self._pause)
        self._last = now
        beat = self._beat()
        self._write(beat)
        if self._place.world_size > 1 and (self._stood > min(LOOK_SECONDS, self._timeout / 4) or self._seen[0] == "evaluation"):
            self._peers.look()
            self.stop.of_peer = self._peers.asked
            if self._stood > LEAVE_SECONDS and self._peers.ended("stopped", *ENDS):
                self._lose(stood_too_long=False)
            if self._stood > self._timeout:
                self._lose(stood_too_long=True)
        if self._stood > self._speaks_after:
            self._speaks_after *= 2
            self._speak(beat)

    def _beat(self, error: BaseException | None = None) -> Beat:
        """error: what ended the main thread, which is past the place then"""
        doing, step = self._at
        where, is_waiting = place_in_code(of_error(error) if error else of_thread(self._main))
        if where == DATA and self._reading is not None:
            with suppress(Exception):
                where = ": ".join(filter(None, [where, self._reading()]))
        self._count += 1
        words = f"{doing}, {where}" if where else doing
        asked = self.stop.asked()
        return Beat(self._run, self._place.rank, self._count, self._host, os.getpid(), step, words, is_waiting, asked)

    def _write(self, beat: Beat) -> None:
        with self._writing:
            if self._over.is_set() and not beat.end:
                return  # the last word stays
            try:
                heartbeat.write(self._folder, beat)
            except OSError as error:
                if not self._warned:
                    self._say(f"rank {beat.rank} cannot write what it is doing to {self._folder} ({error.strerror}): training goes on")
                self._warned = True

    def _leave(self, end: str, reason: str) -> None:
        self._over.set()
        if end in ("lost", "hung"):
            heartbeat.write_collectives(self._folder, self._place.rank)
        beat = self._beat()
        self._write(replace(beat, end=end, doing=reason))

    def _speak(self, mine: Beat) -> None:
        """One line for all that wait on this host."""
        after = f"{shown(self._stood)} {mine.when}"
        cause = self._certain() or (self._busy() if mine.is_waiting else None)
        if cause is None:
            self._say(f"{after} {mine.name} is still in {mine.doing}")
        elif self._is_speaker(cause):
            self._say(f"{after} rank {mine.rank} still waits in {mine.doing}: {cause.sentence}")

    def _is_speaker(self, cause: Cause) -> bool:
        """Whether this is the first of the ranks on this host that can speak."""
        peers = self._peers.beats.values()
        return not any(peer.host == self._host and peer.rank < self._place.rank and peer.rank not in cause.ranks for peer in peers)

    def _certain(self) -> Cause | None:
        """Ranks that have ended or are silent, and not because they lost another one."""
        return (
            self._of_ended("refused") or self._of_ended("error") or self._of_ended("stopped") or self._of_ended("hung") or self._of_silent()
        )

    def _of_ended(self, end: str) -> Cause | None:
        ended = self._peers.ended(end)
        if not ended:
            return None
        first = ended[0]
        sentence = first.doing if end == "stopped" else f"{first.name} {ENDS[end]} {first.when}: {first.doing}"
        return Cause([beat.rank for beat in ended], sentence, {"stopped": STOPPED, "refused": REFUSED}.get(end, LOST))

    def _of_silent(self) -> Cause | None:
        silent = self._peers.silent(3 * self._pause)
        if not silent:
            return None
        last = self._peers.beats.get(silent[0])
        if last is None:
            return Cause(silent, f"rank {silent[0]} has given no sign of life")
        fault = "has died" if last.rank in self._peers.dead else f"gives no sign of life for {shown(self._peers.silent_for(last.rank))}"
        return Cause(silent, f"{last.name} {fault}; last seen {last.when} in {last.doing}")

    def _busy(self) -> Cause | None:
        """Ranks that wait for no other one."""
        busy = [beat for beat in self._peers.beats.values() if not beat.is_waiting and not beat.end]
        return Cause([beat.rank for beat in busy], "{0.name} is {0.when} in {0.doing}".format(busy[0])) if busy else None

    def _lose(self, stood_too_long: bool, error: Exception | None = None) -> None:
        """Ends the process once it is clear which rank was lost. Returns where none was: a collective may fail for another reason."""
        self._ending.acquire()  # of two threads that come here one speaks, and the other waits for the end
        if self._over.is_set():
            self._ending.release()
            return
        mine = self._beat(error)
        self._gather_evidence(mine, has_failed=not stood_too_long)
        cause = self._certain()
        limit = f" for {shown(self._stood)} (run.timeout)" if stood_too_long else ""
        if cause is None and stood_too_long and not mine.is_waiting:
            self._leave("hung", mine.doing)
            give_up(self._say, f"{mine.name} stood still{limit} {mine.when} in {mine.doing}")
        cause = cause or (self._busy() if stood_too_long else None) or self._of_ended("lost")
        if cause is None and not stood_too_long:
            self._ending.release()
            return
        cause = cause or Cause([], "the ranks wait for each other")
        if cause.code == STOPPED and error is not None:
            self._leave("stopped", cause.sentence)
            self._ending.release()
            raise Stopped(cause.sentence)
        self._leave("lost", cause.sentence)
        waited = f"rank {mine.rank} waited{limit} in {mine.doing}"
        give_up(self._say, f"{cause.sentence}; {waited}" if self._is_speaker(cause) else "", cause.code)

    def _gather_evidence(self, mine: Beat, has_failed: bool) -> None:
        """Looks at the other ranks for some beats, while it beats itself, so that they do not take it for the lost one."""
        time.sleep(self._pause / 4)  # a rank that has just ended may still be about to say why
        deadline = time.monotonic() + (4 * self._pause if has_failed else self._pause)  # after a long stand it has looked all along
        while time.monotonic() < deadline:
            self._peers.look()
            self._count += 1
            self._write(replace(mine, count=self._count, is_waiting=mine.is_waiting or has_failed))
            if self._peers.ended("refused", "error", "stopped", "hung") or self._peers.dead:
                return
            time.sleep(self._pause / 4)


def give_up(say: Callable[[str], None], sentence: str, code: int = LOST) -> NoReturn:
    if code == LOST and sentence:
        say(f"protoshard: {sentence}: the same command continues from the newest checkpoint")
    elif sentence and STORE not in os.environ:  # whose parent process says what was refused
        say(f"protoshard: {sentence}")
    with suppress(OSError):
        flush_output()
    os._exit(code)  # the main thread may be in a collective that never ends


@contextmanager
def meeting(minutes: float) -> Iterator[None]:
    """Around what ranks do before they watch each other: ends the process with a sentence where they do not come together."""
    try:
        yield
    except Exception as error:
        if not failed_collective(error):
            raise
        reason = str(error).strip().splitlines()[0]
        give_up(_say, f"not all ranks of the job have come, within run.timeout = {minutes:g} minutes, to where it begins ({reason})")


def failed_collective(error: BaseException | None) -> bool:
    """Whether it may mean that another rank was lost."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _FAILED.search(str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False


def _say(message: str) -> None:
    if sys.stderr is not None:
        progress.say(message, sys.stderr)
