"""The DALI graph from encoded bytes to images. It draws no random numbers: those of augmentations are arguments."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from dali_loaders.augment import ARGUMENTS
from dali_loaders.graphs import dali_modules, pipeline_options


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
    dali, fn, types = dali_modules()
    kinds: dict[type[np.generic], Any] = {np.bool_: types.BOOL, np.int32: types.INT32, np.float32: types.FLOAT}
    size = [image_size, image_size]

    # With conditionals, an `if` on an input of the graph splits the batch: only images for which it is true pass the operators below it.
    # The others stay as they are to the bit, and cost nothing. An `if` on anything else is Python's.
    @dali.pipeline_def(enable_conditionals=True, **pipeline_options(batch_size, threads, device))
    def define() -> Any:
        given = {
            name: fn.external_source(name=name, dtype=kinds[ARGUMENTS[name][0]], ndim=ARGUMENTS[name][1]) for name in sorted(arguments)
        }
        images = fn.decoders.image(
            fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
            device="mixed" if decode_on == "gpu" else "cpu",
            output_type=types.RGB,
            # The GPU's JPEG engine rounds unlike its other cores, and by default takes the first 65 % of a batch: pixels would depend on
            # the place in the batch. With the upsampling of libjpeg-turbo they come close to what a CPU decodes.
            hw_decoder_load=0.0,
            jpeg_fancy_upsampling=True,
        )
        if decode_on == "cpu" and device.type == "cuda":
            images = images.gpu()
        # On the face, and so before anything that moves it.
        if given.get("mask", False):
            rectangles = {"anchor": given["mask_anchor"], "shape": given["mask_shape"], "fill_value": given["mask_colour"]}
            images = fn.erase(images, **rectangles, axis_names="HW", normalized=True)
        if given.get("crop", False):  # from the image as it was decoded, which may be larger
            images = fn.resize(images, size=size, roi_start=given["crop_start"], roi_end=given["crop_end"], roi_relative=True)
        elif resize:
            images = fn.resize(images, size=size)
        if "matrix" in given and given.get("geometry", True):
            images = fn.warp_affine(images, matrix=given["matrix"])
        # In front of the camera: what hides a part of the image.
        if given.get("frame", False):
            images = fn.erase(images, anchor=given["frame_anchor"], shape=given["frame_shape"], axis_names="HW", fill_value=0)
        if given.get("cutout", False):
            images = fn.erase(images, anchor=given["cutout_anchor"], shape=given["cutout_shape"], axis_names="HW", fill_value=128)
        # In the camera: its lens, its sensor, the colours that it makes of that, and the file that it writes.
        if given.get("blur", False):
            images = fn.gaussian_blur(images, sigma=given["sigma"])
        if given.get("low_resolution", False):
            if given["smooth"]:
                small = fn.resize(images, size=given["low_size"])
            else:
                shrink = fn.reinterpret(given["shrink"], dtype=types.INTERP_TYPE)
                small = fn.resize(images, size=given["low_size"], interp_type=shrink, antialias=False)
            images = fn.resize(small, size=size, interp_type=fn.reinterpret(given["enlarge"], dtype=types.INTERP_TYPE))
        if given.get("colour", True):
            if "brightness" in given:
                factors = {"brightness": given["brightness"], "contrast": given["contrast"]}
                images = fn.brightness_contrast(images, **factors, contrast_center=127.5)
            if "saturation" in given:
                images = fn.hsv(images, saturation=given["saturation"], hue=given["hue"])
        if given.get("grey", False):
            grey = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
            images = fn.color_space_conversion(grey, image_type=types.GRAY, output_type=types.RGB)
        if given.get("jpeg", False):
            images = fn.jpeg_compression_distortion(images, quality=given["quality"])
        return fn.crop_mirror_normalize(
            images,
            mirror=given.get("flip", 0),
            mean=[127.5] * 3,
            std=[127.5] * 3,
            dtype={torch.float32: types.FLOAT, torch.float16: types.FLOAT16}[dtype],
            output_layout="HWC" if channels_last else "CHW",
        )

    return define()
