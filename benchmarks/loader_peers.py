"""What the training loader is measured beside: DALI's reader of RecordIO, and DataLoader with PIL, OpenCV, or mxnet and OpenCV.

Each gives float32 [b, 3, size, size], (x - 127.5) / 127.5, half of them mirrored, in random order without end."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

from dali_loaders.graphs import dali_modules
from dali_loaders.sources import open_source


@dataclass(frozen=True)
class Setting:
    """What all sides have in common."""

    batch: int = 128
    threads: int = 1
    image_size: int = 112
    rounds: int = 7
    seconds: float = 1.0  # of each side in a round
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("threads", 1), ("image_size", 8), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, but must be at least {least}")


@dataclass(frozen=True)
class Set:
    """A .rec whose .idx lists nothing but images."""

    rec: str
    idx: str
    images: int
    kilobytes: float  # of an image, on average
    resize: bool  # whether some are of another size than asked for


class Batches:
    """An endless iterator over [b, ...] tensors. `ahead`: how many are ready before they are asked for."""

    def __init__(self, batches: Iterator[torch.Tensor], close: Callable[[], None], ahead: int) -> None:
        self._batches, self.close, self.ahead = batches, close, ahead

    def __next__(self) -> torch.Tensor:
        return next(self._batches)


def dali(found: Set, setting: Setting) -> Batches:
    """DALI's own reader of RecordIO, its decoder, and two batches ahead."""
    module, fn, types = dali_modules()
    on_gpu = setting.device.type == "cuda"
    pipeline = module.Pipeline(setting.batch, setting.threads, 0 if on_gpu else None, prefetch_queue_depth=2, seed=1)
    with pipeline:
        encoded, _ = fn.readers.mxnet(path=[found.rec], index_path=[found.idx], random_shuffle=True, name="reader")
        images = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
        if found.resize:
            images = fn.resize(images, size=[setting.image_size] * 2)
        images = fn.crop_mirror_normalize(
            images, mirror=fn.random.coin_flip(), mean=[127.5] * 3, std=[127.5] * 3, dtype=types.FLOAT, output_layout="CHW"
        )
        pipeline.set_outputs(images)
    pipeline.build()

    def batches() -> Iterator[torch.Tensor]:
        while True:
            (output,) = pipeline.run()
            images = torch.from_dlpack(output.as_tensor())
            yield images.clone() if on_gpu else images

    return Batches(batches(), lambda: None, ahead=2)


class Images(Dataset):
    """The images of a set, read and decoded one at a time. how: "pil", "cv2" or "mxnet"."""

    def __init__(self, found: Set, size: int, how: str) -> None:
        self._found, self._size, self._how = found, size, how
        self._reader: Any = None

    def __len__(self) -> int:
        return self._found.images

    def __getitem__(self, index: int) -> torch.Tensor:
        data = self._read(index)
        image = _with_pil(data, self._size) if self._how == "pil" else _with_cv2(data, self._size)
        if np.random.rand() < 0.5:
            image = image[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().sub_(127.5).div_(127.5)

    def _read(self, index: int) -> bytes:
        if self._reader is None:  # in the worker
            self._reader = _MXNet(self._found) if self._how == "mxnet" else open_source(self._found.rec)
        return self._reader.read(index)


class _MXNet:
    def __init__(self, found: Set) -> None:
        from dali_loaders.recordio.mxnet_reader import import_recordio

        self._recordio = import_recordio()
        self._records = self._recordio.MXIndexedRecordIO(found.idx, found.rec, "r")

    def read(self, key: int) -> bytes:
        return self._recordio.unpack(self._records.read_idx(key))[1]


def _with_pil(data: bytes, size: int) -> np.ndarray:
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR))


def _with_cv2(data: bytes, size: int) -> np.ndarray:
    import cv2

    image = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    return image if image.shape[:2] == (size, size) else cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)


def _data_loader(how: str, needs: str) -> Callable[[Set, Setting], Batches]:
    def make(found: Set, setting: Setting) -> Batches:
        if needs == "mxnet":
            from dali_loaders.recordio.mxnet_reader import import_recordio

            try:
                import_recordio()
            except ValueError:
                raise ImportError(name=needs) from None
        else:
            importlib.import_module(needs)
        images = Images(found, setting.image_size, how)
        loader = DataLoader(
            images,
            setting.batch,
            sampler=RandomSampler(images, replacement=True, num_samples=1 << 40),
            num_workers=setting.threads,
            pin_memory=setting.device.type == "cuda",
            multiprocessing_context="spawn",  # a fork would copy locks that DALI's threads hold
            worker_init_fn=_one_thread,
        )
        batches = iter(loader)
        on_device = (batch.to(setting.device, non_blocking=True) for batch in batches)
        return Batches(on_device, batches._shutdown_workers, ahead=2 * setting.threads)  # type: ignore[attr-defined]

    return make


def _one_thread(worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


DALI = "DALI readers.mxnet"
MAKERS: dict[str, Callable[[Set, Setting], Batches]] = {
    DALI: dali,
    "DataLoader, PIL": _data_loader("pil", "PIL"),
    "DataLoader, cv2": _data_loader("cv2", "cv2"),
    "DataLoader, mxnet + cv2": _data_loader("mxnet", "mxnet"),
}
