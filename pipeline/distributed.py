"""Where a process stands in the job: its rank, device and process group."""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import secrets
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group is made, which its default arguments would keep beyond its end

from dali_loaders.names import printable
from dali_loaders.remote import without_secrets
from pipeline.network_card import use_card_towards

log = logging.getLogger(__name__)
STORE = "PROTOSHARD_STORE"  # the variable in which run_local (local_ranks.py) tells its processes where they meet
NCCL_MINUTES = 2.0
ARENAS = 4  # of the C library, for all threads


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


def join(device: str = "auto", minutes: float = 60.0) -> Place:
    """This process's place. Uses the initialised process group (Ray's, say), else torchrun's variables, else a group of one.

    device   "cuda": NCCL with one GPU per local rank, or a ValueError that says why not. "cpu": gloo, with an equal share of the cores per
             rank. "auto": GPUs if all local ranks can have one, else the CPU, with a warning where the machine has an NVIDIA GPU
    minutes  that a collective of a new group may take before it fails; with NCCL, which ends the process itself, some more, so that a rank
             which waits that long can say for whom (watch.py)"""
    local_rank, local_ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if dist.is_initialized():
        on_gpu = "nccl" in dist.get_backend()
        if device not in ("auto", "cuda" if on_gpu else "cpu"):
            raise ValueError(f"engine.device is {device}, but the launcher joined the ranks with {dist.get_backend()}: start it otherwise")
        if device == "auto" and not on_gpu:
            _warn_of_idle_gpus(f"the launcher joined the ranks with {dist.get_backend()}")
    else:
        on_gpu = _computes_on_gpu(device, local_ranks)
    # Modulo, because a launcher may show each process only its own GPU, which is then number 0.
    mine = torch.device("cuda", local_rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    share_freed_memory()
    if on_gpu:
        torch.cuda.set_device(mine)
    else:
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, cores() // local_ranks))
    if not dist.is_initialized():
        where: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            where = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
            if STORE in os.environ:
                where["store"] = _meet(os.environ[STORE], where["world_size"], 60 * minutes)
            elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                where["store"] = _meet_again(**where, seconds=60 * minutes)
            if where["world_size"] > local_ranks and STORE not in os.environ and "MASTER_ADDR" in os.environ:
                use_card_towards(os.environ["MASTER_ADDR"])
        # With its device, NCCL connects here and not at the first collective, and a barrier need not guess.
        where["device_id"] = mine if on_gpu else None
        minutes += NCCL_MINUTES if on_gpu else 0
        if where["world_size"] == 1:
            atexit.register(_leave_alone)
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=minutes), **where)
    return Place(dist.get_rank(), dist.get_world_size(), mine)


def _leave_alone() -> None:
    """Where nobody else is in the group, it ends with the process, and so do gloo's threads, which else might abort it at its end."""
    if dist.is_initialized() and dist.get_world_size() == 1:
        dist.destroy_process_group()


def _meet(path: str, ranks: int, seconds: float) -> dist.Store:
    """A store in the file `path`, once all ranks have come to it. They wait here and not inside torch, where no signal would reach them."""
    store = dist.FileStore(path, ranks)
    deadline = time.monotonic() + seconds
    come = store.add("come", 1)
    while come < ranks:
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"{come} of {ranks} have come")
        time.sleep(0.05)
        come = store.add("come", 0)
    return store


def _meet_again(rank: int, world_size: int, seconds: float) -> dist.Store:
    """A part of torchrun's store which no other start of the ranks has written to. torchrun keeps one store over its restarts, in which
    ranks would find the addresses of those before them. Rank 0 answers each rank by a name that is new with every start, until all have
    heard it; counts of restarts would not do, because each machine has its own."""
    limit = timedelta(seconds=seconds)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=limit)
    name, deadline = secrets.token_hex(8), time.monotonic() + seconds
    store.set(f"come/{rank}", name)
    missing = set(range(1, world_size)) if rank == 0 else {0}
    while missing:
        for other in sorted(missing):
            if rank == 0 and store.check([f"come/{other}"]):
                store.set(f"answer/{store.get(f'come/{other}').decode()}", name)
            if store.check([f"heard/{name}/{other}" if rank == 0 else f"answer/{name}"]):
                missing.discard(other)
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"ranks {', '.join(map(str, sorted(missing)))} have not come")
        time.sleep(0.05)
    if rank > 0:
        name = store.get(f"answer/{name}").decode()
        store.set(f"heard/{name}/{rank}", "")
    return dist.PrefixStore(name, store)


def _computes_on_gpu(device: str, local_ranks: int) -> bool:
    if device == "cpu":
        return False
    fault = gpu_fault(local_ranks)
    if fault and device == "cuda":
        raise ValueError(f"engine.device is cuda, but {fault}; to train without GPUs, use --set engine.device=cpu")
    if fault:
        _warn_of_idle_gpus(fault)
    return fault is None


def _warn_of_idle_gpus(reason: str) -> None:
    has_gpu = os.path.exists("/proc/driver/nvidia") or os.path.exists("/dev/nvidia0")
    if has_gpu and os.environ.get("LOCAL_RANK", "0") == "0":
        log.warning("training on the CPU, although this machine has an NVIDIA GPU: %s", reason)


def gpu_fault(local_ranks: int) -> str | None:
    """Why torch cannot give each of `local_ranks` ranks of this machine a GPU; None if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a build with it (docs/dependencies.md)"
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    limit = "" if shown is None else f", as CUDA_VISIBLE_DEVICES is {shown!r}"
    try:
        torch.cuda.init()  # unlike is_available, it says what is wrong with the driver, and so with no GPU to be seen
    except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as error:
        words = str(error).strip().splitlines()[0].rstrip(".")
        return (
            f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot use a GPU ({words}{limit}): see docs/dependencies.md"
        )
    visible = torch.cuda.device_count()
    has_own = visible == 1 and shown is not None and not {STORE, "TORCHELASTIC_RUN_ID"} & os.environ.keys()  # each rank sees only its GPU
    if visible < local_ranks and not has_own:
        return f"{local_ranks} ranks on this machine see {visible} GPUs{limit}: start as many ranks as GPUs"
    capability, built_for = torch.cuda.get_device_capability(0), torch.cuda.get_arch_list()
    if not any(_runs_on(capability, architecture) for architecture in built_for):
        return (
            f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(0)} (sm_{capability[0]}{capability[1]}), only for "
            f"{', '.join(built_for)}: install another build (docs/dependencies.md)"
        )
    return None


def _runs_on(capability: tuple[int, int], architecture: str) -> bool:
    """Whether a GPU runs what was compiled for sm_XY (the same X, at most its Y) or compute_XY, which a driver compiles for later ones."""
    kind, _, number = architecture.partition("_")
    number = number.rstrip("abcdef")  # sm_90a: features of this one architecture
    major, minor = int(number[:-1]), int(number[-1])
    return capability >= (major, minor) and (kind == "compute" or capability[0] == major)


def share_freed_memory() -> None:
    """Lets all threads take memory from the same few arenas of the C library. By default a new thread gets one of up to eight per core.
    Each evaluation has new threads for its images, and what these free stays in their arenas: a run grew by some 30 MB at every
    evaluation until all were in use. MALLOC_ARENA_MAX in the environment counts more."""
    arena_max = -8  # mallopt's number for it
    c_library = ctypes.CDLL(None)
    if hasattr(c_library, "mallopt") and "MALLOC_ARENA_MAX" not in os.environ:  # glibc
        c_library.mallopt(arena_max, ARENAS)


def keep_freed_memory() -> None:
    """Lets the C library keep memory that tensors free on a CPU. By default it returns large blocks to the system, and taking them again
    costs a page fault per 4 KB, a fifth to a quarter of a step's time; the peak grows by up to a fifth (docs/numerics.md)."""
    trim_threshold, mmap_threshold = -1, -3  # mallopt's numbers for them
    c_library = ctypes.CDLL(None)
    if hasattr(c_library, "mallopt"):  # glibc
        c_library.mallopt(mmap_threshold, 1 << 30)
        c_library.mallopt(trim_threshold, -1)  # never


def describe(error: ValueError) -> str | None:
    """The sentence of a ValueError raised by this project's own code; None for a library's, whose traceback should be shown, and for
    all of them where PROTOSHARD_TRACEBACK is set."""
    if os.environ.get("PROTOSHARD_TRACEBACK"):
        return None
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    if module.split(".")[0] not in ("pipeline", "partial_fc", "dali_loaders", "launch", "benchmarks", "__main__"):
        return None
    return "\n".join(printable(without_secrets(line)) for line in str(error).splitlines())  # it may quote a stranger's file
