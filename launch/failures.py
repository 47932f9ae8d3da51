"""What is said, and done, when workers fail: who failed first and why, in a line; how often before it is enough."""

from __future__ import annotations

import os
import re
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

from launch.log_file import private
from pipeline.beats import read_all
from pipeline.heartbeat import Beat

LONGEST = 300  # letters of a cause
_COLLATERAL = re.compile(r"gloo|nccl|Connection (closed|reset) by peer|Broken pipe|DistBackend|DistNetwork|DistStore", re.IGNORECASE)
_OF_RAY = (  # what Ray says of a worker that is gone, and what that means
    (r"low on memory|OutOfMemory|memory monitor", "was ended by Ray, because the memory of its host ran low"),
    (r"node (has died|.*was terminated|.*died)|missing too many heartbeats|node failure|its node", "was lost with its host"),
    (r"exit code 76|exit_code=76", "lost another rank"),
    (r"Worker exit|worker process has died|died unexpectedly|End of file", "died without a word (killed? out of memory?)"),
    (r"unavailable|[Tt]imed? ?out|health check", "gave no answer"),
)


class Failure:
    """One failure of the ranks: errors by rank, as Ray has them, and what the ranks said of themselves.

    old: tokens of starts of the run whose words are of earlier failures"""

    def __init__(self, errors: dict[int, BaseException], folder: str, old: set[str]) -> None:
        self.errors = {rank: getattr(error, "_base_exc", error) for rank, error in sorted(errors.items())}
        self.beats = {beat.rank: beat for beat in read_all(folder) if beat.run not in old}

    @property
    def is_preemption(self) -> bool:
        """Whether Ray was told that a machine would be taken back."""
        return any(getattr(getattr(error, "health_check_failure", error), "preempted", False) for error in self.errors.values())

    @property
    def sentence(self) -> str:
        """The rank that failed first, and why."""
        for ends in (("refused", "error"), ("hung",)):
            for rank, beat in sorted(self.beats.items()):
                if beat.end in ends and not (beat.end == "error" and _COLLATERAL.search(beat.doing)):
                    return f"{beat.name} {'stood still' if beat.end == 'hung' else 'failed'} {beat.when}: {self._cause(rank, beat)}"
        own = {rank: error for rank, error in self.errors.items() if not _is_gone(error) and not _is_collateral(error)}
        if own:
            rank, error = next(iter(own.items()))
            return f"{self._name(rank)} failed{self._when(rank)}: {short(error)}"
        gone = {rank: error for rank, error in self.errors.items() if _is_gone(error) and not self._has_ended(rank)}
        for rank, error in gone.items():
            last = self.beats.get(rank)
            doing = f" in {last.doing}" if last else ""
            return f"{self._name(rank)} {_what_ray_says(error)}{self._when(rank)}{doing}"
        for beat in self.beats.values():
            if beat.end == "lost":  # its words name the one that was lost
                return beat.doing
        rank, error = next(iter(self.errors.items()))
        return f"{self._name(rank)} failed{self._when(rank)}: {short(error)}"

    def _cause(self, rank: int, beat: Beat) -> str:
        error = self.errors.get(rank)
        return short(error) if error is not None and not _is_gone(error) else beat.doing[:LONGEST]

    def _has_ended(self, rank: int) -> bool:
        return rank in self.beats and bool(self.beats[rank].end)

    def _name(self, rank: int) -> str:
        if rank in self.beats:
            return self.beats[rank].name
        address = re.search(r"\bip: (\S+)", str(self.errors.get(rank, "")))
        return f"rank {rank} on {address[1]}" if address else f"rank {rank}"

    def _when(self, rank: int) -> str:
        return f" {self.beats[rank].when}" if rank in self.beats else ""

    def details(self) -> str:
        """All that is known, for a file."""
        lines = [time.strftime("%Y-%m-%d %H:%M:%S  ") + self.sentence]
        for rank, error in self.errors.items():
            lines += [f"--- rank {rank}: what Ray says", *"".join(traceback.format_exception(error)).strip().splitlines()]
        for _, beat in sorted(self.beats.items()):
            end = f", {beat.end}" if beat.end else ""
            lines.append(f"--- {beat.name}, process {beat.pid}, {beat.when}{end}: {beat.doing}")
        return "\n".join(lines) + "\n\n"

    def write(self, folder: str) -> None:
        with suppress(OSError):
            os.makedirs(folder, mode=0o700, exist_ok=True)
            with open(os.path.join(folder, "failures.txt"), "a", encoding="utf-8", errors="backslashreplace", opener=private) as file:
                file.write(self.details())


class Outages:
    """Counts failures since the run last got on: a job of weeks may lose a worker now and then.

    progress: returns something that is another thing once there is a newer checkpoint, or None where that cannot be told"""

    def __init__(self, allowed: int, progress: Callable[[], object]) -> None:
        self.allowed, self.count = allowed, 0
        self._progress, self._before = progress, progress()

    def another(self) -> bool:
        """Counts one more. False if that is too many."""
        now = self._progress()
        if now is not None and now != self._before:
            self._before, self.count = now, 0
        self.count += 1
        return self.count <= self.allowed


def short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')[:LONGEST]}" if lines else type(error).__name__


def _is_gone(error: BaseException) -> bool:
    """Whether a worker did not answer Ray, which then does not know why."""
    return any(
        kind.__name__ in ("RayActorError", "WorkerHealthCheckFailedError", "WorkerHealthCheckTimeoutError") for kind in type(error).__mro__
    )


def _is_collateral(error: BaseException) -> bool:
    """Whether a rank may have failed because another one did."""
    return bool(_COLLATERAL.search(f"{type(error).__name__}: {error}"))


def _what_ray_says(error: BaseException) -> str:
    text = str(getattr(error, "health_check_failure", error))
    return next((words for pattern, words in _OF_RAY if re.search(pattern, text)), "gave no answer")
