"""How a command ends that is broken off: Ctrl-C, SIGTERM, a reader of its output that has gone, a full disk behind its output."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import NoReturn, TextIO

from dali_loaders.remote import without_secrets

REFUSED, LOST = 2, 76  # exit codes: bad input, and a rank of a job that was lost
INTERRUPTED, BROKEN_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE  # exit codes as a shell gives them to what a signal ended


class Terminated(BaseException):
    """SIGTERM, or SIGHUP when a terminal closes. On its way up temporary files are removed."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Lost(BaseException):
    """A process of a job died. Its text is the sentence for the user."""


@contextmanager
def unwinding_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Terminated inside, SIGINT KeyboardInterrupt, unless they are ignored (nohup) or someone else handles them.

    The same comes out where a library that was being imported makes another error of it."""
    came: dict[int, BaseException] = {}

    def unwind(number: int, _: FrameType | None) -> None:
        if number != signal.SIGINT and number in came:
            return  # a second one should not break off the unwinding
        came[number] = KeyboardInterrupt() if number == signal.SIGINT else Terminated(128 + number)
        raise came[number]

    defaults = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    ours = {number: default for number, default in defaults.items() if signal.getsignal(number) is default}
    try:
        for number in ours:
            signal.signal(number, unwind)
    except ValueError:  # not the main thread, which alone gets signals
        ours = {}
    try:
        yield
    except Exception as error:
        if came:
            raise next(iter(came.values())) from error
        raise
    finally:
        for number, default in ours.items():
            if signal.getsignal(number) is unwind:
                signal.signal(number, default)


def open_standard_streams() -> None:
    """Where one of them is closed, the next file that is opened would get its number, and with it whatever libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # as the lowest free number
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def show_any_name() -> None:
    """Names of files may hold bytes that the terminal's encoding does not know. They are shown as escapes."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # no stream, or one that a test put there
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As the interpreter does, but without the secrets of an address that a library quotes."""
    print(without_secrets("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)


def end_with(main: Callable[[], int]) -> NoReturn:
    """Ends this process with the exit code that `main` returns, or with a traceback and 1."""
    try:
        code = main()
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    leave(code)


def leave(code: int) -> NoReturn:
    """Ends this process. If it is in a process group, at once: gloo's threads may outlive the group, and abort a process whose interpreter
    ends around them. After a failure others may still wait in a collective, which leaving the group would do too."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized():
        sys.exit(code)
    if code == 0:
        dist.destroy_process_group()
    with suppress(OSError):
        flush_output()
    os._exit(code)


def flush_output() -> None:
    """What is buffered is written here, where an error can be caught, and not when the interpreter ends."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def without_output(error: OSError) -> int | None:
    """The exit code where an error means that nobody reads the output, or that there is no room for it. None where it means another thing.

    What is left in the buffers then goes nowhere, so that the interpreter has nothing to complain of at its end."""
    is_broken = _discard_unheard()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        say(f"{error.strerror}{f': {error.filename}' if error.filename else ''}")
        return REFUSED
    return BROKEN_PIPE if is_broken and isinstance(error, BrokenPipeError) else None


def say(sentence: str) -> None:
    """Why the program ends, on standard error. Where nobody can hear it, the exit code alone says so."""
    try:
        print(f"protoshard: {sentence}", file=sys.stderr, flush=True)
    except OSError:
        _discard_unheard()


def _discard_unheard() -> bool:
    """Whether there is an output that cannot be written; what it is given from now on goes nowhere."""
    broken = [stream for stream in (sys.stdout, sys.stderr) if stream is not None and _is_broken(stream)]
    for stream in broken:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(broken)


def _is_broken(stream: TextIO) -> bool:
    try:
        stream.flush()
        pipe = select.poll()
        pipe.register(stream, 0)
        return any(event & select.POLLERR for _, event in pipe.poll(0))  # no reader is left
    except ValueError:  # closed, or in memory
        return False
    except OSError as error:
        return not isinstance(error, io.UnsupportedOperation)
