"""Process groups for tests: N gloo ranks on this machine, started once per size and reused by every test that asks for them.
A call that takes too long kills these processes, and no others."""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size), OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        function, arguments = connection.recv()
        try:
            connection.send((True, function(*arguments)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class Ranks:
    """`run(function, *arguments)` calls a module-level function on every rank and returns the results in rank order."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory(prefix="protoshard-ranks-")
        self.connections, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, os.path.join(self.folder.name, "store"), theirs), daemon=True)
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
        for connection in self.connections:
            connection.send((function, arguments))
        deadline = time.monotonic() + timeout
        results: dict[int, Any] = {}
        while len(results) < self.size:
            waiting = [connection for rank, connection in enumerate(self.connections) if rank not in results]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                self.kill()
                raise TimeoutError(
                    f"ranks {sorted(set(range(self.size)) - set(results))} gave no result of {function.__name__} in {timeout} s"
                )
            for connection in ready:
                rank = self.connections.index(connection)
                ok, results[rank] = connection.recv()
                if not ok:
                    self.kill()  # the other ranks may be waiting for this one in a collective
                    raise AssertionError(f"rank {rank} of {self.size} failed:\n{results[rank]}")
        return [results[rank] for rank in range(self.size)]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


class Pools:
    """`pools(n)`: n ranks, started where there are none. `long`: whether the long forms of tests run."""

    def __init__(self, long: bool) -> None:
        self.long = long
        self._pools: dict[int, Ranks] = {}

    def __call__(self, size: int) -> Ranks:
        if size not in self._pools or not self._pools[size].alive:
            self._pools[size] = Ranks(size)
        return self._pools[size]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.kill()
