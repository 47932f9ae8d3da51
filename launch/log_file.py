"""A process of its own that writes what one rank, or the driver, prints to a log file of bounded size, and shows some of it on the console.
It outlives the one that prints, so that the last words of a process that crashes are kept. It needs Python's library alone: a fresh
interpreter of it takes 10 MB and 20 ms."""

import os
import re
import signal
import sys
import time
import typing

LARGEST = 50_000_000  # bytes of a file; what comes then goes on in a new one, and the last but one is kept as FILE.1
MOST_SHOWN = 20  # lines a minute of a rank other than the first
TOLD = re.compile(rb"warn|error|fail|fault|fatal|critical|exception|killed|died|lost|out of memory|still (waits )?in |sign of life", re.I)
# What torch's meeting of ranks, and Ray, say at every start: it is in the file.
NOISE = re.compile(
    rb"\[c10d\]|\[Gloo\]|ProcessGroup(Gloo|NCCL|Wrapper)\.|TCPStore|socket\.cpp|Setting up process group|"
    rb"A worker died or was killed while executing a task by an unexpected system error|"  # said again, with the rank, in a line
    rb"^\(raylet(?:, ip=[^)]+)?\)(?!.*memory pressure)|"  # a host that was lost, likewise; with a stack of 20 lines when it is back
    rb"Started distributed worker processes|^- \(ip=|ray/train/v2/|RAY_ACCEL_ENV_VAR|FutureWarning|DeprecationWarning|warnings\.warn\("
)
OF_RAY = re.compile(rb"^\((?:\w+ )?pid=\d+(?:, ip=[^)]+)?\) ")
CLOCK = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d *")


def private(path: str, flags: int) -> int:
    """An opener: what is printed may hold secrets of the user, so only the user reads it."""
    return os.open(path, flags, 0o600)


class File:
    """Appends to `path`, and goes on without it where that fails, as on a full disk: training does."""

    def __init__(self, path: str) -> None:
        self._path, self._size = path, 0
        self._file: typing.Any = None

    def write(self, line: bytes) -> None:
        try:
            if self._file is not None and self._size > LARGEST:
                self._file.close()
                self._file = None
                os.replace(self._path, f"{self._path}.1")
            if self._file is None:
                os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
                self._file = open(self._path, "ab", buffering=0, opener=private)  # noqa: SIM115
                self._size = self._file.tell()
            self._file.write(line)
            self._size += len(line)
        except OSError:
            self._file = None


class Shown:
    """Which lines the console gets."""

    def __init__(self, prefix: bytes, everything: bool) -> None:
        self._prefix, self._everything = prefix, everything
        self._minute, self._count = 0, 0
        self._is_noise = False

    def of(self, line: bytes) -> bytes | None:
        clock = CLOCK.match(line)
        at = clock.end() if clock else 0
        goes_on = not clock and line[:1].isspace()
        is_noise = NOISE.search(line[at:]) is not None
        if not goes_on:
            self._is_noise = is_noise
        if is_noise or self._is_noise:
            return None
        told = line[:at] + self._prefix + line[at:]
        if self._everything:
            return told
        if not TOLD.search(line):
            return None
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute, self._count = minute, 0
        self._count += 1
        if self._count > MOST_SHOWN:
            return line[:at] + self._prefix + b"more such lines are in its log\n" if self._count == MOST_SHOWN + 1 else None
        return told


def out_of_memory(path: str = "/proc/vmstat") -> int:
    """Processes that the kernel of this host has ended because memory ran out, since it started; 0 where it does not tell."""
    try:
        with open(path, "rb") as file:
            found = re.search(rb"^oom_kill (\d+)$", file.read(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) if found else 0


def main() -> None:
    """Arguments: the file, a prefix of lines on the console, and whether all lines are shown there ("all") or those that warn ("told").
    Reads standard input to its end, which comes when nobody has it open any more."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # meant for whoever prints, whose last words are to come
        signal.signal(number, signal.SIG_IGN)
    path, prefix, which = sys.argv[1:4]
    file, shown = File(path), Shown(prefix.encode(), which == "all")
    file.write(b"")  # so that it is there
    console: int | None = 1
    rest, before = b"", out_of_memory()
    while True:
        data = os.read(0, 1 << 16)
        if not data and (more := out_of_memory() - before) > 0:
            rest += (
                b"\n" if rest else b""
            ) + b"out of memory: the kernel has ended %d processes of this host since this log began\n" % more
        lines = (rest + data).split(b"\n")
        rest = lines.pop() if data and len(lines[-1]) < 1 << 16 else b""
        if not data and lines[-1] == b"":
            lines.pop()
        for line in lines:
            line = OF_RAY.sub(b"", line) + b"\n"
            if not (CLOCK.match(line) or line[:1].isspace()):
                line = time.strftime("%Y-%m-%d %H:%M:%S  ").encode() + line
            file.write(line)
            told = shown.of(line)
            if told is not None and console is not None:
                try:
                    os.write(console, told)
                except OSError:
                    console = None
        if not data:
            return


if __name__ == "__main__":
    main()
