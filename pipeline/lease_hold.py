"""The lease on one folder or store: taking it, keeping it, and knowing that it was lost. Lease files are numbered: whoever takes over makes
the next number, which only one can do."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from typing import Any, NamedTuple

from dali_loaders.names import printable
from pipeline.checkpoint import OwnerError
from pipeline.lease_files import Files
from pipeline.stopping import ATTEMPT

PATIENCE = 3  # beats that a holder may miss
LOOKS = 4  # per beat, so that an observer who was suspended himself does not take one look for the last of many
SIZE = 512  # bytes of a lease: never more, so that it can be written in place on a full disk
ATTEMPTS = 10

log = logging.getLogger(__name__)
_pause = time.sleep


class Attempt(NamedTuple):
    """Which of a job's attempts this process belongs to; whoever starts the job again counts them."""

    job: str  # "" for none
    number: int

    def follows(self, note: dict[str, Any]) -> bool:
        """Whether a lease is that of an earlier attempt of this job, which its launcher has given up."""
        before = note.get("attempt")
        return bool(self.job) and note.get("job") == self.job and isinstance(before, int) and before < self.number


def attempt() -> Attempt:
    """Of this process."""
    job, _, number = os.environ.get(ATTEMPT, "").partition(" ")
    return Attempt(job, int(number)) if number.isdecimal() else Attempt("", 0)


class Hold:
    """The lease on one folder or store. Its holder is whoever made the file with the highest number."""

    def __init__(self, files: Files, token: str, beat: float) -> None:
        self._files, self._token, self._beat = files, token, beat
        self._number = self._count = 0
        self._since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._alone = threading.Lock()  # the heartbeat, and whoever commits

    def take(self, gone: set[str]) -> None:
        """ValueError if another run has it; OSError. gone: tokens of runs that were found to be gone, so that nobody waits twice for one"""
        try:
            for _ in range(ATTEMPTS):
                newest = self._newest()
                if newest and not self._is_left(newest, gone):
                    break
                if self._claim(newest + 1):
                    for number in self._files.numbers():
                        if number < self._number:
                            with suppress(OSError):
                                self._files.delete(number)
                    return
            raise ValueError(refusal(self._files.where, self.holder()))
        finally:
            self._files.unlock()

    def check(self) -> None:
        """OwnerError if another one has it by now; OSError where that cannot be told."""
        with self._alone:
            self._check()

    def renew(self) -> None:
        """One beat. Raises what `check` does."""
        with self._alone:
            if self._number:
                self._check()
                self._count += 1
                self._files.write(self._number, self._note())

    def leave(self) -> None:
        """Says that the lease is free. Never fails."""
        with self._alone, suppress(OSError):
            is_lost = False
            with suppress(OSError):
                is_lost = self._is_lost()
            self._files.leave(None if is_lost else self._note(released=True))
            self._number = 0

    def holder(self) -> dict[str, Any]:
        """What the newest lease says; nothing where it cannot be read."""
        try:
            return _parse(self._files.read(self._newest()))
        except OSError:
            return {}

    def is_at_its_name(self) -> bool:
        try:
            return self._files.is_still_there()
        except OSError:
            return False

    def _newest(self) -> int:
        return max(self._files.numbers(), default=0)

    def _is_left(self, number: int, gone: set[str]) -> bool:
        """Whether the holder of that lease is gone. Waits for 3 beats where nothing else tells."""
        seen = self._files.read(number)
        note = _parse(seen)
        token = str(note.get("token"))
        if seen is None or note.get("released") or token in gone:  # None: somebody has just taken over, and made the next number
            return True
        if attempt().follows(note):
            return True
        locked = self._files.try_lock(number)
        if locked is False:
            return False
        if locked and self._files.kernel is not None and note.get("kernel") == self._files.kernel:
            return True  # it had the lock, which its end has freed. Ours keeps others out until the next number is made
        self._files.unlock()
        wait = PATIENCE * self._beat
        log.warning("%s belongs to a run on %s; waiting %.0f s to see whether it lives", self._files.where, _host(note), wait)
        for _ in range(PATIENCE * LOOKS):
            _pause(self._beat / LOOKS)
            now = self._files.read(number)
            if now != seen:
                return now is None or bool(_parse(now).get("released"))
        gone.add(token)
        return True

    def _claim(self, number: int) -> bool:
        if not self._files.claim(number):
            return False
        self._number = number
        try:
            self._files.write(number, self._note())
        except OSError:
            self._number = 0
            with suppress(OSError):
                self._files.delete(number)
            self._files.leave(None)
            raise
        if not self._files.is_locked:  # then it is not sure either that only one could make it
            _pause(self._beat / LOOKS)
        if self._is_lost():
            self._number = 0
            self._files.leave(None)
            return False
        return True

    def _is_lost(self) -> bool:
        return self._newest() > self._number or _parse(self._files.read(self._number)).get("token", self._token) != self._token

    def _check(self) -> None:
        if not self._number:
            return
        if self._is_lost():
            raise OwnerError(
                f"{self._files.where} was taken over by {_who(self.holder())} while this run did not answer: it ends, and writes no more"
            )
        if self._files.read(self._number) is None:
            if not self._files.is_still_there():
                raise FileNotFoundError(0, f"{self._files.where} is another folder now: was it moved, or its disk unmounted?")
            if not self._claim(self._number):  # somebody has tidied up
                raise OwnerError(f"{self._files.where} was taken over by {_who(self.holder())}: this run ends, and writes no more")

    def _note(self, released: bool = False) -> bytes:
        note = {
            "token": self._token,
            "host": socket.gethostname().encode("ascii", "replace").decode()[:64],
            "pid": os.getpid(),
            "since": self._since,
            "kernel": self._files.kernel if self._files.is_locked else None,
            "beat": self._count,
            "released": released,
            "job": attempt().job[:64],
            "attempt": attempt().number,
        }
        return json.dumps(note).encode().ljust(SIZE - 1) + b"\n"


def _parse(content: bytes | None) -> dict[str, Any]:
    try:
        note = json.loads(content or b"")
    except (ValueError, RecursionError):  # half written, or not a lease
        return {}
    return note if isinstance(note, dict) else {}


def _host(note: dict[str, Any]) -> str:
    return printable(str(note.get("host", "a host that it does not name"))[:64])


def _who(note: dict[str, Any]) -> str:
    if "host" not in note:
        return "another run"
    return f"a run on {_host(note)} (process {printable(str(note.get('pid'))[:20])}, since {printable(str(note.get('since'))[:20])})"


def refusal(where: str, note: dict[str, Any]) -> str:
    by = f", {_who(note)}" if "host" in note and not note.get("released") else ""
    return f"another run is writing to {where}{by}: wait for its end, or choose another run.folder"
