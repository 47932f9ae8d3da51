"""What is measured of a step and a machine: seconds, memory at its peak, bytes sent, the rate of matrix products, the hardware's name.
plan.py and the benchmarks both read these meters, so they stand below both."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], object]


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def seconds(step: Step, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def peak_memory(step: Step, device: torch.device) -> tuple[int, int]:
    """(bytes above the level before the step, bytes in all), at the step's peak.

    On CPU this is resident memory of the process. Free pages are handed back first, so that the step must take what it needs from the
    system. On a GPU it is what torch allocated.
    """
    gc.collect()
    _wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        _wait(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets VmHWM, the highest resident size, to the present one
        before = _status("VmRSS")
        step()
        peak = _status("VmHWM")
    return max(0, peak - before), peak


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name + ":"))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class MatrixRate:
    """Operations per second of the products [B, D] x [D, n] (twice: forward, and again in backward), [B, n] x [n, D] and [n, B] x [B, D]
    of one tile of n classes, on operands in `dtype` that stay in cache as far as they fit: the 8 B n D operations of a classifier step."""

    def __init__(self, batch: int, classes: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        # A GPU needs more than one CPU tile to fill its units, and to hide the launches.
        n = min(classes, 65536 if device.type == "cuda" else 4096)
        self.device, self.operations = device, 8 * batch * n * width
        x_BD, w_nD = (torch.randn(rows, width, device=device).to(dtype) for rows in (batch, n))
        tile_Bn, grad_BD, grad_nD = x_BD @ w_nD.T, torch.empty_like(x_BD), torch.empty_like(w_nD)
        self.products: list[tuple[Tensor, Tensor, Tensor]] = [
            (x_BD, w_nD.T, tile_Bn),
            (x_BD, w_nD.T, tile_Bn),
            (tile_Bn, w_nD, grad_BD),
            (tile_Bn.T, x_BD, grad_nD),
        ]
        self.passes = 1
        self.passes = max(1, math.ceil(0.1 / min(seconds(self._run, device) for _ in range(3))))

    def _run(self) -> None:
        for _ in range(self.passes):
            for left, right, out in self.products:
                torch.mm(left, right, out=out)

    def measure(self) -> float:
        """Takes about 0.1 s."""
        return self.passes * self.operations / seconds(self._run, self.device)


class Traffic(TorchDispatchMode):
    """While active, counts this process's collectives and the bytes that a rank sends for them on a ring of N ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name, ranks = func._schema.name.removeprefix("c10d::"), dist.get_world_size()
            position, share = _SENT[name]
            self.calls[name.strip("_").removesuffix("_base").replace("_", "")] += 1
            self.sent += round(share(ranks) * _bytes(args[position]))
        return func(*args, **(kwargs or {}))


# Which argument is counted, and how often a rank sends it. One reduce to each rank in turn costs a rank what a reduce-scatter does.
_SENT: dict[str, tuple[int, Callable[[int], float]]] = {
    "allgather_": (1, lambda ranks: ranks - 1),
    "_allgather_base_": (1, lambda ranks: ranks - 1),
    "_reduce_scatter_base_": (1, lambda ranks: (ranks - 1) / ranks),
    "allreduce_": (0, lambda ranks: 2 * (ranks - 1) / ranks),
    "reduce_": (0, lambda ranks: (ranks - 1) / ranks),
}


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)
