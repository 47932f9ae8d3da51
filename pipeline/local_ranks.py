"""N processes of one job on this machine, with one command: how they start, what signals to the command do, and how it ends."""

from __future__ import annotations

import logging
import multiprocessing as mp
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from dali_loaders.progress import announce, show_warnings
from pipeline import endings
from pipeline.distributed import STORE, cores, describe
from pipeline.stopping import SIGNALS, STOPPED, Repeats, Stopped

log = logging.getLogger(__name__)
Signals = Callable[[], AbstractContextManager[Any]]
# Seconds for the other ranks to end by themselves after the first one has, by its exit code: to see that they stop too, or have lost it.
PATIENCE = {STOPPED: 60.0, endings.LOST: 5.0}


def run_local(ranks: int, function: Callable[..., Any], *arguments: Any, signals: Signals = endings.unwinding_on_signals) -> None:
    """Calls `function(*arguments)`, which joins the others, in `ranks` new processes on this machine (1: in this one) and waits for them.

    signals: what they do to a rank. Those to this process go on to all ranks, which may take their time; a second one ends them.
    Bad input in any of them is raised here as ValueError with its sentence, Stopped if they stopped on request, Lost if one died. Another
    failure, which its rank has told, ends this process.
    """
    if ranks < 1:
        raise ValueError(f"--ranks is {ranks}, but at least 1 process is needed")
    if ranks == 1:
        function(*arguments)
        return
    if ranks > cores():
        plural = "s" * (cores() > 1)
        log.warning("--ranks %d, but this command may use %d core%s: ranks take turns on them", ranks, cores(), plural)
    announce(f"starting {ranks} ranks")
    with tempfile.TemporaryDirectory(prefix="protoshard-") as folder:
        with _blocked():  # or what a closed terminal sends to all would end it; later on it would unblock signals
            resource_tracker.ensure_running()
        context = mp.get_context("spawn")
        words = context.SimpleQueue()
        settings = ranks, f"{folder}/store", words, signals, function, arguments
        processes: list[BaseProcess] = [context.Process(target=_rank, args=(rank, *settings)) for rank in range(ranks)]
        with _passed_on(processes) as passed:
            try:
                _start(processes)
                killed = _wait(processes, passed)
            finally:
                for process in processes:
                    if process.pid is not None:
                        process.kill()
                        process.join()
        _conclude(processes, killed, words, passed)


class _Passed:
    """The signals that this process has passed on to its ranks."""

    def __init__(self) -> None:
        self.first = self.second = 0


@contextmanager
def _passed_on(processes: list[BaseProcess]) -> Iterator[_Passed]:
    """Only signals that this process handles; what ends it by default ends the ranks after it."""
    passed, repeats = _Passed(), Repeats()

    def pass_on(number: int, _: FrameType | None) -> None:
        is_second = repeats.is_second(number)
        passed.first = passed.first or number
        if is_second:
            passed.second = number
        for process in processes:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL if is_second else number)

    before = {number: signal.getsignal(number) for number in SIGNALS if callable(signal.getsignal(number))}
    try:
        for number in before:
            signal.signal(number, pass_on)
    except ValueError:  # not the main thread, which alone gets signals
        before = {}
    try:
        yield passed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(processes: list[BaseProcess]) -> None:
    """Signals wait until a rank can handle them: a new process inherits what is blocked."""
    with _blocked():
        for process in processes:
            process.start()


@contextmanager
def _blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(processes: list[BaseProcess], passed: _Passed) -> list[BaseProcess]:
    """Until all have ended; those that had to be killed."""
    deadline: float | None = None
    while running := [process for process in processes if process.is_alive()]:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ended = connection.wait([process.sentinel for process in running], left)
        if not ended:
            for process in running:
                process.kill()
            return running
        for process in running:
            if process.sentinel in ended:
                process.join()  # a process that ends closes its sentinel before it has an exit code
        codes = [process.exitcode for process in processes if process.exitcode]
        if codes and deadline is None:
            deadline = time.monotonic() + PATIENCE.get(codes[0], 10.0)
            if STOPPED in codes and not passed.first:  # one rank alone was asked, at the start
                for process in processes:
                    if process.exitcode is None and process.pid is not None:
                        os.kill(process.pid, signal.SIGUSR1)
    return []


def _conclude(processes: list[BaseProcess], killed: list[BaseProcess], words: Any, passed: _Passed) -> None:
    """The first cause counts, and not that ranks lost the one that failed."""
    said: dict[str, str] = {}
    while not words.empty():
        kind, text = words.get()
        said.setdefault(kind, text)
    number = passed.second or passed.first
    interruption = KeyboardInterrupt() if number == signal.SIGINT else endings.Terminated(128 + number)
    if passed.second:
        raise interruption
    if "bad input" in said:
        raise ValueError(said["bad input"])
    codes = [process.exitcode or 0 for process in processes if process not in killed]
    if 1 in codes:
        sys.exit(1)
    for rank, process in enumerate(processes):
        if process not in killed and (process.exitcode or 0) < 0:
            name = signal.Signals(-(process.exitcode or 0)).name
            raise endings.Lost(f"rank {rank} was ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}")
    if "stopped" in said:
        raise Stopped(said["stopped"])
    if endings.LOST in codes:
        sys.exit(endings.LOST)
    if number and any(codes):
        raise interruption
    if any(codes) or killed:
        sys.exit(max([*codes, 1]))


def _rank(
    rank: int, ranks: int, store: str, words: Any, signals: Signals, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    # Ranks should end with the command itself. torch asks for SIGINT here, which a process started in the background ignores.
    _prctl_pr_set_pdeathsig(signal.SIGTERM)
    number, count = str(rank), str(ranks)
    os.environ.update({"RANK": number, "WORLD_SIZE": count, "LOCAL_RANK": number, "LOCAL_WORLD_SIZE": count, STORE: store})
    if "lo" in dict(map(reversed, socket.if_nameindex())):  # type: ignore[arg-type]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody else on the network needs to reach these processes
    show_warnings()
    command, code = os.getppid(), 0

    def tell(kind: str, text: str) -> None:
        words.put((kind, text))
        if os.getppid() != command and rank == 0:  # it was killed
            endings.say(text)

    try:
        with signals():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            try:
                function(*arguments)
            finally:
                for each in SIGNALS:
                    signal.signal(each, signal.SIG_IGN)  # from here on none changes how this rank ends
    except Stopped as stopped:
        tell("stopped", str(stopped))
        code = STOPPED
    except endings.Terminated as end:
        code = end.code
    except KeyboardInterrupt:
        code = endings.INTERRUPTED
    except ValueError as error:
        sentence = describe(error)
        if sentence is None:
            _print_traceback()
        else:
            tell("bad input", sentence)
        code = 1 if sentence is None else endings.REFUSED
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        _print_traceback()
        code = 1
    endings.leave(code)


def _print_traceback() -> None:
    with suppress(OSError):  # nobody may be left to read it
        endings.print_traceback(*sys.exc_info())
