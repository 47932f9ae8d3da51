"""Decoding on the GPU against decoding on the CPU: the same pixels? And is the feed faster than the step that it feeds?"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.first_gpu.rows import NO_GPU, Row, Run, attempt, unmeasured

BATCH = 128
LEVELS = 127.5  # images are (x - 127.5) / 127.5


def faces(run: Run, name: str = "train") -> str:
    """The path of a drawn set, as in the quick start; drawn where it is missing. No identity is in both `train` and `test`."""
    from dali_loaders.faces import FacesConfig, write_faces

    first, identities = {"train": (0, 400), "test": (1_000_000, 100)}[name]
    identities, images = (identities // 10, 8) if run.small else (identities, 20)
    path = os.path.join(run.work, f"{name}.tar")
    if not os.path.exists(path):
        write_faces(path, FacesConfig(identities, images, first_identity=first))
    return path


def decoding(run: Run) -> Iterator[Row]:
    from dali_loaders import DataConfig, open_source

    source = open_source(faces(run))
    sides = {"CPU": Side(source, DataConfig(image_size=112), torch.device("cpu"))}
    if run.on_gpu:
        sides["GPU"] = Side(source, DataConfig(image_size=112), run.device)
    for name, side in sides.items():
        yield from attempt(f"slots, decoded on the {name}", _slots, name, side)
        yield from attempt(f"feed, decoded on the {name}", _feed, run, name, side)
    what = "largest difference of a pixel, GPU against CPU"
    yield from attempt(what, _difference, what, sides) if run.on_gpu else [unmeasured(what, NO_GPU)]


class Side:
    """A set, decoded for one device, where it is decoded too if the configuration has a say in that."""

    def __init__(self, source: Any, config: Any, device: torch.device) -> None:
        self.source, self.device = source, device
        decoder = "gpu" if device.type == "cuda" else "cpu"
        self.config = replace(config, decoder=decoder) if hasattr(config, "decoder") else config

    def images(self, indices: np.ndarray) -> torch.Tensor:
        from dali_loaders import evaluation_batches

        batches = evaluation_batches(self.source, self.config, indices, BATCH, self.device)
        return torch.cat([batch.images.float().cpu() for batch in batches])


def _slots(name: str, side: Side) -> Iterator[Row]:
    same = side.images(np.full(BATCH, 7))
    worst = LEVELS * float((same - same[:1]).abs().max())
    yield Row(f"one image in all {BATCH} slots, decoded on the {name}: largest difference", worst, "of 255", "0")


def _difference(what: str, sides: dict[str, Side]) -> Iterator[Row]:
    indices = np.arange(min(len(sides["CPU"].source), 4 * BATCH))
    difference = LEVELS * (sides["GPU"].images(indices) - sides["CPU"].images(indices)).abs()
    yield Row(what, round(float(difference.max()), 2), "of 255", "", f"mean {float(difference.mean()):.3g}")


def _feed(run: Run, name: str, side: Side) -> Iterator[Row]:
    """The loader alone, with flips, reading from a tar."""
    from dali_loaders import TrainLoader

    loader = TrainLoader(side.source, side.config, seed=0, global_batch=BATCH, device=run.device)
    try:
        for _ in range(3):
            next(loader)
        count = 5 if run.small else 100
        start = time.perf_counter()
        for _ in range(count):
            next(loader)
        if run.on_gpu:
            torch.cuda.synchronize()
        rate = count * BATCH / (time.perf_counter() - start)
    finally:
        loader.close()
    note = f"{side.config.thread_count()} threads, batch {BATCH}"
    yield Row(f"feed, decoded on the {name}", round(rate), "images/s", "" if run.small else "1.2 x iresnet50's step", note)
