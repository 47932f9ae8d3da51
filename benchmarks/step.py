"""A whole training step, backbone and classifier, of this project: layouts, precisions and torch.compile in turn in one process, and
beside them arcface_torch's own step where a checkout of it is given; every round of steps gives one ratio."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.classifier import MARGIN, MOMENTUM, SCALE, WEIGHT_DECAY
from benchmarks.peer import CLIP, PeerStep
from benchmarks.record import quartiles, spread
from partial_fc import PartialFC, RowSGD, losses
from pipeline import backbones
from pipeline.distributed import keep_freed_memory
from pipeline.engine.optimizer import build_optimizer
from pipeline.measuring import peak_memory, seconds
from pipeline.schedule import OptimizerConfig

Layout = Literal["nhwc", "nchw"]
Step = Callable[[Tensor, Tensor], Tensor]  # images [b, 3, H, W] and labels [b] -> loss


@dataclass(frozen=True)
class Setting:
    """What all sides have in common."""

    network: str = "iresnet18"
    batch: int = 32
    classes: int = 100_000
    image_size: int = 112
    width: int = 512
    rounds: int = 7
    keeps_memory: bool = False  # memory that tensors free on a CPU stays with the process, for all sides: see pipeline.distributed

    def __post_init__(self) -> None:
        backbones.check(self.backbone, self.image_size)
        for name, least in (("batch", 2), ("classes", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}, but must be at least {least}")

    @property
    def backbone(self) -> backbones.BackboneConfig:
        return backbones.BackboneConfig(self.network, self.width)

    @property
    def lr(self) -> float:
        return 0.1 * self.batch / 1024  # the usual rate for faces


@dataclass(frozen=True)
class Variant:
    """How this project's side runs."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of the products of both backbone (autocast) and classifier
    layout: Layout = "nhwc"
    compile: bool = False


class OurStep:
    """As the trainer does it: the graph is cut at the features."""

    def __init__(self, setting: Setting, variant: Variant, weights: dict[str, Tensor], device: torch.device) -> None:
        self.format = torch.channels_last if variant.layout == "nhwc" else torch.contiguous_format
        self.network = backbones.build(setting.backbone, setting.image_size).to(device)
        self.network.to(memory_format=self.format)  # type: ignore[call-overload]
        self.network.load_state_dict(weights)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(self.network) if variant.compile else self.network
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=variant.dtype == "bfloat16")
        optimizer = OptimizerConfig(lr=setting.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        self.optimizer = build_optimizer(optimizer, self.network)
        loss = losses.build("cosface", scale=SCALE, margin=MARGIN)
        self.classifier = PartialFC(setting.classes, setting.width, loss, dtype=variant.dtype, device=device)
        self.row_sgd = RowSGD(self.classifier, setting.lr, MOMENTUM, WEIGHT_DECAY)

    def __call__(self, images_bCHW: Tensor, labels_b: Tensor) -> Tensor:
        with self.autocast:
            features_bD = self.forward(images_bCHW.contiguous(memory_format=self.format)).float()
        leaf_bD = features_bD.detach().requires_grad_()
        loss = self.classifier(leaf_bD, labels_b)
        loss.backward()
        features_bD.backward(leaf_bD.grad)
        nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        self.optimizer.step()
        self.row_sgd.step()
        self.optimizer.zero_grad()
        self.row_sgd.zero_grad()
        return loss.detach()


def rows(setting: Setting, variants: list[Variant], peer: str | None = None) -> Iterator[dict[str, Any]]:
    """One row per variant. `peer`: the folder recognition/arcface_torch of a checkout of InsightFace.

    All sides take one batch over and over, from the same weights. On a GPU ten steps are timed together, as nothing waits between them.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True  # as train_v2.py has it
    if setting.keeps_memory:
        keep_freed_memory()
    with _group_of_one(device):
        sides = _sides(setting, variants, peer, device)
        figures = _measure(sides, setting, device)
    peer_s = [] if peer is None else figures[-1].pop("seconds")
    peer_dtype = None if peer is None else "float16" if device.type == "cuda" else "float32"
    peer_figures = {
        "peer_dtype": peer_dtype,
        **{f"peer_{name}": figures[-1][name] if peer else None for name in ("loss", "first_s", "extra_mib")},
    }
    for variant, ours in zip(variants, figures, strict=False):
        times = ours.pop("seconds")
        row = {**vars(setting), **vars(variant), "threads": torch.get_num_threads()}
        row |= {f"ours_{name}": value for name, value in ours.items()} | quartiles("ours_s", times)
        row |= {"images_per_s": round(setting.batch / row["ours_s"], 1)} | peer_figures | quartiles("peer_s", peer_s)
        yield row | quartiles("peer_over_ours", [theirs / mine for theirs, mine in zip(peer_s, times, strict=False)])


def _sides(setting: Setting, variants: list[Variant], peer: str | None, device: torch.device) -> list[Step]:
    torch.manual_seed(0)
    weights = backbones.build(setting.backbone, setting.image_size).state_dict()
    ours = [OurStep(setting, variant, weights, device) for variant in variants]
    if peer is None:
        return [*ours]
    return [*ours, PeerStep(peer, setting.network, weights, ours[0].classifier.prototypes.detach(), setting.lr, device)]


def _measure(sides: list[Step], setting: Setting, device: torch.device) -> list[dict[str, Any]]:
    """Figures of each side's first steps, and the seconds of a step, one number per round."""
    generator = torch.Generator().manual_seed(0)
    size = setting.image_size
    images_bCHW = torch.rand(setting.batch, 3, size, size, generator=generator).mul_(2).sub_(1).to(device)
    labels_b = torch.randint(setting.classes, (setting.batch,), generator=generator).to(device)
    steps = [partial(side, images_bCHW, labels_b) for side in sides]
    count = 10 if device.type == "cuda" else 1
    blocks = [partial(_repeat, step, count) for step in steps]
    figures = [_first_steps(step, device) for step in steps]
    times = [[seconds(block, device) / count for block in blocks] for _ in range(1 + setting.rounds)][1:]
    for figure, values in zip(figures, zip(*times, strict=True), strict=True):
        figure["seconds"] = values
    return figures


def _first_steps(step: Callable[[], Tensor], device: torch.device) -> dict[str, Any]:
    """Loss and seconds of the first step, which compiles and chooses algorithms of convolutions, and the memory of the second."""
    start = time.perf_counter()
    loss = float(step())
    first_s = round(time.perf_counter() - start, 2)
    return {"loss": loss, "first_s": first_s, "extra_mib": round(peak_memory(step, device)[0] / 2**20, 1)}


def _repeat(step: Callable[[], Tensor], count: int) -> None:
    for _ in range(count):
        step()


@contextlib.contextmanager
def _group_of_one(device: torch.device) -> Iterator[None]:
    """arcface_torch insists on a process group; ours then runs in the same, as it does in training."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def as_text(row: dict[str, Any]) -> str:
    """A few lines for people."""
    how = f"{row['dtype']} {row['layout']}{' compiled' if row['compile'] else ''}"
    lines = [
        f"{row['network']} at {row['image_size']}, batch {row['batch']}, {row['classes']:,} classes, {row['threads']} threads, "
        f"median (quartiles) of {row['rounds']}{', freed memory kept' if row['keeps_memory'] else ''}",
        f"  ours {how}: {spread(row, 'ours_s', 's')}, {row['images_per_s']:,.0f} images/s, first step {row['ours_first_s']:.3g} s, "
        f"{row['ours_extra_mib']:,.0f} MiB beyond its state",
    ]
    if row["peer_s"] is not None:
        lines.append(
            f"  arcface_torch {row['peer_dtype']}: {spread(row, 'peer_s', 's')}, {row['peer_extra_mib']:,.0f} MiB beyond its state"
        )
        lines.append(
            f"  arcface_torch / ours: {spread(row, 'peer_over_ours')}; first losses {row['peer_loss']:.5g} and {row['ours_loss']:.5g}"
        )
    return "\n".join(lines)
