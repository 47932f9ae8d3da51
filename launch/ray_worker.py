"""The Ray Train side of a run: the process group and the train loop of one worker, and what the controller does when workers fail.
It is not part of launch/ray_driver.py because Ray must import it by name: classes of a main module differ from process to process."""

import itertools
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch.config import TorchConfig, _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from dali_loaders.progress import clock
from launch import job_logs
from launch.failures import Failure, Outages
from launch.ray_node import MEETING_FOLDER
from pipeline.beats import read_all
from pipeline.network_card import use_card_of
from pipeline.stopping import ATTEMPT

STOPPED = "stopped"
LOOKS = count()
# Of the process that starts the ranks, again and again: Ray's controller of one job.
JOB, ATTEMPTS = secrets.token_hex(8), count(1)
SEEN_SECONDS = 5  # that a file may take to appear on another host of a network file system


class BadInputError(RuntimeError):
    """A sentence for the user: bad input, the same on every attempt."""


@dataclass
class ProcessGroup(TorchConfig):
    """How Ray Train joins the ranks: NCCL with GPUs, else gloo. TorchTrainer fills `backend` in."""

    logs: str = ""  # the folder in which each rank keeps what it prints, if any

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return Backend


class Backend(_TorchBackend):
    """Asks first whether torch can use the GPUs that Ray found with the driver alone: NCCL's own error does not say what is wrong.
    Ranks of one machine meet in a file, because the store of torch, where Ray lets them meet, listens on every interface and to anyone."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(begin_attempt, f"{JOB} {next(ATTEMPTS)}")
        hosts = ray.get(
            [
                worker_group.execute_single_async(rank, keep_log, backend_config.logs, rank)  # before they meet, which they say much about
                for rank in range(len(worker_group))
            ]
        )
        told(f"workers placed: {placed(hosts)}")
        self._join(worker_group, backend_config)
        told(f"process group made, with {backend_config.backend}")

    def _join(self, worker_group: Any, backend_config: Any) -> None:
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


def begin_attempt(attempt: str) -> None:
    """On a worker: by this number it takes the run's folder from workers that were cut off, and loses it to later ones."""
    os.environ[ATTEMPT] = attempt


def choose_card() -> None:
    """That of the address under which Ray's nodes know this one."""
    use_card_of(ray.util.get_node_ip_address())


def keep_log(folder: str, rank: int) -> str:
    """On a worker. Returns its host."""
    host = socket.gethostname()
    if folder:
        job_logs.keep(os.path.join(folder, f"rank-{rank}.log"), f"rank {rank} on {host}: " if rank else "", everything=rank == 0)
    return host


def placed(hosts: list[str]) -> str:
    """Which ranks are where, from the host of each."""
    parts = []
    for host, group in itertools.groupby(enumerate(hosts), key=lambda entry: entry[1]):
        ranks = [rank for rank, _ in group]
        parts.append(f"rank{'s' * (len(ranks) > 1)} {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''} on {host}")
    return ", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")


def told(message: str) -> None:
    """Said in Ray's controller, whose lines come to the driver's log."""
    print(f"{clock()}  {message}", flush=True)


def why_no_gpu() -> str | None:
    """Why torch cannot use the GPU that Ray gave this worker, or None where it can."""
    from pipeline.distributed import gpu_fault

    fault = gpu_fault(1)
    sentence = f"Ray has a GPU for a rank on {socket.gethostname()}, but {fault}; or train without GPUs, with --set engine.device=cpu."
    return sentence if fault else None


def run_rank(settings: dict[str, Any]) -> dict[str, Any]:
    """The train loop of one Ray worker; a restart runs it again, on all ranks, and so does RegroupError, after a save.

    Settings: recipe and overrides (resolved here, because a loss that a recipe file defines cannot be sent), resume, folder (where
    relative paths start), earlier (`checkpoints` when the job began). Returns the last evaluation's figures, or {STOPPED: a sentence}."""
    folder = settings["folder"]
    if not os.path.isdir(folder):
        raise BadInputError(f"Folder {folder} does not exist on {socket.gethostname()}; start from one all hosts share.")
    os.chdir(folder)
    from pipeline.distributed import describe
    from pipeline.resolve import resolve
    from pipeline.stopping import Regrouped, Stopped
    from pipeline.train import train

    try:
        config = resolve(settings["recipe"], settings["overrides"])
        seen_by_all(config.run.folder)
        resume = "auto" if checkpoints(place_of_checkpoints(config)) - settings["earlier"] else settings["resume"]
        return train(config, resume=resume, keep_stop=True)  # which the driver has removed, if it was there before
    except Regrouped as regrouped:
        raise RegroupError(str(regrouped)) from None
    except Stopped as stopped:
        return {STOPPED: str(stopped)}  # an exception would be a failure, after which Ray starts the ranks again
    except ValueError as error:
        sentence = describe(error)  # here, because the traceback, which tells whose error it is, does not pass through Ray
        if sentence is None:
            raise
        raise BadInputError(sentence) from None


def seen_by_all(folder: str) -> None:
    """BadInputError: rank 0 cannot write into the run's folder, or a host does not see it, so that checkpoints would be in pieces.

    Ranks talk through the store of their process group: a collective of NCCL would need the GPU that the trainer has yet to choose."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if "://" in folder or os.environ.get("LOCAL_WORLD_SIZE") == str(ranks):
        return
    store = dist.PrefixStore(f"folder-{next(LOOKS)}", dist.distributed_c10d._get_default_store())
    written = Path(folder, f".seen-{secrets.token_hex(8)}")
    if rank == 0:
        fault = touched(written)
        store.set("written", f"run.folder={folder} cannot be written ({fault}): choose another folder" if fault else written.name)
    name = store.get("written").decode()
    if not name.startswith(".seen-"):
        raise BadInputError(name)
    path, deadline = Path(folder, name), time.monotonic() + SEEN_SECONDS
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    store.set(f"{rank}", "" if seen else socket.gethostname())
    if rank == 0:
        blind = next(filter(None, (store.get(f"{other}").decode() for other in range(ranks))), "")
        sentence = f"does not see what the first host writes into {os.path.abspath(folder)}; give a run.folder that all hosts share."
        store.set("verdict", f"Host {blind} {sentence}" if blind else "")
        with suppress(OSError):
            written.unlink()
    verdict = store.get("verdict").decode()
    if verdict:
        raise BadInputError(verdict)


def touched(path: Path) -> str:
    """Makes an empty file, and the folders above it. Why not, if not."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def place_of_checkpoints(config: Any) -> str:
    """A folder or an address, the same for whoever works in another folder."""
    place = config.checkpoint.folder or os.path.join(config.run.folder, "checkpoints")
    return place if "://" in place else os.path.abspath(place)


def checkpoints(place: str) -> set[tuple[str, int]]:
    """The complete checkpoints of a run. Those that a job has added are where its restarts go on, whatever --resume said: another attempt
    at `none` or PATH would throw them away."""
    from pipeline.checkpoint import marks

    return marks(place)


class RegroupError(RuntimeError):
    """No failure: the ranks have saved, and are to start anew on the hosts that are there now."""


class AskedToStopError(RuntimeError):
    """While the ranks waited for hosts."""


class GivingUpError(RuntimeError):
    """Too many failures, or no place for the ranks. Its text is the sentence for the user."""


class OnFailure(WorkerGroupCallback, ControllerCallback):
    """Lives in Ray Train's controller: says which rank failed first and why, and decides whether the ranks start again. Ray would count
    over the whole life of a job; here both counts begin anew once the run has got on.

    folder      the run's, as the head sees it
    logs        where failures.txt is written
    starts      in a row that may find no place for the ranks
    saved       where the run's checkpoints are, if not in FOLDER/checkpoints"""

    def __init__(self, max_failures: int, folder: str, logs: str = "", starts: int = 10, saved: str = ""):
        self.logs, self.folder, self.starts, self.saved = logs, folder, starts, saved or os.path.join(folder, "checkpoints")
        self.outages = Outages(max_failures, self._progress)
        self.old = {beat.run for beat in read_all(folder)}
        self.is_training, self.is_counted, self.waited = False, False, 0

    def _progress(self) -> object:
        try:
            return checkpoints(self.saved)
        except OSError:  # a store that gives no answer is no progress
            return None

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        if not worker_group_status.errors:
            return
        failure = Failure(worker_group_status.errors, self.folder, self.old)
        self.old |= {beat.run for beat in failure.beats.values()}
        for error in failure.errors.values():
            if isinstance(error, BadInputError):
                self.is_counted = True
                raise error  # a callback's own error is what Ray Train does not retry
            if isinstance(error, RegroupError):
                self.is_counted = True
                return told("the ranks have saved and start anew")
        failure.write(self.logs)
        if failure.is_preemption:
            self.is_counted = True
            told(f"Preemption, which does not count as a failure ({failure.sentence}): restarting from the newest checkpoint.")
        else:
            self._count(failure.sentence)

    def _count(self, sentence: str) -> None:
        may_go_on = self.outages.another()
        self.is_counted = True
        counted = f"Failure {self.outages.count}, {self.outages.allowed} allowed before the next checkpoint ({sentence})"
        if not may_go_on:
            raise GivingUpError(f"{counted}: giving up; the same command continues from the newest checkpoint")
        told(f"{counted}: restarting from the newest checkpoint.")

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """Also for what is no error of a rank: a start for which there is no place, a hang that Ray found."""
        if getattr(failure_decision, "name", "") == "RAISE":  # what has been decided elsewhere, with a sentence of its own
            return
        if self.is_training and not self.is_counted:
            self._count("the ranks stand still in a collective of NCCL, as Ray's hang detector says")
        elif not self.is_counted:
            self.waited += 1
            if self.waited == 1:
                told("waiting for hosts with a place for the ranks")
            if self.waited >= self.starts:
                raise GivingUpError(f"{self.waited} starts in a row found no place for the ranks: giving up; the same command continues")
        self.is_training = self.is_counted = False

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self.is_training, self.waited = True, 0
