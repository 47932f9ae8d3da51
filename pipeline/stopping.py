"""A run that is asked to stop: by a signal to any of its ranks, or by the file FOLDER/stop. It finishes the step, saves, and ends with exit
code 75; the same command continues. While there is nothing to save, at the start, it ends at once. The file FOLDER/regroup asks likewise,
where a launcher starts the ranks again, then on other hosts."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from pipeline import endings

STOPPED = 75  # exit code
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
BREAKING = (signal.SIGTERM, signal.SIGINT)  # that end a run without a save when they come a second time
AGAIN = 1.0  # seconds after which a signal is a second one: terminals and launchers both send the first
FILE, REGROUP = "stop", "regroup"  # in the run's folder
_RANKS, _BY_FILE = 1 << 32, 100  # more than there can be; in place of a signal's number
ATTEMPT = "PROTOSHARD_ATTEMPT"  # the variable in which a launcher that starts ranks again says "JOB NUMBER", and later a greater number
_TO_REGROUP = 1  # less than any request to stop


class Stopped(BaseException):
    """Ends a run that was asked to stop. Its text is the sentence for the user."""


class Regrouped(Stopped):
    """Ends the ranks of a run, which has saved, so that they start again."""


class Asked(Exception):  # noqa: N818, it is no error
    """Raised at the same place on all ranks, once they agree that the run was asked to stop."""

    def __init__(self, code: int) -> None:
        number, rank = divmod(code, _RANKS)
        self.kind = Stopped if number else Regrouped
        if not number:
            super().__init__(f"the file {REGROUP}")
            return
        super().__init__(f"the file {FILE}" if number == _BY_FILE else f"{signal.Signals(number).name} on rank {rank}")


class Repeats:
    """Tells a second request from the first one that came twice."""

    def __init__(self) -> None:
        self._first: dict[int, float] = {}

    def is_second(self, number: int) -> bool:
        first = self._first.setdefault(number, time.monotonic())
        return number in BREAKING and time.monotonic() - first > AGAIN


class Stop:
    """What this process has been asked."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.waits = False  # for the end of a step; until then a request ends the process at once
        self.of_peer = 0  # what another rank was asked, as its heartbeat tells
        self.raised: Stopped | None = None
        self._number = 0
        self._file: str | None = None
        self._regroup: str | None = None
        self._repeats = Repeats()

    def receive(self, number: int, frame: FrameType | None) -> None:
        """A signal handler."""
        if self._repeats.is_second(number):
            name = signal.Signals(number).name
            said = f"\nprotoshard: broken off by a second {name}; the same command continues from the newest checkpoint\n"
            with suppress(OSError):
                os.write(2, said.encode())
            os._exit(128 + number)
        if self._number:
            return
        self._number = number
        if not self.waits:
            self.raised = Stopped(unsaved(f"{signal.Signals(number).name} on rank {self.rank}"))
            raise self.raised

    def watch(self, folder: str, rank: int, keep: bool = False) -> None:
        """From here on rank 0 looks for FOLDER/stop. One that an earlier run left is removed, unless `keep`. FOLDER/regroup counts only
        where ranks are started again, and one from before this start asks for nothing any more.

        ValueError: it cannot be removed."""
        self.rank = rank
        if rank == 0:
            self._file = None if keep else os.path.join(folder, FILE)
            self._regroup = os.path.join(folder, REGROUP)
            self.obeyed()
            self._file = os.path.join(folder, FILE)
            self._regroup = self._regroup if ATTEMPT in os.environ else None

    def asked(self) -> int:
        """What any rank was asked, as far as known here, for all ranks to agree on the highest of; 0 for nothing. Once known it stays."""
        if not self._number and self._file and os.path.lexists(self._file):
            self._number = _BY_FILE
        if not self._number and self._regroup and os.path.lexists(self._regroup):
            return max(_TO_REGROUP, self.of_peer)
        return max(self._number * _RANKS + self.rank * bool(self._number), self.of_peer)

    def obeyed(self) -> None:
        for path in filter(None, (self._file, self._regroup)):
            try:
                with suppress(FileNotFoundError):
                    os.unlink(path)
            except OSError as error:
                raise ValueError(f"{path} asks the run to stop and cannot be removed ({error.strerror}): remove it") from None


def unsaved(request: str) -> str:
    return f"stopped by {request} with nothing to save: the same command continues"


_current: Stop | None = None  # signals are those of the whole process


@contextmanager
def heeded() -> Iterator[Stop]:
    """Inside, signals ask the run to stop, unless they are ignored (nohup), someone else handles them, or this is not the main thread,
    which alone gets them (Ray). An inner one is the outer one."""
    global _current
    if _current is not None:
        yield _current
        return
    stop = _current = Stop()
    ours = [number for number in SIGNALS if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    before = {number: signal.signal(number, stop.receive) for number in ours}
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ours)  # those that came while this process started
        yield stop
    except Exception as error:
        if stop.raised:  # a library that was being imported made another error of it
            raise stop.raised from error
        raise
    finally:
        _current = None
        for number, handler in before.items():
            if signal.getsignal(number) == stop.receive:
                signal.signal(number, handler)


def end(stopped: Stopped) -> int:
    """Says so, once for the whole job, and gives the exit code of this process, which no signal changes any more."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    if int(os.environ.get("RANK", 0)) == 0:
        endings.say(str(stopped))
    return STOPPED
