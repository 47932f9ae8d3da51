"""What is kept of a job's logs: RUN/logs/JOB/ has driver.log, rank-N.log, failures.txt and Ray's own logs of each host, all bounded, and
for the user alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from launch.log_file import private

FOLDER = "logs"  # in the run's folder, as pipeline/lease_files.py has it, which the launcher does not import for this
KEPT = 20  # jobs of a run, the newest
LARGEST_OF_RAY, ALL_OF_RAY = 1_000_000, 20_000_000  # bytes that are kept of one of Ray's files, and of all files of a host
DRAIN_SECONDS = 5.0
OF_VARIABLES = re.compile(rb"env_vars|runtime.?env", re.IGNORECASE)  # in lines of Ray that have the values of --env


def folder_of(run_folder: str, job_id: str) -> str:
    return os.path.join(os.path.abspath(run_folder), FOLDER, job_id)


def begin(run_folder: str, job_id: str) -> str:
    """Makes the folder of a job and removes those of the oldest. Returns it; logs that cannot be kept keep nobody from training."""
    folder = folder_of(run_folder, job_id)
    with suppress(OSError):
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with os.scandir(os.path.dirname(folder)) as entries:
            jobs = sorted((entry.stat().st_mtime, entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
        for _, old in jobs[:-KEPT]:
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
    return folder


def keep(path: str, prefix: str = "", everything: bool = True) -> subprocess.Popen[bytes]:
    """From here on, what this process and its children print goes to the file `path`, through a process of its own. That passes on to where
    it went before: all lines with `everything`, else those that warn."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "log_file.py")
    command = [sys.executable, "-I", "-S", script, path, prefix, "all" if everything else "told"]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=1)
    assert writer.stdin is not None
    for number in (1, 2):
        os.dup2(writer.stdin.fileno(), number)
    writer.stdin.close()
    return writer


@contextmanager
def kept(path: str) -> Iterator[None]:
    """Inside, what this process prints is kept too. At the end it waits for the last line to be written."""
    before = os.dup(1), os.dup(2)
    writer = keep(path)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        for number, descriptor in enumerate(before, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        with suppress(subprocess.TimeoutExpired):  # a child that prints still has it open
            writer.wait(DRAIN_SECONDS)


def keep_those_of_ray(session: str, to: str) -> None:
    """The ends of Ray's log files of a node, newest first, until there is enough, without the values of --env. `to` is in the folder that
    `begin` makes: without it the run's folder was refused, or is none of this host, and nothing is kept. Never fails."""
    if not os.path.isdir(os.path.dirname(to)):
        return
    found: list[tuple[float, str]] = []
    for folder, _, names in os.walk(os.path.join(session, "logs")):
        for name in names:
            path = os.path.join(folder, name)
            with suppress(OSError):
                if os.path.isfile(path) and not os.path.islink(path) and (size := os.stat(path)).st_size:
                    found.append((size.st_mtime, path))
    room = ALL_OF_RAY
    for _, path in sorted(found, reverse=True):
        target = os.path.join(to, os.path.relpath(path, os.path.join(session, "logs")))
        with suppress(OSError), open(path, "rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - LARGEST_OF_RAY)
            file.seek(start)
            lines = file.read(LARGEST_OF_RAY).splitlines(keepends=True)[start > 0 :]  # of a part of a line nobody knows what it has
            text = b"".join(line for line in lines if not OF_VARIABLES.search(line))
            if len(text) > room:
                return
            room -= len(text)
            os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
            with open(target, "wb", opener=private) as copy:
                copy.write(text)
