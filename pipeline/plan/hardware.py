"""What one rank runs on: presets from data sheets, or this machine, measured in a few seconds."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass, replace

from pipeline.plan.job import Job

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """What one rank has. The rates are peaks, so times computed from them are the least possible; good matrix products reach two thirds
    of the rate."""

    name: str
    memory: int  # bytes
    float32: float  # operations per second of matrix products
    bfloat16: float
    memory_rate: float  # bytes per second
    network: float  # bytes per second that a rank sends; inside one machine for the presets
    is_gpu: bool = True
    remark: str = ""

    @property
    def has_bfloat16(self) -> bool:
        """Units of its own for it; emulated products are no faster than those in float32."""
        return self.bfloat16 > self.float32


# Vendors' data sheets: SXM forms, dense products (without sparsity), float32 outside of the tensor cores, as torch computes it unless told
# otherwise, and one direction of the links.
PRESETS = {
    hardware.name: hardware
    for hardware in (
        Hardware("h100-80gb", 80 * GIB, 67e12, 989e12, 3.35e12, 450e9),
        Hardware("h200", 141 * 10**9, 67e12, 989e12, 4.8e12, 450e9),
        Hardware("a100-80gb", 80 * GIB, 19.5e12, 312e12, 2.04e12, 300e9),
        Hardware("a100-40gb", 40 * GIB, 19.5e12, 312e12, 1.555e12, 300e9),
        Hardware(
            "v100-32gb",
            32 * GIB,
            15.7e12,
            15.7e12,
            0.9e12,
            150e9,
            remark="A V100 runs only with builds for CUDA 12.6, as the pinned torch has no kernels for it (docs/dependencies.md), and in "
            "float32, or the backbone in float16 (--precision float16): bfloat16 is emulated.",
        ),
        Hardware("rtx4090", 24 * GIB, 82.6e12, 165e12, 1.008e12, 32e9),
    )
}


def find_hardware(name: str, job: Job, network: float | None = None) -> Hardware:
    """A preset by name, or "here": this machine, measured in a few seconds. `network` replaces its rate, in bytes per second."""
    if name != "here" and name not in PRESETS:
        raise ValueError(f"--hardware {name!r} is unknown: choose here, or one of {', '.join(PRESETS)}")
    if network is not None and network <= 0:
        raise ValueError(f"--network is {network / 1e9:g} GB/s, but must be positive")
    hardware = _measured(job) if name == "here" else PRESETS[name]
    return hardware if network is None else replace(hardware, network=network)


def _measured(job: Job) -> Hardware:
    """A rank's share of this machine. Without a GPU the ranks divide its cores and memory."""
    import torch

    from pipeline.measuring import MatrixRate, hardware, seconds

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    sharing = 1 if on_gpu else job.ranks
    classes, batch = min(job.rows, 1 << 16), min(job.batch, 1024)  # large enough for the full rate, small enough to fit
    float32, bfloat16 = (MatrixRate(batch, classes, job.width, dtype, device).measure() for dtype in (torch.float32, torch.bfloat16))
    float32, bfloat16 = float32 / sharing, bfloat16 / sharing
    source = torch.ones(1 << 26, device=device)  # 256 MB: no cache holds it
    target = torch.empty_like(source)
    copying = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    memory_rate = 2 * source.nbytes / copying / sharing
    if not on_gpu:
        network = _loopback() / sharing
        return Hardware(f"here ({hardware()})", _available() // sharing, float32, bfloat16, memory_rate, network, is_gpu=False)
    if torch.cuda.device_count() < 2:
        network = PRESETS["h100-80gb"].network  # cannot be measured with one GPU
    else:
        other = torch.empty_like(source, device="cuda:1")
        network = source.nbytes / min(seconds(lambda: other.copy_(source), device) for _ in range(5))
    return Hardware(f"here ({hardware()})", torch.cuda.get_device_properties(device).total_memory, float32, bfloat16, memory_rate, network)


def _available() -> int:
    """Bytes of main memory that programs can still take."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))


def _loopback(size: int = 1 << 27) -> float:
    """Bytes per second between two threads over a local socket, which is what gloo's ranks on one machine use."""
    sender, receiver = socket.socketpair()
    block = bytearray(1 << 20)

    def receive() -> None:
        received = 0
        while received < size:
            received += receiver.recv_into(block)

    with sender, receiver:
        thread = threading.Thread(target=receive)
        start = time.perf_counter()
        thread.start()
        for _ in range(size // len(block)):
            sender.sendall(bytes(len(block)))
        thread.join()
        return size / (time.perf_counter() - start)
