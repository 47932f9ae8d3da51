"""The steps, in order of worth: what was not reached when time is up matters least."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.first_gpu import kernels, machine, networks, pictures, training
from benchmarks.first_gpu.rows import NO_GPU, Row, Run


@dataclass(frozen=True)
class Step:
    """minutes: the most it may take, and with `--small`; it is not begun with less time left."""

    name: str
    title: str
    rows: Callable[[Run], Iterator[Row]]
    minutes: tuple[float, float]
    needs: tuple[str, ...] = ()  # packages, as they are imported
    needs_gpu: bool = False

    def obstacle(self) -> str | None:
        """Why it cannot run here."""
        if self.needs_gpu and not torch.cuda.is_available():
            return NO_GPU
        missing = [name for name in self.needs if not _is_installed(name)]
        return f"needs {' and '.join(missing)}, which cannot be imported here" if missing else None


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


DATA = ("nvidia.dali", "cv2")
TRAINING = (*DATA, "matplotlib")

STEPS = [
    Step("facts", "The machine", machine.facts, (2, 1)),
    Step("tests", "Tests that need a GPU", machine.tests, (4, 4), ("pytest", "hypothesis"), needs_gpu=True),
    Step("parity", "Kernels against float64", kernels.parity, (1.5, 2), ("triton",)),
    Step("200k", "A classifier step, 200,000 classes", kernels.step_of_200k, (1.5, 1)),
    Step("1m", "A classifier step, 1,000,000 classes", kernels.step_of_1m, (2, 1)),
    Step("10m", "A classifier step, 10,000,000 classes, update in backward", kernels.step_of_10m, (3, 1)),
    Step("rivals", "Plain softmax beside public kernels", kernels.rivals, (2, 1)),
    Step("r50", "A training step of IResNet-50", networks.iresnet50, (2, 1)),
    Step("decode", "Decoding on the GPU and on the CPU", pictures.decoding, (1.5, 1), DATA),
    Step("faces", "The quick start's training", training.train_faces, (3, 2), TRAINING),
    Step("resume", "Killed and resumed", training.resume, (2, 2), TRAINING),
    Step("sync", "Waiting for the device in a classifier step", kernels.sync, (0.5, 0.5), needs_gpu=True),
    Step("r50c", "A training step of IResNet-50 with torch.compile", networks.iresnet50_compiled, (5, 2.5)),
    Step("dogs", "Training on photographs of dogs", training.train_dogs, (3, 2), TRAINING),
    Step("engines", "DeepSpeed against DDP", networks.engines, (1.5, 1), ("deepspeed",)),
    Step("r100", "A training step of IResNet-100", networks.iresnet100, (3, 1)),
    Step("r100c", "A training step of IResNet-100 with torch.compile", networks.iresnet100_compiled, (8, 2.5)),
]
