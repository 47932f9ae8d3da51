"""`--check` of a running Ray cluster: a job that asks an actor on each node, as check_hosts.py asks each host."""

import argparse
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launch.checking import Check
from launch.following import Client, Log, follow
from launch.job import Task, exit_code, stop, submit
from launch.look import Look
from launch.ray_driver import join
from launch.ray_worker import BadInputError


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
    try:
        join()
    except BadInputError as error:
        print(f"multinode.sh: {error}", file=sys.stderr)
        return 2
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    nodes.sort(key=lambda node: node["NodeManagerHostname"] != socket.gethostname())
    places = [OnNode(node, options.folder, options.ranks_per_node) for node in nodes]
    looking = Check(places)
    looking.look(options.recipe, options.overrides)
    return 2 if looking.report() else 0


def check(client: Client, task: Task) -> int:
    """Runs that job, and prints what it prints. 2 if a cell fails."""
    try:
        submit(client, task)
        return exit_code(follow(client, task.id, Log()))
    except BaseException:
        stop(client, task.id)
        raise


if __name__ == "__main__":
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    sys.exit(main())
