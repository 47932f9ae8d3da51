"""The Ray Train side of a run: the process group and the train loop of one worker, and what the controller does when workers fail.
It is not part of launch/ray_driver.py because Ray must import it by name: classes of a main module differ from process to process."""

import os
import secrets
import socket
import time
from itertools import count
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch.config import TorchConfig, _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend
from ray.train.v2.api.callback import UserCallback

from launch.ray_node import MEETING_FOLDER
from pipeline.network_card import use_card_of

STOPPED = "stopped"
LOOKS = count()
SEEN_SECONDS = 5  # that a file may take to appear on another host of a network file system


class BadInputError(RuntimeError):
    """A sentence for the user: bad input, the same on every attempt."""


class ProcessGroup(TorchConfig):
    """How Ray Train joins the ranks: NCCL with GPUs, else gloo. TorchTrainer fills `backend` in."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return Backend


class Backend(_TorchBackend):
    """Asks first whether torch can use the GPUs that Ray found with the driver alone: NCCL's own error does not say what is wrong.
    Ranks of one machine meet in a file, because the store of torch, where Ray lets them meet, listens on every interface and to anyone."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        if backend_config.backend == "nccl":
            for reason in filter(None, worker_group.execute(why_no_gpu)):
                raise BadInputError(reason)
        worker_group.execute(choose_card)
        if MEETING_FOLDER not in os.environ:
            return super().on_start(worker_group, backend_config)
        worker_group.execute(_set_torch_distributed_env_vars)
        group = {
            "backend": backend_config.backend,
            "world_size": len(worker_group),
            "init_method": f"file://{os.environ[MEETING_FOLDER]}/meeting-{secrets.token_hex(8)}",  # a new one for every attempt
            "timeout_s": backend_config.timeout_s,
        }
        ray.get(
            [
                worker_group.execute_single_async(rank, _setup_torch_process_group, world_rank=rank, **group)
                for rank in range(len(worker_group))
            ]
        )


def choose_card() -> None:
    """That of the address under which Ray's nodes know this one."""
    use_card_of(ray.util.get_node_ip_address())


def why_no_gpu() -> str | None:
    """Why torch cannot use the GPU that Ray gave this worker, or None where it can."""
    from pipeline.distributed import gpu_fault

    fault = gpu_fault(1)
    sentence = f"Ray has a GPU for a rank on {socket.gethostname()}, but {fault}; or train without GPUs, with --set engine.device=cpu."
    return sentence if fault else None


def run_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """The train loop of one Ray worker; a restart runs it again, on all ranks.

    Settings: recipe and overrides (resolved here, because a loss that a recipe file defines cannot be sent), resume, folder (where
    relative paths start), earlier (`checkpoints` when the job began). Returns the last evaluation's figures, or {STOPPED: a sentence}."""
    folder = settings["folder"]
    if not os.path.isdir(folder):
        raise BadInputError(f"Folder {folder} does not exist on {socket.gethostname()}; start from one all hosts share.")
    os.chdir(folder)
    from pipeline.distributed import describe
    from pipeline.resolve import resolve
    from pipeline.stopping import Stopped
    from pipeline.train import train

    try:
        config = resolve(settings["recipe"], settings["overrides"])
        seen_by_all(config.run.folder)
        resume = "auto" if checkpoints(config.run.folder) - settings["earlier"] else settings["resume"]
        return train(config, resume=resume, keep_stop=True)  # which the driver has removed, if it was there before
    except Stopped as stopped:
        return {STOPPED: str(stopped)}  # an exception would be a failure, after which Ray starts the ranks again
    except ValueError as error:
        sentence = describe(error)  # here, because the traceback, which tells whose error it is, does not pass through Ray
        if sentence is None:
            raise
        raise BadInputError(sentence) from None


def seen_by_all(folder: str) -> None:
    """BadInputError: a host does not see what rank 0 writes into the run's folder, so that checkpoints would be in pieces.

    Ranks talk through the store of their process group: a collective of NCCL would need the GPU that the trainer has yet to choose."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if "://" in folder or os.environ.get("LOCAL_WORLD_SIZE") == str(ranks):
        return
    store = dist.PrefixStore(f"folder-{next(LOOKS)}", dist.distributed_c10d._get_default_store())
    written = Path(folder, f".seen-{secrets.token_hex(8)}")
    if rank == 0:
        written.parent.mkdir(parents=True, exist_ok=True)
        written.touch()
        store.set("written", written.name)
    path, deadline = Path(folder, store.get("written").decode()), time.monotonic() + SEEN_SECONDS
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    store.set(f"{rank}", "" if seen else socket.gethostname())
    if rank == 0:
        blind = next(filter(None, (store.get(f"{other}").decode() for other in range(ranks))), "")
        sentence = f"does not see what the first host writes into {os.path.abspath(folder)}; give a run.folder that all hosts share."
        store.set("verdict", f"Host {blind} {sentence}" if blind else "")
        written.unlink()
    verdict = store.get("verdict").decode()
    if verdict:
        raise BadInputError(verdict)


def checkpoints(run_folder: str) -> set[tuple[str, int]]:
    """Name and time of the complete checkpoints in a run's folder. Those that a job has added are where its restarts go on, whatever
    --resume said: another attempt at `none` or PATH would throw them away."""
    return {(path.name, path.stat().st_mtime_ns) for path in Path(run_folder, "checkpoints").glob("step-*[0-9]")}


class OnFailure(UserCallback):
    """Lives in Ray Train's controller: says why workers are restarted, and ends the job at once on bad input."""

    def __init__(self, max_failures: int):
        self.max_failures = max_failures
        self.failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        causes = {rank: getattr(error, "_base_exc", error) for rank, error in worker_exceptions.items()}
        for error in causes.values():
            if isinstance(error, BadInputError):
                raise error  # a callback's own error is what Ray Train does not retry
        self.failures += 1
        reasons = "; ".join(f"rank {rank}: {one_line(error)}" for rank, error in sorted(causes.items()))
        decision = "restarting from the newest checkpoint" if self.failures <= self.max_failures else "giving up"
        print(f"Failure {self.failures}, {self.max_failures} allowed ({reasons}): {decision}.", flush=True)


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
