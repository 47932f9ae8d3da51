"""A step of PartialFC against the eager baseline: both in one process group, in turn; every pair of steps gives one ratio."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from benchmarks.eager import EagerClassifier
from benchmarks.record import quartiles, spread
from partial_fc import PartialFC, RowSGD, losses
from partial_fc.buffer_pool import BufferPool
from pipeline.measuring import MatrixRate, Traffic, peak_memory, seconds

SCALE, MARGIN = 64.0, 0.4
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
Allocator = Literal["default", "keeping"]
ALLOCATORS: tuple[Allocator, ...] = get_args(Allocator)
# glibc's malloc maps large blocks again at every allocation, and the system clears their pages: that is much of the eager side's time.
# Switching off its caches of small blocks lets freed neighbours merge, which the leftovers of aligned blocks otherwise prevent.
KEEPING = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.tcache_count=0"


@dataclass(frozen=True)
class Setting:
    classes: int = 200_000
    batch: int = 512  # of all ranks
    width: int = 512
    rate: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of PartialFC; the eager side is always float32
    ranks: int = 1
    threads: int = 1  # of each rank
    pairs: int = 7
    step: bool = False  # SGD with momentum on both sides, beside forward and backward
    in_backward: bool = False
    skip_eager: bool = False
    allocator: Allocator = "default"  # malloc on CPU: glibc's own, or told to keep its memory

    def __post_init__(self) -> None:
        for name in ("classes", "batch", "width", "ranks", "threads", "pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, but must be at least 1")
        if not 0 < self.rate <= 1:
            raise ValueError(f"--rate is {self.rate}, but must be above 0 and at most 1")
        if self.batch % self.ranks:
            raise ValueError(f"--batch is {self.batch}, which {self.ranks} ranks cannot share equally: give a multiple of {self.ranks}")
        if self.in_backward and not self.step:
            raise ValueError("--in-backward updates prototypes, so that it needs the optimizer step: leave out --no-step")


def rows(settings: list[Setting], allocators: Sequence[Allocator]) -> Iterator[dict[str, Any]]:
    """One row of figures per setting and allocator, each measured in new processes."""
    if torch.cuda.is_available():
        if any(setting.ranks > torch.cuda.device_count() for setting in settings):
            raise ValueError(f"--ranks asks for one GPU each, but there are {torch.cuda.device_count()}: use at most that many")
        allocators = ["default"]  # torch's own allocator on a GPU
    for setting in settings:
        for allocator in allocators:
            yield measure(replace(setting, allocator=allocator))


def measure(setting: Setting) -> dict[str, Any]:
    tunables = os.environ.get("GLIBC_TUNABLES")
    if setting.allocator == "keeping":
        os.environ["GLIBC_TUNABLES"] = KEEPING  # read when a process starts
    try:
        logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # which tells of each rank that it ends after a failure
        results = mp.get_context("spawn").SimpleQueue()
        with tempfile.TemporaryDirectory(prefix="protoshard-bench-") as folder:
            mp.spawn(_rank, (setting, os.path.join(folder, "store"), results), nprocs=setting.ranks)
        return results.get()
    except mp.ProcessRaisedException as error:
        if "allocate memory" in str(error) or "out of memory" in str(error):
            raise ValueError("a rank has no memory for that: try --skip-eager, or fewer --classes") from None
        raise
    except mp.ProcessExitedException as error:
        end = error.signal_name or f"exit code {error.exit_code}"
        raise ValueError(f"rank {error.error_index} ended with {end} (out of memory?): try --skip-eager, or fewer --classes") from None
    finally:
        os.environ.pop("GLIBC_TUNABLES", None)
        if tunables is not None:
            os.environ["GLIBC_TUNABLES"] = tunables


def _rank(rank: int, setting: Setting, store: str, results: Any) -> None:
    mp._prctl_pr_set_pdeathsig(signal.SIGTERM)  # type: ignore[attr-defined]
    torch.set_num_threads(setting.threads)
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if setting.ranks > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{store}", rank=rank, world_size=setting.ranks
        )
    figures = _figures(setting, rank, device)
    if rank == 0:
        results.put(figures)
    if setting.ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


class Side:
    """A classifier, its optimizer if that belongs to the step, and this rank's part of one batch."""

    def __init__(self, classifier: nn.Module, optimizer: torch.optim.Optimizer | None, features_bD: Tensor, labels_b: Tensor) -> None:
        self.classifier, self.optimizer, self.labels_b = classifier, optimizer, labels_b
        self.features_bD = features_bD.clone().requires_grad_()

    def step(self) -> Tensor:
        loss = self.classifier(self.features_bD, self.labels_b)
        loss.backward()
        if self.optimizer:
            self.optimizer.step()
        return loss.detach()

    def clear(self) -> None:
        self.classifier.zero_grad(set_to_none=True)
        self.features_bD.grad = None

    def state_bytes(self) -> int:
        state = [value for values in self.optimizer.state.values() for value in values.values()] if self.optimizer else []
        return sum(x.numel() * x.element_size() for x in [*self.classifier.parameters(), *state] if isinstance(x, Tensor))


def _batch(setting: Setting) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(setting.batch, setting.width, generator=generator),
        torch.randint(0, setting.classes, (setting.batch,), generator=generator),
    )


def _ours(setting: Setting, device: torch.device, group: dist.ProcessGroup | None = None) -> PartialFC:
    loss = losses.build("cosface", scale=SCALE, margin=MARGIN)
    return PartialFC(setting.classes, setting.width, loss, setting.rate, dtype=setting.dtype, group=group, device=device)


def _sides(setting: Setting, rank: int, device: torch.device) -> dict[str, Side]:
    features_bD, labels_b = (x.chunk(setting.ranks)[rank].to(device) for x in _batch(setting))
    classifier = _ours(setting, device)
    lr = 0.1 * setting.batch / 1024  # the usual rate for faces
    sides = {}
    if not setting.skip_eager:
        eager = EagerClassifier(classifier.shard, classifier.prototypes.detach().clone(), SCALE, MARGIN, setting.rate)
        sgd = torch.optim.SGD(eager.parameters(), lr, MOMENTUM, weight_decay=WEIGHT_DECAY) if setting.step else None
        sides["eager"] = Side(eager, sgd, features_bD, labels_b)
    row_sgd = RowSGD(classifier, lr, MOMENTUM, WEIGHT_DECAY, in_backward=setting.in_backward) if setting.step else None
    sides["ours"] = Side(classifier, row_sgd, features_bD, labels_b)
    return sides


def _figures(setting: Setting, rank: int, device: torch.device) -> dict[str, Any]:
    sides = _sides(setting, rank, device)
    figures: dict[str, Any] = dict(vars(setting))
    for name in ("eager", "ours"):
        figures |= _first_steps(name, sides.get(name), device)
    figures["one_rank_deviation"] = _deviation_from_one_rank(setting, figures["ours_loss"], rank, device)

    rate = MatrixRate(setting.batch, -(-setting.classes // setting.ranks), setting.width, getattr(torch, setting.dtype), device)
    times: dict[str, list[float]] = {"eager": [], "ours": []}
    rates = []
    for _ in range(setting.pairs):
        for name, side in sides.items():
            before = _over_ranks(min, rate.measure()) if name == "ours" else 0.0
            times[name].append(_over_ranks(max, seconds(side.step, device)))
            side.clear()
        # Virtual machines change their speed within seconds, so a step is compared with the rate just before and just after it.
        rates.append((before + _over_ranks(min, rate.measure())) / 2)
    for name, values in times.items():
        figures |= quartiles(f"{name}_s", values)
    figures |= quartiles("eager_over_ours", [eager / ours for eager, ours in zip(times["eager"], times["ours"], strict=False)])
    figures["memory_share"] = None if setting.skip_eager else round(figures["ours_extra_mib"] / figures["eager_extra_mib"], 3)
    figures["ours_ns_per_class"] = round(1e9 * figures["ours_s"] / setting.classes, 1)
    operations = 8 * setting.batch * setting.classes / setting.ranks * setting.rate * setting.width
    figures["matrix_gflops"] = round(float(np.median(rates)) / 1e9, 1)
    return figures | quartiles("matrix_share", [operations / (step * rate) for step, rate in zip(times["ours"], rates, strict=True)])


def _first_steps(name: str, side: Side | None, device: torch.device) -> dict[str, Any]:
    """Loss, traffic and memory of two steps that are not timed; the memory is that of the rank that takes most."""
    names = [f"{name}_{what}" for what in ("loss", "state_mib", "extra_mib", "peak_mib", "sent_bytes", "calls")]
    if side is None:
        return dict.fromkeys(names)
    with Traffic() as traffic:
        loss = float(side.step())
    side.clear()
    if isinstance(side.classifier, PartialFC):
        side.classifier.pool = BufferPool()  # the memory that it keeps from step to step is counted too
    extra, peak = peak_memory(side.step, device)
    side.clear()
    memory = [round(_over_ranks(max, value) / 2**20, 1) for value in (side.state_bytes(), extra, peak)]
    calls = ", ".join(f"{count} {kind}" for kind, count in traffic.calls.items())
    return dict(zip(names, [loss, *memory, traffic.sent, calls], strict=True))


def _deviation_from_one_rank(setting: Setting, loss: float, rank: int, device: torch.device) -> float | None:
    """Relative difference of the first step's loss from that of one rank which has all classes and the whole batch."""
    if setting.ranks == 1:
        return None
    alone, deviation = dist.new_group([0]), 0.0
    if rank == 0:
        with torch.no_grad():
            reference = float(_ours(setting, device, alone)(*(x.to(device) for x in _batch(setting))))
        deviation = abs(loss - reference) / abs(reference)
    return _over_ranks(max, deviation)


def _over_ranks(choose: Callable[[list[float]], float], value: float) -> float:
    if not dist.is_initialized():
        return value
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return choose(values)


def as_text(row: dict[str, Any]) -> str:
    """A few lines for people."""
    parts = "forward, backward" + (", update in backward" if row["in_backward"] else ", update" if row["step"] else "")
    lines = [
        f"{row['classes']:,} classes x {row['width']}, batch {row['batch']}, rate {row['rate']:g}: {parts}; "
        f"{row['ranks']} x {row['threads']} threads, {row['allocator']} malloc, median (quartiles) of {row['pairs']}"
    ]
    for name, dtype in (("eager", "float32"), ("ours", row["dtype"])):
        extra, state, sent, calls = (row[f"{name}_{what}"] for what in ("extra_mib", "state_mib", "sent_bytes", "calls"))
        if state is not None:
            traffic = f"; sends {sent:,} bytes: {calls}" if calls else ""
            lines.append(f"  {name:5} {dtype:8}  {spread(row, f'{name}_s', 's')}; {extra:,.0f} MiB beyond {state:,.0f} of state{traffic}")
    if row["memory_share"] is not None:
        lines.append(f"  eager / ours    {spread(row, 'eager_over_ours')} in time; {row['memory_share']:.2f} of its extra memory")
    else:
        lines.append(f"  ours            process at its peak {row['ours_peak_mib']:,.0f} MiB")
    rate = f"of the matrix rate, {row['matrix_gflops']:,.0f} GFLOP/s"
    lines.append(f"  ours            {spread(row, 'matrix_share')} {rate}; {row['ours_ns_per_class']:.4g} ns a class")
    if row["one_rank_deviation"] is not None:
        lines.append(f"  ours            loss {row['ours_loss']:.8g}, relative deviation from one rank's {row['one_rank_deviation']:.1e}")
    return "\n".join(lines)
