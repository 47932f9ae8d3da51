"""One run, one folder: a lease with a heartbeat in every folder that a run writes to says whose it is, whatever host and spelling of the
folder another run comes by."""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
import threading
import time
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from pipeline.checkpoint import OwnerError
from pipeline.distributed import Place
from pipeline.lease_files import FolderFiles, files_at, is_used, lock, unlock
from pipeline.lease_hold import Hold, attempt, refusal

BEAT = 10.0  # seconds

log = logging.getLogger(__name__)


class Lease:
    """Keeps a second run out of the folders that a run writes to, which it makes where they are missing: `folder`, and that of its
    checkpoints, FOLDER/checkpoints (which may be a link to somewhere else) unless `checkpoints` is another one or an address. Every rank
    makes one; rank 0 holds it. ValueError on all of them if another run has it, or if a folder cannot be written.

    Where the holder runs on the same kernel and the file system has locks, that is known at once. Otherwise whoever comes waits for 3
    beats to see whether the holder lives. No clock is compared with another one's, and no host's name. Only from an earlier attempt of its
    own job (`lease_hold.ATTEMPT`) it takes the folder over at once, whether that lives or not: ranks that were cut off may come back, and
    then write no more.

    token: a random text, the same on every rank: that of this holding of the folder
    """

    def __init__(self, folder: str, place: Place, checkpoints: str = "", beat: float = BEAT) -> None:
        self.place, self.folder = place, os.path.realpath(folder)
        self.token = secrets.token_hex(16)
        self._given, self._checkpoints, self._beat = folder, checkpoints, beat
        self._holds: list[Hold] = []
        self._writing = f"run.folder={folder}"  # for messages
        self._name: int | None = None
        self._lost: OwnerError | None = None
        self._made = False  # the folder
        self._renewed = _now()
        self._ended = threading.Event()
        self._take()
        if place.is_first:
            threading.Thread(target=self._live, name="lease", daemon=True).start()

    def check(self) -> None:
        """To be called before a commit. OwnerError if another run has taken over while this one was suspended, or cut off from its folder;
        OSError where that cannot be told now. Only rank 0 looks."""
        if self._lost:
            raise OwnerError(str(self._lost))
        try:
            for hold in self._holds:
                hold.check()
        except OwnerError as error:
            self._lost = error
            raise

    def is_ours(self) -> bool:
        """False if the lease is known to be lost. Looks at the files only after two beats were missed."""
        if self._lost is None and self.place.is_first and _now() - self._renewed > 2 * self._beat:
            with suppress(OwnerError, OSError):
                self.check()
        return self._lost is None

    def follow(self) -> None:
        """Called by every rank after an earlier run was set aside: takes the folder that stands in its place."""
        if self.place.is_first and not all(hold.is_at_its_name() for hold in self._holds):
            self._leave()
        self._take()

    def release(self) -> None:
        self._ended.set()
        if self._holds and self._made and self._lost is None:
            with suppress(OSError):
                self._remove_unused()
        self._leave()
        if self._name is not None:
            unlock(self._name)
            self._name = None

    def _remove_unused(self) -> None:
        """A run that is refused at its start leaves no folder. Before the lease is left: nobody else has anything in there."""
        if not is_used(self.folder):
            shutil.rmtree(self.folder)

    def _take(self) -> None:
        told: list[Any] = [None, self.token]
        if self.place.is_first and not self._holds:
            try:
                self._take_all()
            except ValueError as error:
                told[0] = str(error)
            except OSError as error:
                room = "make room there, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
                told[0] = f"{self._writing} cannot be written ({error.strerror or error}): {room}choose another folder"
            if told[0]:
                self.release()
        dist.broadcast_object_list(told)
        fault, self.token = told
        if fault:
            raise ValueError(fault)

    def _take_all(self) -> None:
        self._made = self._made or not os.path.isdir(self.folder)
        os.makedirs(self.folder, exist_ok=True)
        if self._name is None:
            self._lock_name()
        gone: set[str] = set()
        checkpoints = self._checkpoints or os.path.join(self.folder, "checkpoints")
        for option, address in ((f"run.folder={self._given}", self.folder), (f"checkpoint.folder={checkpoints}", checkpoints)):
            self._writing = option
            files = files_at(address)
            if address != self.folder and isinstance(files, FolderFiles) and os.path.samefile(files.where, self.folder):
                continue
            hold = Hold(files, self.token, self._beat)
            hold.take(gone)
            self._holds.append(hold)
        self._renewed = _now()

    def _lock_name(self) -> None:
        """A lock on the folder's name, for whoever comes by it while the folder itself is renamed. Where the folder above is not this
        user's, nobody renames."""
        beside = os.path.join(os.path.dirname(self.folder), f".{os.path.basename(self.folder)}.lock")
        try:
            self._name = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError:
            return
        if lock(self._name) is False:
            holder = Hold(FolderFiles(self.folder), "", 0).holder()
            if not attempt().follows(holder):
                raise ValueError(refusal(self.folder, holder))
            os.close(self._name)
            self._name = None

    def _leave(self) -> None:
        while self._holds:
            self._holds.pop().leave()

    def _live(self) -> None:
        """The heartbeat, a thread of rank 0."""
        is_well = True
        while not self._ended.wait(self._beat) and self._lost is None:
            try:
                for hold in list(self._holds):
                    hold.renew()
                self._renewed, is_well = _now(), True
            except OwnerError as error:
                self._lost = error
                log.warning("%s", error)
            except OSError as error:
                if is_well:
                    log.warning("the lease on %s cannot be renewed (%s): trying again", self.folder, error.strerror or error)
                is_well = False


def _now() -> float:
    """Seconds of a clock that nobody sets, and that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
