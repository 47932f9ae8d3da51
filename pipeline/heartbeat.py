"""What each rank is doing, in a file FOLDER/ranks/rank-N that it writes every second or so, for the others to see who is dead, who hangs
and where. Times are taken by the reader's own clock from one change of a file to the next, so that clocks of hosts do not matter."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from types import FrameType

import torch

from dali_loaders.remote import without_secrets

FOLDER = "ranks"
BYTES = 1024  # of a file, which is written over in place, which a full disk does not prevent
DATA = "waiting for data"
OURS = ("pipeline", "partial_fc", "dali_loaders", "launch")  # whose lines say where a rank is


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    run: str  # of all ranks of one start of a run: files of an earlier one are not read
    rank: int
    count: int  # of beats so far
    host: str
    pid: int
    step: int  # steps that are done; -1 before that is known
    doing: str
    is_waiting: bool  # for other ranks, in a collective
    asked: int = 0  # to stop (Stop.asked)
    end: str = ""  # "refused" (bad input), "error", "stopped", "hung" or "lost" once it ends; the reason is in `doing`

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def when(self) -> str:
        return f"after step {self.step:,}" if self.step >= 0 else "at the start"


def path_of(folder: str, rank: int) -> str:
    return os.path.join(folder, FOLDER, f"rank-{rank:05d}")


def write(folder: str, beat: Beat) -> None:
    """The file is opened anew each time: the folder may have been renamed, and closing is what makes NFS show it to other hosts."""
    path = path_of(folder, beat.rank)
    beat = replace(beat, doing=without_secrets(beat.doing))
    text = json.dumps(asdict(beat))
    while len(text) >= BYTES:  # a long path, or one of many characters that JSON writes as escapes
        beat = replace(beat, doing=beat.doing[: len(beat.doing) * 2 // 3], host=beat.host[:64])
        text = json.dumps(asdict(beat))
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, (text.ljust(BYTES - 1) + "\n").encode(), 0)
    finally:
        os.close(descriptor)


def read(folder: str, rank: int, run: str) -> Beat | None:
    """None where there is nothing to be read of this start of the run, or nothing whole."""
    try:
        with open(path_of(folder, rank), "rb") as file:
            values = json.loads(file.read(BYTES))
        beat = Beat(**values)
        whole = all(type(getattr(beat, field.name)).__name__ == field.type for field in fields(Beat))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return beat if whole and (beat.run, beat.rank) == (run, rank) else None


def of_thread(thread: int) -> Iterator[tuple[FrameType, int]]:
    """Frames of what a thread is in, with their lines, the innermost first."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def of_error(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """Frames of where an exception was raised, the innermost first."""
    return reversed(list(traceback.walk_tb(error.__traceback__)))


AGREEMENT = "pipeline.agreement"  # whose messages are no collective of torch, and which does nothing but wait for others


def place_in_code(frames: Iterable[tuple[FrameType, int]]) -> tuple[str, bool]:
    """Where a rank is, and whether it waits there for others: the collective, if it is in one, and the line of this project's that called
    it."""
    collective = ""
    for frame, line in frames:
        module, name = str(frame.f_globals.get("__name__")), frame.f_code.co_name
        if module.startswith(("torch.distributed.distributed_c10d", "deepspeed.comm")):
            collective = name
        elif module == "dali_loaders.background":
            return DATA, False
        elif module.split(".")[0] in OURS:
            path = frame.f_code.co_filename
            path = path[path.rfind(f"{os.sep}{module.split('.')[0]}{os.sep}") + 1 :]
            return f"{collective + ' of ' if collective else ''}{name} ({path}:{line})", bool(collective) or module == AGREEMENT
    return collective, bool(collective)


def interval(ranks: int) -> float:
    """Seconds between beats: a shared file system takes some dozens of small files a second."""
    return max(1.0, ranks / 32)


class Peers:
    """The other ranks, as their files show them."""

    def __init__(self, folder: str, run: str, rank: int, ranks: int) -> None:
        self._folder, self._run = folder, run
        self._others = [other for other in range(ranks) if other != rank]
        self.beats: dict[int, Beat] = {}  # the newest
        self._changed: dict[int, float] = {}  # when it was first seen, by this process's clock

    def look(self) -> None:
        now = time.monotonic()
        for rank in self._others:
            beat = read(self._folder, rank, self._run)
            before = self.beats.get(rank)
            if beat is not None and (before is None or (beat.count, beat.end) != (before.count, before.end)):
                self.beats[rank], self._changed[rank] = beat, now
            self._changed.setdefault(rank, now)

    def silent_for(self, rank: int) -> float:
        """Seconds since its file last changed, or since it was first looked for."""
        return time.monotonic() - self._changed.get(rank, time.monotonic())

    def silent(self, seconds: float) -> list[int]:
        """Ranks that do not write any more: dead, stopped, or their machine is gone. Those that said how they end are not among them."""
        return [rank for rank in self._others if not self._has_ended(rank) and (self._is_dead(rank) or self.silent_for(rank) > seconds)]

    def ended(self, *kinds: str) -> list[Beat]:
        return [self.beats[rank] for rank in self._others if rank in self.beats and self.beats[rank].end in kinds]

    @property
    def dead(self) -> list[int]:
        """Ranks of this machine whose processes are gone without a word."""
        return [rank for rank in self._others if not self._has_ended(rank) and self._is_dead(rank)]

    def _has_ended(self, rank: int) -> bool:
        return rank in self.beats and bool(self.beats[rank].end)

    def _is_dead(self, rank: int) -> bool:
        beat = self.beats.get(rank)
        if beat is None or beat.host != socket.gethostname():
            return False
        try:
            os.kill(beat.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return False

    @property
    def asked(self) -> int:
        return max((beat.asked for beat in self.beats.values()), default=0)


def shown(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def record_collectives(folder: str) -> None:
    """Before the ranks join: torch keeps the last collectives of each, and NCCL, where it ends a process itself, leaves them there too."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", os.path.join(os.path.abspath(folder), FOLDER, "nccl-rank-"))


def remove_old(folder: str, ranks: int) -> None:
    """Files of an earlier start of the run that had more ranks."""
    with suppress(OSError):
        for name in os.listdir(os.path.join(folder, FOLDER)):
            if name.startswith("rank-") and name > os.path.basename(path_of(folder, ranks - 1)):
                os.unlink(os.path.join(folder, FOLDER, name))


def write_collectives(folder: str, rank: int) -> None:
    """What torch has kept, as JSON, in FOLDER/ranks/collectives-N.json. Nothing where this version of torch cannot tell it."""
    path = os.path.join(folder, FOLDER, f"collectives-{rank:05d}.json")
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None:
            with suppress(Exception), open(path, "wb") as file:  # a help, and no more
                file.write(dump(True, False))
            return
