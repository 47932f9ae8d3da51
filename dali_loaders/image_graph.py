"""The DALI graph from encoded bytes to images. It draws no random numbers: those of augmentations are arguments."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from dali_loaders.graphs import dali_modules, new_pipeline


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
