"""With how many ranks Ray Train starts, and when ranks are asked to save and start anew: hosts that were lost, that came back, or that a
scheduler wants back. It runs in Ray Train's controller, on the host of the job's driver."""

from __future__ import annotations

import math
import os
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import ray
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision, ScalingPolicy
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.torch.torch_trainer import TorchTrainer

from launch.ranks import Ranks
from launch.ray_worker import AskedToStopError, GivingUpError, told
from pipeline import stopping

NODE_WAIT = 600.0  # seconds that a start or restart waits for hosts with a place for the ranks
LOOK = 2.0  # seconds between two looks at the cluster
ASK_AGAIN = 10.0  # seconds until ranks that do not react are asked again: those that just start remove what earlier ones were asked
STEADY = 6.0  # seconds that a host must be there before ranks start anew for it
ANSWER = 2.0  # seconds for a node to take a connection


class ElasticTrainer(TorchTrainer):
    """TorchTrainer with `Places` in place of Ray's own policies: its fixed one waits for hosts that may never return, and its elastic one
    looks at the cluster every 20 s, ends ranks without a save when hosts come, and counts those that were cut off.

    own_cluster  it has this one job and no autoscaler, and ends with it"""

    def __init__(self, *arguments: Any, ranks: Ranks, folder: str, own_cluster: bool = False, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._ranks, self._folder, self._own_cluster = ranks, folder, own_cluster

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        config: Any = self.scaling_config  # typed as that of V1
        options["scaling_policy"] = Places(config, self._ranks, os.path.abspath(self._folder), autoscaled=not self._own_cluster)
        return super()._initialize_and_run_controller(**options)

    def _create_default_callbacks(self) -> list[Any]:
        """Without those whose actors would do nothing here: each takes two seconds of a processor at the start and a hundredth of it after.
        Datasets of Ray are not used, and what the end of a cluster removes needs no cleaner."""
        idle = (DatasetsCallback, PlacementGroupCleanerCallback) if self._own_cluster else DatasetsCallback
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, idle)]


class Places(ScalingPolicy):
    """As many ranks as have a place, between `ranks.least` and `ranks.most`; fewer than that wait for hosts.

    folder      the run's, where a file asks the ranks to save and start anew
    autoscaled  whether the cluster may have an autoscaler, which is told what the ranks need"""

    def __init__(self, scaling_config: ScalingConfig, ranks: Ranks, folder: str, wait: float = NODE_WAIT, autoscaled: bool = True) -> None:
        super().__init__(scaling_config)
        self.ranks, self.folder, self.wait, self.autoscaled = ranks, folder, wait, autoscaled
        self.has_run = True  # since the last decision; if not, the places it counted were those of other jobs
        self.of_others: dict[str, int] = {}  # places by node that other jobs held when these ranks ran last
        self.asked = -math.inf
        self.waits_since: float | None = None
        self.more_since: float | None = None
        self.looked = -math.inf

    def _get_num_workers_for_resource_request(self) -> int:
        return self.ranks.most

    def after_controller_start(self, train_run_context: Any) -> None:
        if self.autoscaled:
            super().after_controller_start(train_run_context)

    def _maybe_send_resource_request(self) -> None:
        if self.autoscaled:
            super()._maybe_send_resource_request()

    @property
    def _each(self) -> dict[str, float]:
        return self.scaling_config._resources_per_worker_not_none

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._maybe_send_resource_request()
        nodes = reached(usable(ray.nodes(), draining()))
        if self.has_run:  # what ranks that have just ended held may not be free yet
            found = {node: count - self.of_others.get(node, 0) for node, count in places(nodes, self._each).items()}
        else:
            found = places(nodes, self._each, available())
        count = min(self.ranks.most, sum(found.values()))
        if count < self.ranks.least:
            self._wait(count)
            return NoopDecision()
        self.waits_since, self.has_run, self.asked, self.more_since = None, False, -math.inf, None
        if count < self.ranks.most:
            told(f"there is a place for {count} of at most {self.ranks.most} ranks")
        return ResizeDecision(num_workers=count, resources_per_worker=self._each)

    def _wait(self, count: int) -> None:
        """Says so, and gives up in the end."""
        self.has_run = False  # what it held is free by the next look
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self.folder, stopping.FILE))
            raise AskedToStopError("stopped while the ranks waited for hosts: the same command continues from the newest checkpoint")
        now, gone = time.monotonic(), lost(ray.nodes())
        without = f"; without {', '.join(gone)}" if gone else ""
        if self.waits_since is None:
            self.waits_since = now
            told(f"waiting up to {self.wait / 60:g} min for hosts: there is a place for {count} of {self.ranks.least} ranks{without}")
        if now - self.waits_since > self.wait:
            fewer = f", or go on with fewer, with --ranks {count}" if count else ""
            raise GivingUpError(
                f"there is a place for {count} of {self.ranks.least} ranks{without}, and no host came in {self.wait / 60:g} minutes: the "
                f"same command continues from the newest checkpoint when it is back{fewer}"
            )
        time.sleep(1.0)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> ScalingDecision:
        """Never ends ranks that run: it asks them to save, after which they end by themselves."""
        self._maybe_send_resource_request()
        self.has_run, now = True, time.monotonic()
        if now - self.looked >= LOOK:
            self.looked = now
            self._look(worker_group_state, now)
        return NoopDecision()

    def _look(self, worker_group_state: Any, now: float) -> None:
        leaving, nodes = draining(), ray.nodes()
        mine = Counter(worker.metadata.node_id for worker in worker_group_state.workers)
        taken = sorted({node["NodeManagerHostname"] for node in nodes if node["NodeID"] in mine.keys() & leaving})
        alive = usable(nodes, set())
        free = places(alive, self._each, available())
        self.of_others = {node: max(0, count - mine[node] - free[node]) for node, count in places(alive, self._each).items()}
        if os.path.lexists(self._file) or now - self.asked < ASK_AGAIN:
            return
        if taken:
            return self._ask(f"{', '.join(taken)} is to be taken away", now)
        count = worker_group_state.num_workers
        room = [node for node in usable(nodes, leaving) if free[node["NodeID"]] > 0] if count < self.ranks.most else []
        if not reached(room):
            self.more_since = None
        elif self.more_since is None:
            self.more_since = now
        elif now - self.more_since >= STEADY:
            self._ask(f"there is a place for more ranks than {count}", now)

    @property
    def _file(self) -> str:
        """The ranks look for it at the end of each step."""
        return os.path.join(self.folder, stopping.REGROUP)

    def _ask(self, why: str, now: float) -> None:
        told(f"{why}: the ranks save and start anew")
        self.asked = now
        try:
            with open(self._file, "w", encoding="utf-8") as file:
                file.write(f"{why}\n")
        except OSError as error:
            told(f"the ranks cannot be asked ({error.strerror}): {self.folder} cannot be written")


def available() -> dict[str, dict[str, float]]:
    """What nobody has reserved, by node."""
    return ray._private.state.state.available_resources_per_node()


def draining() -> set[str]:
    """Nodes that Ray was told will be taken away."""
    return set(ray._private.state.state.get_draining_nodes())


def usable(nodes: list[dict[str, Any]], leaving: set[str]) -> list[dict[str, Any]]:
    return [node for node in nodes if node["Alive"] and node["NodeID"] not in leaving]


def lost(nodes: list[dict[str, Any]]) -> list[str]:
    """Names of hosts that were in the cluster and are not."""
    here = {node["NodeManagerHostname"] for node in nodes if node["Alive"]}
    return sorted({node["NodeManagerHostname"] for node in nodes if not node["Alive"]} - here)


def places(nodes: list[dict[str, Any]], each: dict[str, float], free: dict[str, dict[str, float]] | None = None) -> dict[str, int]:
    """Ranks for which every node has a place, by what a rank reserves; with `free` (by node), by what nobody else has reserved."""
    has = {node["NodeID"]: node["Resources"] if free is None else free.get(node["NodeID"], {}) for node in nodes}
    return {
        node: min((math.floor(resources.get(name, 0.0) / share + 1e-6) for name, share in each.items() if share > 0), default=0)
        for node, resources in has.items()
    }


def reached(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that answer now. Ray takes about ten seconds to give up a host that is cut off, and would place ranks on it until then."""
    if not nodes:
        return []
    with ThreadPoolExecutor(len(nodes)) as pool:
        answers = list(pool.map(answers_at, [(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in nodes]))
    return [node for node, answer in zip(nodes, answers, strict=True) if answer]


def answers_at(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=ANSWER).close()
    except OSError:
        return False
    return True
