"""What runs inside the Ray job: the recipe under Ray Train, one worker per rank, restarted after a worker dies.
The trainer knows nothing of it: pipeline.train.train sees an initialised process group and a run folder, as under any launcher."""

import argparse
import logging
import math
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import ray
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from dali_loaders.remote import without_secrets
from launch import job_logs
from launch.elastic import ElasticTrainer
from launch.job import OF_JOB
from launch.ranks import Ranks, parse
from launch.ray_worker import (
    STOPPED,
    AskedToStopError,
    BadInputError,
    GivingUpError,
    OnFailure,
    ProcessGroup,
    checkpoints,
    place_of_checkpoints,
    run_rank,
    told,
)
from pipeline import stopping

NODE_WAITS = 10  # minutes that a start or restart waits for processors before the job gives up
DEFAULT_RANKS_ON_CPU = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code of the job: 0 done, 1 failed, 2 bad input (one sentence, never retried), 75 stopped on request, after a save."""
    options = parser().parse_args(arguments)
    with ExitStack() as kept:
        return run(options, kept)


def run(options: argparse.Namespace, kept: ExitStack) -> int:
    """kept: takes what keeps the log, so that it has the last line too"""
    try:
        figures = fit(options, kept)
    except BadInputError as error:
        print(f"multinode.sh: {error}", file=sys.stderr, flush=True)
        return 2
    except AskedToStopError as error:
        print(f"multinode.sh: {error}", flush=True)
        return stopping.STOPPED
    except (GivingUpError, TrainingFailedError) as error:
        print(f"multinode.sh: {error}", file=sys.stderr, flush=True)
        return 1
    if STOPPED in figures:
        print(f"multinode.sh: {figures[STOPPED]}", flush=True)
        return stopping.STOPPED
    print("finished" + "".join(f", {name} {value:.4g}" for name, value in figures.items()), flush=True)
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.ray_driver", description="The job that multinode.sh submits.")
    parser.add_argument("recipe")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--resume", default="auto")
    parser.add_argument("--ranks-per-node", type=int)
    parser.add_argument("--ranks")
    parser.add_argument("--max-failures", type=int, default=3)
    parser.add_argument("--folder", required=True, help="where relative paths start, on every node")
    parser.add_argument("--own-cluster", action="store_true", help="which ends with this job")
    return parser


def fit(options: argparse.Namespace, kept: ExitStack) -> dict[str, Any]:
    """Runs the recipe to its end and returns the last evaluation's figures."""
    if not os.path.isdir(options.folder):
        raise BadInputError(f"Folder {options.folder} does not exist on {socket.gethostname()}; start from one all hosts share.")
    os.chdir(options.folder)
    from pipeline import uneven_batches
    from pipeline.resolve import resolve

    try:
        config = resolve(options.recipe, options.overrides)
        check_run_folder(config, options.resume)
        remove_stop_file(config.run.folder)
    except ValueError as error:
        raise BadInputError(str(error)) from None
    named = {} if os.environ.get(OF_JOB) else {OF_JOB: f"protoshard-{secrets.token_hex(4)}"}  # multinode.sh has not submitted it
    os.environ.update(named)
    logs = job_logs.begin(config.run.folder, os.environ[OF_JOB])
    kept.enter_context(job_logs.kept(os.path.join(logs, "driver.log")))
    told(f"logs of all ranks: {logs}; tensorboard --logdir {os.path.abspath(config.run.folder)}/tensorboard")
    join(named)
    nodes = computing_nodes([node for node in ray.nodes() if node["Alive"]], config.engine.device)
    places, resources = layout(nodes, options.ranks_per_node)
    gpu = " and a GPU" if "GPU" in resources else ""
    try:
        ranks = chosen(options.ranks, places, gpu)
        uneven_batches.check(config, ranks.most)
    except ValueError as error:
        raise BadInputError(str(error)) from None
    if gpu:
        detect_hangs(60 * config.run.timeout)
    processors = "1 processor" if resources["CPU"] == 1 else f"{resources['CPU']:g} processors"
    told(f"{options.recipe} on {ranks} ranks, each with {processors}{gpu}")
    try:
        earlier = checkpoints(place_of_checkpoints(config))
    except OSError as error:
        raise BadInputError(f"checkpoint.folder={without_secrets(config.checkpoint.folder)} gives no answer ({error}); see to it") from None
    storage = storage_folder(config.run.folder, logs)
    callbacks: list[Any] = [
        OnFailure(options.max_failures, os.path.abspath(config.run.folder), logs, NODE_WAITS, place_of_checkpoints(config))
    ]  # more than a UserCallback, which alone is typed
    trainer = ElasticTrainer(
        run_rank,
        ranks=ranks,
        folder=config.run.folder,
        own_cluster=options.own_cluster,
        train_loop_config={
            "recipe": options.recipe,
            "overrides": options.overrides,
            "resume": options.resume,
            "folder": options.folder,
            "earlier": earlier,
        },
        torch_config=ProcessGroup(timeout_s=math.ceil(60 * config.run.timeout), logs=logs),
        scaling_config=ScalingConfig(
            num_workers=(ranks.least, ranks.most) if ranks.is_elastic else ranks.most,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
            placement_strategy=strategy(nodes, places, resources),
        ),
        run_config=RunConfig(
            storage_path=storage,
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=-1, max_preemption_failures=-1),  # OnFailure decides
            callbacks=callbacks,
            logging_config=LoggingConfig(log_level="CRITICAL"),  # OnFailure says in one line what Ray logs as three tracebacks
        ),
    )
    try:
        result: Any = trainer.fit()  # typed as the result of V1, which has no return_value
    except ControllerError as error:
        if isinstance(error.controller_failure, BadInputError | GivingUpError | AskedToStopError):
            raise error.controller_failure from None
        raise
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    return result.return_value or {}


def check_run_folder(config: Any, resume: str) -> None:
    """BadInputError: the trainer would refuse the run's folder, in which logs and the job's other files come first."""
    from pipeline import run_folder

    try:
        fault = run_folder.fault(config, resume)
    except OSError as error:
        fault = f"run.folder={config.run.folder} cannot be read ({error.strerror or error}): choose another folder"
    if fault:
        raise BadInputError(fault)


def join(variables: Mapping[str, str] | None = None) -> None:
    """Joins the cluster in whose job this runs; its workers get `variables` too, which are none of the job's. BadInputError: this Python
    has another version than it.

    Its address goes on to the actors of Ray Train: without it those that watch over others look for a cluster on their host, where they may
    find two, or the wrong one."""
    address = os.environ.get("RAY_ADDRESS")
    of_workers = {**(variables or {}), **({"RAY_ADDRESS": address} if address else {})}
    try:
        ray.init(logging_level=logging.WARNING, runtime_env={"env_vars": of_workers} if of_workers else None)
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        sentence = " ".join(str(error).split()).rstrip(".")
        raise BadInputError(f"{sentence}; start the cluster's nodes from the .venv of this checkout.") from None


def detect_hangs(seconds: float) -> None:
    """Lets Ray Train ask NCCL's own watch (RAS) whether a collective stands still, and restart the ranks where it does for `seconds`. The
    trainer waits as long, since one rank may keep the others waiting for a good reason. Read when Ray's trainer is made."""
    os.environ.setdefault("RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR", "1")
    os.environ.setdefault("RAY_TRAIN_NCCL_RAS_ACTION", "fail")
    os.environ.setdefault("RAY_TRAIN_NCCL_RAS_CONFIRM_DURATION_S", f"{seconds:g}")


def remove_stop_file(folder: str) -> None:
    """One from before this job, whose restarts must not remove one that asks this job."""
    try:
        with open(os.path.join(folder, stopping.FILE), encoding="utf-8", errors="replace") as file:
            asks_this = file.read(100).strip() == os.environ.get(OF_JOB)
    except OSError:
        asks_this = False
    stopping.Stop().watch(folder, rank=0, keep=asks_this)


def storage_folder(run_folder: str, logs: str) -> str:
    """A new folder among the job's logs, which are removed some day if this process is killed. Ray wants one that all nodes see; nothing of
    value is in it."""
    try:
        os.makedirs(logs, mode=0o700, exist_ok=True)
        return tempfile.mkdtemp(prefix="storage-", dir=logs)
    except OSError as error:
        raise BadInputError(f"run.folder={run_folder} cannot be written ({error.strerror}): choose another folder") from None


def computing_nodes(nodes: list[dict[str, Any]], device: str) -> list[dict[str, float]]:
    """Resources of the nodes that take part in a run on `device` (engine.device), of the entries of `ray.nodes()`: those with GPUs where
    there are any, else all that have processors. BadInputError: there is none, or a host with slots lacks the GPUs that others have."""
    nodes = [node for node in nodes if node["Resources"].get("CPU", 0) > 0]
    if not nodes:
        raise BadInputError("The Ray cluster has no node with processors; start its nodes without --num-cpus=0.")
    with_gpu = [node for node in nodes if device != "cpu" and node["Resources"].get("GPU", 0) >= 1]
    without = [node for node in nodes if node not in with_gpu]
    names = ", ".join(sorted({node["NodeManagerHostname"] for node in without}))
    if not with_gpu:
        if device == "cuda":
            raise BadInputError(
                f"engine.device is cuda, but Ray sees no GPU on {names}; look at nvidia-smi and CUDA_VISIBLE_DEVICES there, or train "
                "without GPUs, with --set engine.device=cpu."
            )
        return [{name: value for name, value in node["Resources"].items() if name != "GPU"} for node in nodes]
    if without:
        if any("rank_slots" in node["Resources"] for node in without):
            raise BadInputError(f"Ray sees GPUs on some hosts, but none on {names}; look at nvidia-smi there, or leave these hosts out.")
        print(f"without a GPU, so without a rank: {names}", flush=True)
    return [node["Resources"] for node in with_gpu]


def chosen(text: str | None, places: int, gpu: str) -> Ranks:
    """The ranks of a job by its --ranks; without it as many as have a place. ValueError: there are fewer places now."""
    if text is None:
        return Ranks(places, places)
    ranks = parse(text)
    if ranks.least > places:
        what = "each with a GPU of its own" if gpu else "each with its share of the processors (slots=N, --ranks-per-node)"
        raise ValueError(f"--ranks {ranks}: the cluster has a place for {places} rank{'s' * (places > 1)}, {what}; lower it, or add nodes.")
    return ranks


def layout(nodes: list[dict[str, float]], ranks_per_node: int | None) -> tuple[int, dict[str, float]]:
    """Number of ranks and what each reserves, from the resources of the nodes that take part: all with GPUs, or none.

    Ranks on a node: its `rank_slots` if the launcher set them, else `ranks_per_node`, else its GPUs, else 2. The reservation divides a
    node's processors evenly, so that none of equal nodes can take more."""
    slots = [int(node.get("rank_slots") or ranks_per_node or node.get("GPU") or DEFAULT_RANKS_ON_CPU) for node in nodes]
    resources = {"CPU": min(math.floor(node["CPU"] / count * 1e4) / 1e4 for node, count in zip(nodes, slots, strict=True))}
    if "GPU" in nodes[0]:
        resources["GPU"] = 1
        for node, count in zip(nodes, slots, strict=True):
            if node["GPU"] < count:
                raise BadInputError(f"{count} ranks per node need {count} GPUs, but a node has {node['GPU']:.0f}; lower --ranks-per-node.")
    if all("rank_slots" in node for node in nodes):
        resources["rank_slots"] = 1
    return sum(slots), resources


def strategy(nodes: list[dict[str, float]], places: int, resources: dict[str, float]) -> str:
    """How Ray places the ranks: on as few nodes as can be, unless a larger node could take some that are meant for another one."""
    most = sum(min(math.floor(node[name] / share + 1e-6) for name, share in resources.items()) for node in nodes)
    return "SPREAD" if most > places else "PACK"


if __name__ == "__main__":
    sys.exit(main())
