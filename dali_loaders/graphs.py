"""The two DALI graphs, encoded bytes -> sizes and encoded bytes -> images, and how one is run.

DALI draws no random numbers here: the flip, matrix, brightness and contrast of every sample are arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
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

    def run(self, inputs: Mapping[str, Any], stream: Any = None) -> Any:
        """The output for inputs by name: arrays [b, ...], or lists of b arrays. `stream`: a CUDA stream on which it will be used."""
        pipeline, self._pipeline = self._pipeline or self._define(), None
        for name, values in inputs.items():
            pipeline.feed_input(name, values)
        (output,) = pipeline.run(stream)  # by position: DALI takes every keyword for an input
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


def byte_arrays(encoded: Sequence[bytes]) -> list[np.ndarray]:
    return [np.frombuffer(data, np.uint8) for data in encoded]


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


def new_pipeline(batch_size: int, threads: int, device: torch.device) -> Any:
    """An empty pipeline. Its queue holds one batch, since the loader does the running ahead."""
    dali, _, _ = dali_modules()
    return dali.Pipeline(batch_size, threads, device.index if device.type == "cuda" else None, prefetch_queue_depth=1)


def size_pipeline(batch_size: int) -> Any:
    """bytes `encoded` -> int64 [height, width, channels], by DALI's own parsers of headers. One thread does: 256 headers took 1.2 ms, and
    decoding those images 21."""
    _, fn, types = dali_modules()
    pipeline = new_pipeline(batch_size, 1, torch.device("cpu"))
    with pipeline:
        pipeline.set_outputs(fn.peek_image_shape(fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)))
    return pipeline


def image_pipeline(
    image_size: int,
    batch_size: int,
    threads: int,
    device: torch.device,
    *,
    decode_on: str,
    resize: bool,
    arguments: Collection[str] = (),
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """bytes `encoded` -> decoded, resized, augmented and normalised RGB on `device`.

    decode_on: "cpu" or "gpu"; the rest runs on `device`. arguments: names of augment_arguments, which become inputs. channels_last:
    [size, size, 3] in place of [3, size, size]. dtype: float32 or float16."""
    _, fn, types = dali_modules()
    kinds = {"flip": (types.INT32, 0), "matrix": (types.FLOAT, 2), "brightness": (types.FLOAT, 0), "contrast": (types.FLOAT, 0)}
    pipeline = new_pipeline(batch_size, threads, device)
    with pipeline:
        given = {name: fn.external_source(name=name, dtype=kinds[name][0], ndim=kinds[name][1]) for name in sorted(arguments)}
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        images = fn.decoders.image(
            encoded,
            device="mixed" if decode_on == "gpu" else "cpu",
            output_type=types.RGB,
            # The GPU's JPEG engine rounds unlike its other cores, and by default takes the first 65 % of a batch: pixels would depend on
            # the place in the batch. With the upsampling of libjpeg-turbo they come close to what a CPU decodes.
            hw_decoder_load=0.0,
            jpeg_fancy_upsampling=True,
        )
        if decode_on == "cpu" and device.type == "cuda":
            images = images.gpu()
        if resize:
            images = fn.resize(images, size=[image_size, image_size])
        if "matrix" in given:
            images = fn.warp_affine(images, matrix=given["matrix"])
        if "brightness" in given:
            images = fn.brightness_contrast(images, brightness=given["brightness"], contrast=given["contrast"], contrast_center=127.5)
        pipeline.set_outputs(
            fn.crop_mirror_normalize(
                images,
                mirror=given.get("flip", 0),
                mean=[127.5] * 3,
                std=[127.5] * 3,
                dtype={torch.float32: types.FLOAT, torch.float16: types.FLOAT16}[dtype],
                output_layout="HWC" if channels_last else "CHW",
            )
        )
    return pipeline
