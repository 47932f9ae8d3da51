"""How a DALI graph is run, which images it fails on, and the graph from encoded bytes to sizes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from dali_loaders.extras import extra

with extra("train"):
    import cv2


class Graph:
    """The pipeline that `define` returns. DALI calls a pipeline invalid after an error, so the next run then defines another one."""

    def __init__(self, define: Callable[[], Any]) -> None:
        self._define = define
        self._pipeline: Any = None
        self._running: Any = None

    def run(self, inputs: Mapping[str, Any], stream: Any = None) -> Any:
        """The output for inputs by name: arrays [b, ...], or what byte_arrays gives. `stream`: a CUDA stream on which it will be used."""
        self.start(inputs)
        return self.finish(stream)

    def start(self, inputs: Mapping[str, Any]) -> None:
        """Begins a run in DALI's threads, which copies the inputs first. One at a time."""
        pipeline, self._pipeline = self._pipeline or self._define(), None
        for name, values in inputs.items():
            pipeline.feed_input(name, values)
        pipeline.schedule_run()
        self._running = pipeline

    def finish(self, stream: Any = None) -> Any:
        """Waits for the output of the run that was started; raises what went wrong in it."""
        pipeline, self._running = self._running, None
        (output,) = pipeline.outputs(stream)
        self._pipeline = pipeline
        return output

    def unreadable(self, encoded: Sequence[bytes], error: RuntimeError) -> list[int]:
        """Places of the images on which this graph fails, each tried alone, after `error` ended a batch of them. Raises a RuntimeError
        with the same words where the images are not the cause: this graph fails on none of them, or on a sound one of their formats."""
        formats = {data[:3] for data in encoded}
        if any(self._fails(sound) for sound in _sound_images() if sound[:3] in formats):
            broken = []
        else:
            broken = [at for at, data in enumerate(encoded) if self._fails(data)]
        if not broken:
            raise RuntimeError(f"DALI failed, and not because of damaged images: {error}") from error
        return broken

    def _fails(self, data: bytes) -> bool:
        try:
            self.run({"encoded": byte_arrays([data])})
        except RuntimeError:
            return True
        return False


def byte_arrays(encoded: Sequence[bytes]) -> Any:
    """What a graph takes for a batch of byte strings: a TensorList that looks into them. Made here in two calls, since feed_input takes
    2.1 us an image to make it of a list of arrays, and this 0.8."""
    tensors: Any = dali_modules()[0].tensors
    return tensors.TensorListCPU([tensors.TensorCPU(data, "") for data in encoded], None, contiguous=False)


@cache
def _sound_images() -> list[bytes]:
    """One image of each format that DALI is given."""
    grey = np.full((8, 8, 3), 128, np.uint8)
    return [cv2.imencode(extension, grey)[1].tobytes() for extension in (".jpg", ".png", ".webp")]


def dali_modules() -> tuple[Any, Any, Any]:
    """nvidia.dali with its fn and types, imported when first needed so that the rest works where DALI does not exist."""
    if sys.platform != "linux":
        raise ValueError("decoding images needs NVIDIA DALI, which exists for Linux only")
    with extra("train"):
        from nvidia import dali
        from nvidia.dali import fn, types
    return dali, fn, types


def pipeline_options(batch_size: int, threads: int, device: torch.device) -> dict[str, Any]:
    """Of every pipeline. Its queue holds one batch, since the loader does the running ahead."""
    number = device.index if device.type == "cuda" else None
    return {"batch_size": batch_size, "num_threads": threads, "device_id": number, "prefetch_queue_depth": 1}


def size_pipeline(batch_size: int) -> Any:
    """bytes `encoded` -> int64 [height, width, channels], by DALI's own parsers of headers. 256 of them take 0.3 ms in one thread, and
    decoding those images 21; so it runs in the calling thread, without handing over to threads of an executor."""
    dali, fn, types = dali_modules()
    in_this_thread = {"exec_dynamic": False, "exec_async": False, "exec_pipelined": False}
    pipeline = dali.Pipeline(batch_size, 1, None, prefetch_queue_depth=1, **in_this_thread)
    with pipeline:
        pipeline.set_outputs(fn.peek_image_shape(fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)))
    return pipeline
