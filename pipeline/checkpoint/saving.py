"""Saving: each rank writes its part, all agree between steps that every part is on its disk, and rank 0 commits. Whatever fails before the
commit leaves the earlier checkpoints as they were; training goes on."""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from dali_loaders.remote import without_secrets
from pipeline.agreement import Agreement
from pipeline.checkpoint import data_file, folder, manifest
from pipeline.checkpoint.config import CheckpointConfig
from pipeline.checkpoint.data_file import NotFiniteError, Written
from pipeline.checkpoint.folder import NAME
from pipeline.checkpoint.host_copy import HostCopy
from pipeline.checkpoint.parts import Part
from pipeline.checkpoint.reading import IDENTITIES
from pipeline.checkpoint.stores import MANIFEST, store_of

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds
FILE = "rank-{:05d}.safetensors"


class OwnerError(ValueError):
    """The folder belongs to another run by now, so that nothing may be written to it."""


class _Flight:
    """A save on its way: `work` runs in a thread (or at once), and then `result` is what it returned or raised."""

    def __init__(self, step: int, info: dict[str, Any]) -> None:
        self.step, self.name, self.info = step, NAME.format(step), info
        self.thread: threading.Thread | None = None
        self.result: Any = None
        self.is_committing = False
        self.copied = threading.Event()
        self.copied.set()

    def run(self, work: Callable[[], Any], beside: bool) -> None:
        self.result = RuntimeError("the thread that saves has ended without a word")

        def catch() -> None:
            try:
                self.result = work()
            except (OSError, MemoryError) as error:
                self.result = OSError(_words(error))  # as any rank can send it
            except (NotFiniteError, OwnerError) as error:
                self.result = error
            except Exception as error:
                log.warning("a save failed\n%s", without_secrets(traceback.format_exc()))
                self.result = RuntimeError(without_secrets(f"{type(error).__name__}: {error}"))
            finally:
                self.copied.set()  # nobody waits for a thread that has ended

        if beside:
            self.thread = threading.Thread(target=catch, name="protoshard-save", daemon=True)
            self.thread.start()
        else:
            catch()

    def is_busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def wait(self) -> None:
        """Until its work is done, with a word each minute: a store may give no answer for hours."""
        while self.is_busy():
            assert self.thread is not None
            self.thread.join(PATIENCE)
            if self.is_busy():
                log.warning("still waiting until the checkpoint of step %d is written", self.step)


class Saver:
    """Writes the checkpoints of a run, one at a time. Every rank has one and calls its methods in the same order.

    check_owner  called by rank 0 before it begins and commits; raises OwnerError if another run has taken the folder over
    trouble      why the last save failed, until one succeeds; None otherwise
    committed    the step of the run's newest checkpoint, where this has written it, or has been told
    stall        seconds that training has waited for saves"""

    def __init__(
        self, path: str, config: CheckpointConfig, agreement: Agreement | None = None, check_owner: Callable[[], None] = lambda: None
    ) -> None:
        self.path, self.config, self.agreement, self.check_owner = path, config, agreement or Agreement(), check_owner
        self.store = store_of(path)
        self.copy = HostCopy()
        self.flight: _Flight | None = None
        self.trouble: str | None = None
        self.committed: int | None = None
        self.stall = 0.0

    def reserve(self, state: dict[str, Part]) -> None:
        """Gets the memory that saves will need, in the background."""
        if self.config.asynchronous:
            self.copy.reserve(self._mine(state))

    def start(self, step: int, state: dict[str, Part], info: dict[str, Any], identities: Sequence[str] | None = None) -> None:
        """Begins to save FOLDER/step-N. Returns when the tensors of `state` may change, and those that are settled once `fence` has
        returned; if saves are not asynchronous, when all is done. Waits for an earlier save that is still on its way. Nothing happens if
        this step is saved already.

        state: by name, this rank's parts; names of replicated ones are the same on every rank
        info: what the manifest says beside them
        identities: names of the classes"""
        self.finish()
        if self.committed == step:
            return
        began = time.perf_counter()
        flight = _Flight(step, {"step": step, **info})
        fault = self.agreement.of_first(self._begin(flight))
        if isinstance(fault, OwnerError):
            raise fault
        if fault is not None:
            self._fail(flight, _words(fault))
            return
        parts = self._mine(state)
        self.flight = flight
        if self.config.asynchronous:
            copies, rest = self.copy.of(parts)
            flight.copied.clear()
            flight.run(lambda: self._write(flight, copies, identities, rest), beside=True)
        else:
            flight.run(lambda: self._write(flight, parts, identities), beside=False)
        self.stall += time.perf_counter() - began
        if not self.config.asynchronous:
            self.finish()

    def _begin(self, flight: _Flight) -> OwnerError | OSError | None:
        if self.agreement.rank != 0:
            return None
        try:
            self.check_owner()  # what another run has begun would be removed as left over
            self.store.begin(flight.name)
        except OwnerError as error:
            return error
        except OSError as error:
            return OSError(_words(error))
        return None

    def _mine(self, state: dict[str, Part]) -> dict[str, Part]:
        """What this rank writes: its own parts, and its share of those that all have, each to the rank that has least so far."""
        mine = {name: part for name, part in state.items() if not part.replicated}
        loads = [0] * self.agreement.ranks
        shared = sorted((-data_file.size_of({name: part}), name) for name, part in state.items() if part.replicated)
        for size, name in shared:
            rank = loads.index(min(loads))
            loads[rank] -= size
            if rank == self.agreement.rank:
                mine[name] = state[name]
        return mine

    def fence(self) -> None:
        """Returns when tensors that were settled may change. Called before each step of an optimizer."""
        if self.flight is not None and not self.flight.copied.is_set():
            began = time.perf_counter()
            self.flight.copied.wait()
            self.stall += time.perf_counter() - began

    def _write(
        self,
        flight: _Flight,
        parts: dict[str, Part],
        identities: Sequence[str] | None,
        copy: Callable[[], None] = lambda: None,
    ) -> list[Written]:
        try:
            copy()
        finally:
            flight.copied.set()
        file = FILE.format(self.agreement.rank)
        written = [data_file.write(file, self.store.create(flight.name, file), parts)]
        if identities is not None and self.agreement.rank == 0:
            content = json.dumps(list(identities)).encode()
            written.append(data_file.write_bytes(IDENTITIES, self.store.create(flight.name, IDENTITIES), content))
        return written

    def is_busy(self) -> int:
        """For `go_on`: 1 while this rank works on a save, else 0."""
        return int(self.flight is not None and self.flight.is_busy())

    def go_on(self, busy: int) -> None:
        """Takes a save one stage further once no rank is busy with it. Called between steps.

        busy: the maximum of `is_busy()` over ranks
        NotFiniteError, on every rank: the state to be saved is not finite. OwnerError likewise."""
        flight = self.flight
        if flight is None or busy:
            return
        flight.wait()
        if flight.is_committing:
            self._end(flight, self.agreement.of_first(flight.result))
        else:
            results = self.agreement.gather(flight.result)
            fault = next((result for result in results if isinstance(result, Exception)), None)
            if fault is not None:
                self._end(flight, fault)
                return
            flight.is_committing = True
            if self.agreement.rank == 0:
                written = [file for files in results for file in files]
                flight.run(lambda: self._commit(flight, written), beside=self.config.asynchronous)

    def _commit(self, flight: _Flight, written: list[Written]) -> None:
        self.check_owner()
        content = manifest.encode(flight.info, written)
        data_file.write_bytes(MANIFEST, self.store.create(flight.name, MANIFEST), content)
        self.check_owner()
        self.store.commit(flight.name)
        try:
            for name in folder.outdated(self.store, self.config, flight.name):
                self.store.remove(name)
        except (OSError, ValueError) as error:
            log.warning("an old checkpoint in %s cannot be removed (%s)", self.store.path, _words(error))

    def _end(self, flight: _Flight, fault: Exception | None) -> None:
        self.flight = None
        if fault is None:
            self.trouble, self.committed = None, flight.step
            return
        if self.agreement.rank == 0:
            self.store.abandon(flight.name)
        if isinstance(fault, NotFiniteError):
            raise NotFiniteError(f"{fault} at step {flight.step}")
        if not isinstance(fault, OSError):  # OwnerError, or a fault of this program
            raise fault
        self._fail(flight, _words(fault))

    def _fail(self, flight: _Flight, reason: str) -> None:
        self.trouble = f"step {flight.step} could not be saved to {self.store.path} ({reason}); earlier checkpoints are untouched"
        if self.agreement.rank == 0:
            log.warning("%s; the next save, if there is one, tries again", self.trouble)

    def finish(self) -> None:
        """Waits until no save is on its way. Raises as `go_on`."""
        began = time.perf_counter()
        while self.flight is not None:
            self.flight.wait()
            (busy,) = self.agreement.highest(self.is_busy())
            self.go_on(busy)
        self.stall += time.perf_counter() - began


def save(path: str, step: int, state: dict[str, Part], info: dict[str, Any], keep: int = 3, identities: Sequence[str] | None = None) -> str:
    """Writes the checkpoint PATH/step-N and returns where it is, when all is on the disk. Every rank calls it. ValueError if it could not
    be written, or holds numbers that are not finite."""
    saver = Saver(path, CheckpointConfig(keep=keep, asynchronous=False))
    saver.start(step, state, info, identities)
    if saver.trouble is not None:
        raise ValueError(saver.trouble)
    return f"{path}/{NAME.format(step)}"


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


__all__ = ["NotFiniteError", "OwnerError", "Saver", "save"]
