"""`--check` of a running Ray cluster: a job that asks an actor on each node, as check_hosts.py asks each host."""

import argparse
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.job_submission import JobSubmissionClient
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launch.checking import Check
from launch.look import Look

POLL_SECONDS = 0.5


class OnNode:
    """A node of Ray whose actor is asked."""

    slots: int | None = None

    def __init__(self, node: dict[str, Any], folder: str, slots: int | None) -> None:
        self.name, self.address, self.slots = node["NodeManagerHostname"], node["NodeManagerAddress"], slots
        placed = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        self.actor: Any = ray.remote(num_cpus=0)(Look).options(scheduling_strategy=placed).remote(folder)
        self.reply: Any = None

    def send(self, what: str, **arguments: Any) -> None:
        self.reply = getattr(self.actor, what).remote(**arguments)

    def answer(self, deadline: float) -> Any:
        try:
            return ray.get(self.reply, timeout=max(0.0, deadline - time.monotonic()))
        except Exception as error:  # Ray raises all kinds
            sentence = str(error).strip().splitlines()[-1]
            raise ValueError(f"Node {self.name} does not answer ({sentence}); look at its Ray logs.") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.check_cluster")
    parser.add_argument("recipe")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--ranks-per-node", type=int)
    parser.add_argument("--folder", required=True)
    options = parser.parse_args(arguments)
    ray.init(logging_level=logging.WARNING)
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    nodes.sort(key=lambda node: node["NodeManagerHostname"] != socket.gethostname())
    places = [OnNode(node, options.folder, options.ranks_per_node) for node in nodes]
    looking = Check(places)
    looking.look(options.recipe, options.overrides)
    return 2 if looking.report() else 0


def check(client: JobSubmissionClient, entrypoint: str, env_vars: dict[str, str]) -> int:
    """Runs that job, and prints what it prints. 2 if a cell fails."""
    job = client.submit_job(entrypoint=entrypoint, runtime_env={"env_vars": env_vars})
    try:
        while not client.get_job_status(job).is_terminal():
            time.sleep(POLL_SECONDS)
    except BaseException:
        client.stop_job(job)
        raise
    lines = client.get_job_logs(job).splitlines()
    print("\n".join(line for line in lines if " -- Runtime env is " not in line and not line.startswith("Running entrypoint ")))
    code = client.get_job_info(job).driver_exit_code
    return 1 if code is None else code


if __name__ == "__main__":
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    sys.exit(main())
