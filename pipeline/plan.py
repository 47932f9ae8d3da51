"""What a classifier will need, before anything of it is allocated: bytes of each rank, the least time of a step, and what to try where it
does not fit. The backbone is not counted: it takes what the classifier leaves."""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from typing import Literal

from partial_fc.device_policy import GPU
from partial_fc.sampling import capacity

Precision = Literal["float32", "bfloat16"]
BYTES = {"float32": 4, "bfloat16": 2}
STATES = {"sgd": 1, "adamw": 2}  # float32 numbers per prototype element
USABLE = 0.9  # of a rank's memory; the rest goes to the CUDA context, the collectives' buffers and fragmentation
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


# Vendors' data sheets: SXM forms, dense products (without sparsity), float32 outside of the tensor cores, as torch computes it unless told
# otherwise, and one direction of the links. V100 has no units for bfloat16.
PRESETS = {
    hardware.name: hardware
    for hardware in (
        Hardware("h100-80gb", 80 * GIB, 67e12, 989e12, 3.35e12, 450e9),
        Hardware("h200", 141 * 10**9, 67e12, 989e12, 4.8e12, 450e9),
        Hardware("a100-80gb", 80 * GIB, 19.5e12, 312e12, 2.04e12, 300e9),
        Hardware("a100-40gb", 40 * GIB, 19.5e12, 312e12, 1.555e12, 300e9),
        Hardware("v100-32gb", 32 * GIB, 15.7e12, 15.7e12, 0.9e12, 150e9),
        Hardware("rtx4090", 24 * GIB, 82.6e12, 165e12, 1.008e12, 32e9),
    )
}


@dataclass(frozen=True)
class Job:
    identities: int
    width: int = 512
    batch: int = 1024  # of all ranks
    ranks: int = 1
    rate: float = 1.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    dtype: Precision = "bfloat16"  # of the products
    storage_dtype: Precision = "float32"  # of the prototypes
    in_backward: bool = False
    bank: bool = False  # of last features, which substitution_source="bank" and some losses keep

    def __post_init__(self) -> None:
        for name in ("identities", "width", "batch", "ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, but must be at least 1")
        if not 0 < self.rate <= 1:
            raise ValueError(f"--rate is {self.rate}, but must be above 0 and at most 1")

    @property
    def rows(self) -> int:
        """Classes of the rank that has the most."""
        return -(-self.identities // self.ranks)

    @property
    def sampled(self) -> float:
        """How many of these classes take part in a step, on average."""
        return self.rows if self.rate == 1 else min(self.rows, self.rows * self.rate + self.batch / self.ranks)


@dataclass(frozen=True)
class Plan:
    job: Job
    hardware: Hardware
    memory: dict[str, int]  # bytes of one rank
    seconds: dict[str, float]  # least time of each part of the hardware
    alternatives: dict[str, int]  # where it does not fit: what to try, and the bytes that this would take

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def left(self) -> int:
        """For backbone, activations and images; negative where the classifier alone does not fit."""
        return round(self.hardware.memory * USABLE) - self.total

    @property
    def bound_by(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__)


def plan(job: Job, hardware: Hardware) -> Plan:
    needed = memory(job)
    fits = sum(needed.values()) <= hardware.memory * USABLE
    return Plan(job, hardware, needed, seconds(job, hardware), {} if fits else alternatives(job, hardware))


def memory(job: Job) -> dict[str, int]:
    """Bytes of the rank with most classes, in the backward pass or the update, whichever takes more."""
    batch, width, rows = job.batch, job.width, job.rows
    held = rows if job.rate == 1 else capacity(rows, job.rate, batch)
    classes = min(held, max(256, GPU.tile_bytes // (batch * BYTES[job.dtype])))
    return {
        "prototypes": rows * width * BYTES[job.storage_dtype],
        "optimizer": rows * width * 4 * STATES[job.optimizer],
        "gradient": 0 if job.in_backward else held * width * BYTES[job.storage_dtype],
        "bank": rows * (width * 4 + 8) if job.bank else 0,
        "sample": 0 if job.rate == 1 else rows * 40 + held * 10,  # the columns of all classes, and what drawing them takes
        "tile": batch * classes * BYTES[job.dtype] + classes * width * (BYTES[job.dtype] + 16),  # logits; unit rows, gradient, two products
        "features": 4 * batch * width * 4,  # gathered, scaled, and two gradients
    }


def seconds(job: Job, hardware: Hardware) -> dict[str, float]:
    """The cost model: a step takes at least the longest of these.

    compute  8 B S D operations: logits, again in backward, and two products with them
    memory   S D stored numbers read in forward and in backward; of the updated rows weight and state read and written, and the gradient
    network  a ring of N ranks sends (N-1)/N of: features and their gradient, float32, labels, two sums per sample
    """
    batch, width = job.batch, job.width
    stored = BYTES[job.storage_dtype]
    update = 2 * stored + 8 * STATES[job.optimizer] + (0 if job.in_backward else 6)
    sent = batch * (8 * width + 24) * (job.ranks - 1) / job.ranks
    return {
        "compute": 8 * batch * job.sampled * width / (hardware.bfloat16 if job.dtype == "bfloat16" else hardware.float32),
        "memory": (2 * stored + update) * job.sampled * width / hardware.memory_rate,
        "network": sent / hardware.network,
    }


def alternatives(job: Job, hardware: Hardware) -> dict[str, int]:
    """What to change, and the bytes of a rank with it; the last one fits, unless the batch alone is too large for any number of ranks."""
    changed: dict[str, Job] = {}
    if not job.in_backward:
        changed["--in-backward"] = replace(job, in_backward=True)
    if job.storage_dtype == "float32":
        changed["--storage-dtype bfloat16"] = replace(job, storage_dtype="bfloat16")
    if job.rate > 0.1 and not job.in_backward:
        changed["--rate 0.1"] = replace(job, rate=0.1)
    if len(changed) > 1:
        both = replace(job, in_backward=True, storage_dtype="bfloat16")
        changed["--in-backward --storage-dtype bfloat16"] = both
    ranks = _ranks_that_fit(job, hardware)
    if ranks:
        changed[f"--ranks {ranks}"] = replace(job, ranks=ranks)
    else:
        changed[f"--batch {max(1, job.batch // 2)}"] = replace(job, batch=max(1, job.batch // 2))
    return {what: sum(memory(other).values()) for what, other in changed.items()}


def _ranks_that_fit(job: Job, hardware: Hardware) -> int | None:
    """The fewest ranks; None where not even one class per rank fits."""

    def fits(ranks: int) -> bool:
        return sum(memory(replace(job, ranks=ranks)).values()) <= hardware.memory * USABLE

    low, high = job.ranks, job.identities
    if not fits(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


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
        return Hardware(f"here ({hardware()})", _available() // sharing, float32, bfloat16, memory_rate, _loopback() / sharing)
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


def as_json(plan: Plan) -> str:
    what = {**asdict(plan), "total": plan.total, "left": plan.left, "fits": plan.left >= 0}
    return json.dumps({**what, "bound_by": plan.bound_by, "step_seconds": plan.seconds[plan.bound_by]}, indent=1)


def as_text(plan: Plan) -> str:
    job, hardware = plan.job, plan.hardware
    usable = hardware.memory * USABLE
    lines = [
        f"{job.identities:,} identities x {job.width}, ranks {job.ranks}, batch {job.batch}, rate {job.rate:g}, {job.optimizer}"
        f"{' in backward' if job.in_backward else ''}, {job.dtype} products, {job.storage_dtype} prototypes; each rank: {hardware.name}",
        "memory of a rank, GiB",
        *(f"  {name:12}{size / GIB:9.3f}" for name, size in plan.memory.items()),
        f"  {'total':12}{plan.total / GIB:9.3f} of {usable / GIB:.1f} usable ({USABLE:.0%} of {hardware.memory / GIB:.1f})",
        "time of a step, at least, ms",
        *(f"  {name:12}{1e3 * value:9.3f}" for name, value in plan.seconds.items()),
        f"  {'step':12}{1e3 * plan.seconds[plan.bound_by]:9.3f} bound by {plan.bound_by}",
    ]
    if plan.left >= 0:
        lines.append(f"It fits and leaves {plan.left / GIB:.1f} GiB of each rank to the backbone and its activations.")
    else:
        lines.append(f"It does not fit: {-plan.left / GIB:.1f} GiB too many on each rank. Try")
        for what, total in plan.alternatives.items():
            lines.append(f"  {what:42}{total / GIB:9.3f} GiB{', which fits' if total <= usable else ', still too many'}")
    return "\n".join(lines)
