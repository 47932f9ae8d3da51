"""Where a process stands in the job: its rank, device and process group; and N local processes with one command."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def join() -> Place:
    """This process's place. Uses the initialised process group (Ray's, say), else torchrun's variables, else a group of one.

    NCCL with one GPU per local rank where there are enough of them, else gloo on CPU with an equal share of the cores per rank.
    """
    local_rank, local_ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_gpu = (
        "nccl" in dist.get_backend() if dist.is_initialized() else torch.cuda.is_available() and torch.cuda.device_count() >= local_ranks
    )
    # Modulo, because a launcher may show each process only its own GPU, which is then number 0.
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cores() // local_ranks))
    if not dist.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Place(dist.get_rank(), dist.get_world_size(), device)


class FolderLock:
    """Keeps a second run out of a run's folder, which it makes where it is missing. Every rank calls it; rank 0 holds it, on a hidden
    file beside the folder, which may itself be renamed meanwhile."""

    def __init__(self, folder: str, place: Place) -> None:
        fault: list[str | None] = [None]
        self.file: TextIO | None = None
        if place.is_first:
            try:
                os.makedirs(folder, exist_ok=True)
                place_of_lock = os.path.join(os.path.dirname(folder), f".{os.path.basename(folder)}.lock")
                self.file = open(place_of_lock, "w")  # noqa: SIM115 (held until release)
            except OSError as error:
                fault = [f"run.folder={folder} cannot be written ({error.strerror}): choose another folder"]
        if self.file:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fault = [f"another run is writing to {folder}: wait for its end, or choose another run.folder"]
            except OSError as error:  # file systems without locks
                log.warning("%s cannot be locked (%s): take care that no other run writes there", folder, error.strerror)
        dist.broadcast_object_list(fault)
        if fault[0]:
            raise ValueError(fault[0])

    def release(self) -> None:
        if self.file:
            self.file.close()


def describe(error: ValueError) -> str | None:
    """The sentence of a ValueError raised by this project's own code; None for a library's, whose traceback should be shown, and for
    all of them where PROTOSHARD_TRACEBACK is set."""
    if os.environ.get("PROTOSHARD_TRACEBACK"):
        return None
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return str(error) if module.split(".")[0] in ("pipeline", "partial_fc", "dali_loaders", "launch", "benchmarks", "__main__") else None


def run_local(ranks: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Calls `function(*arguments)` in `ranks` new processes on this machine (1: in this one) and waits for them.

    Bad input in any of them is raised here as ValueError with its sentence. Any other failure ends the others and this process.
    """
    if ranks < 1:
        raise ValueError(f"--ranks is {ranks}, but at least 1 process is needed")
    if ranks == 1:
        function(*arguments)
        return
    with tempfile.TemporaryDirectory(prefix="protoshard-") as folder:
        sentences = mp.get_context("spawn").SimpleQueue()
        processes = mp.spawn(_local_rank, (ranks, os.path.join(folder, "store"), sentences, function, arguments), nprocs=ranks, join=False)
        try:
            while not processes.join():
                pass
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            # A rank that only lost its peer may be noticed before the one that gives the reason.
            if not sentences.empty():
                raise ValueError(sentences.get()) from None
            if isinstance(error, mp.ProcessRaisedException):
                raise
            if error.signal_name:
                print(
                    f"protoshard: rank {error.error_index} was ended by {error.signal_name} (out of memory?); the same command continues "
                    "from the newest checkpoint",
                    file=sys.stderr,
                )
            sys.exit(error.exit_code if error.exit_code > 0 else 1)
        finally:  # an interruption of this process alone does not reach the ranks
            for process in processes.processes:
                process.terminate()
            for process in processes.processes:
                process.join()


def _local_rank(rank: int, ranks: int, store: str, sentences: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # Ranks should end with the command itself. torch asks for SIGINT here, which a process started in the background ignores.
    mp._prctl_pr_set_pdeathsig(signal.SIGTERM)  # type: ignore[attr-defined]
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    logging.basicConfig(format="%(message)s")
    backend = "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= ranks else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        function(*arguments)
    except ValueError as error:
        sentence = describe(error)
        if sentence is None:
            raise
        sentences.put(sentence)
        os._exit(2)  # not through destroy_process_group: other ranks may wait in a collective, and the parent ends them
    except KeyboardInterrupt:
        os._exit(130)
    dist.destroy_process_group()
