"""Whole training steps of IResNets, beside arcface_torch's own, and of both engines."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from statistics import median
from typing import get_args

import torch
from torch import Tensor

from benchmarks import step
from benchmarks.first_gpu.rows import Row, Run, attempt, unmeasured
from pipeline import backbones
from pipeline.distributed import join
from pipeline.engine import Engine, EngineConfig, build_engine
from pipeline.measuring import seconds
from pipeline.schedule import OptimizerConfig

LAYOUTS: tuple[step.Layout, ...] = get_args(step.Layout)
TARGETS = {("iresnet50", 256): ">= 2"}  # of arcface_torch / ours


def iresnet50(run: Run) -> Iterator[Row]:
    yield from _iresnet(run, "iresnet50", compiled=(False,))


def iresnet50_compiled(run: Run) -> Iterator[Row]:
    yield from _iresnet(run, "iresnet50", compiled=(False, True))


def iresnet100(run: Run) -> Iterator[Row]:
    yield from _iresnet(run, "iresnet100", compiled=(False,))


def iresnet100_compiled(run: Run) -> Iterator[Row]:
    yield from _iresnet(run, "iresnet100", compiled=(False, True))


def _iresnet(run: Run, network: str, compiled: Sequence[bool]) -> Iterator[Row]:
    """Layouts in turn in one process; with torch.compile only at the larger batch, as it takes minutes."""
    for batch in (256,) if True in compiled else (256, 128):
        setting = step.Setting("iresnet18", batch // 64, 500, rounds=3) if run.small else step.Setting(network, batch, 100_000)
        variants = [step.Variant("bfloat16", layout, choice) for layout, choice in product(LAYOUTS, compiled)]
        what = f"{setting.network} at {setting.image_size}, batch {setting.batch}, {setting.classes:,} classes"
        yield from attempt(what, _steps, what, setting, variants, TARGETS.get((setting.network, batch), ""))


def _steps(what: str, setting: step.Setting, variants: list[step.Variant], target: str) -> Iterator[Row]:
    peer = os.environ.get("ARCFACE_TORCH") or None
    for row in step.rows(setting, variants, peer):
        how = f"{what}: {row['dtype']} {row['layout']}{' compiled' if row['compile'] else ''}"
        note = f"a step {row['ours_s']:.4g} s, the first {row['ours_first_s']:.3g} s, {row['ours_extra_mib']:,.0f} MiB beyond its state"
        yield Row(how, row["images_per_s"], "images/s", "", note)
        if peer is not None:
            low, high = row["peer_over_ours_quartiles"]
            note = f"quartiles {low:.4g} to {high:.4g}; {row['peer_dtype']}, a step {row['peer_s']:.4g} s"
            yield Row(f"{how}: arcface_torch / ours", row["peer_over_ours"], "", target, note)
    if peer is None:
        yield unmeasured(f"{what}: arcface_torch / ours", "ARCFACE_TORCH names no checkout of recognition/arcface_torch")


def engines(run: Run) -> Iterator[Row]:
    """A step of the backbone in each engine, in turn in one process. With one GPU nothing is sent, so this is the engine's own part."""
    name, size, batch, rounds = ("small", 64, 8, 3) if run.small else ("iresnet50", 112, 128, 7)
    place = join()
    images_bCHW = torch.randn(batch, 3, size, size, device=place.device).contiguous(memory_format=torch.channels_last)
    settings = {"ddp": EngineConfig("ddp"), "zero 1": EngineConfig("deepspeed"), "zero 2": EngineConfig("deepspeed", zero_stage=2)}
    steps = {}
    for what, setting in settings.items():
        backbone = backbones.build(backbones.BackboneConfig(name), size)
        steps[what] = partial(_engine_step, build_engine(setting, OptimizerConfig(), backbone, place, 1), images_bCHW)
        for _ in range(3):
            steps[what]()
    times = [[seconds(run_step, place.device) for run_step in steps.values()] for _ in range(rounds)]
    for column, what in enumerate(steps):
        middle, ratio = median(row[column] for row in times), median(row[column] / row[0] for row in times)
        yield Row(f"{name}, batch {batch}: a step with {what}", float(f"{middle:.4g}"), "s", "", f"{ratio:.3g} of ddp's")
    yield unmeasured("a step with gradients that travel in bfloat16 (engine.compress)", "it needs two GPUs, and this step takes one")


def _engine_step(engine: Engine, images_bCHW: Tensor) -> None:
    features_bD = engine.forward(images_bCHW, True)
    engine.backward(features_bD, torch.full_like(features_bD, 1e-3), True)
    engine.clip()
    engine.step(0.01, torch.zeros((), device=images_bCHW.device))
