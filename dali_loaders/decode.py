"""The DALI graph: encoded bytes -> decoded, resized, augmented and normalised images, on the CPU or decoded by the GPU ('mixed').

DALI draws no random numbers here: the flip, matrix, brightness and contrast of every sample are arguments computed from counters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch

from dali_loaders.config import AugmentConfig
from dali_loaders.config import DataConfig as DataConfig  # older recipe files import it from here
from dali_loaders.order import uniform
from dali_loaders.sources import Source

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_MAX_PIXELS = 1 << 26  # a damaged header may claim gigabytes
_AUGMENT_STREAM = 1
_COLUMNS = 7  # flip, angle, zoom, shift x, shift y, brightness, contrast: fixed, so that one option does not change another's numbers


def augment_arguments(config: AugmentConfig, image_size: int, seed: int, positions: np.ndarray) -> dict[str, np.ndarray]:
    """Per-sample arguments of the graph for the stream positions, each a function of (seed, position) alone.

    flip int32 [b]; matrix float32 [b, 2, 3], which maps output to input pixels; brightness and contrast float32 [b]."""
    draw = uniform(seed, _AUGMENT_STREAM, positions, _COLUMNS)
    signed = 2 * draw - 1
    arguments = {"flip": (draw[:, 0] < 0.5).astype(np.int32) * config.flip}
    if config.geometric:
        angle, scale = np.radians(config.rotate) * signed[:, 1], 1 + config.zoom * signed[:, 2]
        cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
        centre = image_size / 2
        from_x, from_y = centre + config.shift * image_size * signed[:, 3], centre + config.shift * image_size * signed[:, 4]
        rows = [cos, sin, centre - cos * from_x - sin * from_y, -sin, cos, centre + sin * from_x - cos * from_y]
        arguments["matrix"] = np.stack(rows, axis=1).reshape(-1, 2, 3).astype(np.float32)
    if config.photometric:
        arguments["brightness"] = (1 + config.brightness * signed[:, 5]).astype(np.float32)
        arguments["contrast"] = (1 + config.contrast * signed[:, 6]).astype(np.float32)
    return arguments


class UnreadableImagesError(Exception):
    """Some images of a batch cannot be decoded: those at `places`."""

    def __init__(self, places: list[int]) -> None:
        super().__init__(f"unreadable images at {places} of the batch")
        self.places = places


class Decoder:
    """Runs the graph on one batch at a time: float32 [b, 3, image_size, image_size], RGB, (x - 127.5) / 127.5, on `device`.

    `arguments` at a call are those of augment_arguments, the same set at every call; none for plain decoding."""

    def __init__(self, image_size: int, batch_size: int, threads: int, device: torch.device) -> None:
        self._size = image_size
        self._batch_size = batch_size
        self._threads = threads
        self._device = device
        self._headers = HeaderReader(batch_size, threads)
        self._resize = False
        self._pipeline: Any = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, encoded: Sequence[bytes], arguments: dict[str, np.ndarray]) -> torch.Tensor:
        """Raises UnreadableImagesError, after which other images can be decoded."""
        # Headers are read first, because one that cannot be parsed makes the decoder of DALI 2.4 crash the process (its threads outlive
        # the error).
        sizes_b2 = self._headers.sizes(encoded)
        if not sizes_b2.all():
            raise UnreadableImagesError(np.flatnonzero(sizes_b2[:, 0] == 0).tolist())
        if not self._resize and (sizes_b2 != self._size).any():
            # Resizing halves the throughput even where it changes nothing, so it joins the graph at the first image of another size.
            self._resize, self._pipeline = True, None
        try:
            return self._to_torch(self._run(encoded, arguments))
        except RuntimeError as error:
            places = self._unreadable(encoded, arguments)
            if not places:
                raise
            raise UnreadableImagesError(places) from error

    def to_device(self, labels: torch.Tensor) -> torch.Tensor:
        """A CPU tensor brought to the device on the decoder's own stream, so that it does not queue behind the training step."""
        if self._stream is None:
            return labels
        with torch.cuda.stream(self._stream):
            moved = labels.pin_memory().to(self._device, non_blocking=True)
        self._stream.synchronize()
        return moved

    def _run(self, encoded: Sequence[bytes], arguments: dict[str, np.ndarray]) -> Any:
        self._pipeline = self._pipeline or self._build(set(arguments))
        self._pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
        for name, values in arguments.items():
            self._pipeline.feed_input(name, values)
        try:
            (output,) = self._pipeline.run() if self._stream is None else self._pipeline.run(cuda_stream=self._stream)
        except RuntimeError:
            self._pipeline = None  # what a pipeline holds after an error is not specified
            raise
        return output

    def _unreadable(self, encoded: Sequence[bytes], arguments: dict[str, np.ndarray]) -> list[int]:
        """Places of the images that cannot be decoded. DALI does not name them, so they are found by bisection."""
        try:
            self._run(encoded, arguments)
            return []
        except RuntimeError:
            if len(encoded) == 1:
                return [0]
        half = len(encoded) // 2
        left = self._unreadable(encoded[:half], {name: values[:half] for name, values in arguments.items()})
        right = self._unreadable(encoded[half:], {name: values[half:] for name, values in arguments.items()})
        return left + [half + at for at in right]

    def _to_torch(self, output: Any) -> torch.Tensor:
        if self._stream is None:
            return torch.from_dlpack(output.as_tensor())  # no copy: DALI's buffer lives as long as the tensor
        from nvidia.dali.plugin.pytorch import feed_ndarray

        with torch.cuda.stream(self._stream):
            images = torch.empty((len(output), 3, self._size, self._size), dtype=torch.float32, device=self._device)
            feed_ndarray(output.as_tensor(), images, cuda_stream=self._stream)
        # Only the thread that feeds waits here, never the training step; afterwards DALI may reuse its buffer.
        self._stream.synchronize()
        return images

    def _build(self, names: set[str]) -> Any:
        dali, fn, types = dali_modules()
        on_gpu = self._device.type == "cuda"
        device_id = (self._device.index or 0) if on_gpu else None
        pipeline = dali.Pipeline(self._batch_size, self._threads, device_id, prefetch_queue_depth=1)
        kinds = {"flip": (types.INT32, 0), "matrix": (types.FLOAT, 2), "brightness": (types.FLOAT, 0), "contrast": (types.FLOAT, 0)}
        with pipeline:
            given = {n: fn.external_source(name=n, dtype=kinds[n][0], ndim=kinds[n][1]) for n in sorted(names)}
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            images = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
            if self._resize:
                images = fn.resize(images, size=[self._size, self._size])
            if "matrix" in names:
                images = fn.warp_affine(images, matrix=given["matrix"])
            if "brightness" in names:
                images = fn.brightness_contrast(images, brightness=given["brightness"], contrast=given["contrast"], contrast_center=127.5)
            pipeline.set_outputs(
                fn.crop_mirror_normalize(
                    images,
                    mirror=given.get("flip", 0),
                    mean=[127.5] * 3,
                    std=[127.5] * 3,
                    dtype=types.FLOAT,
                    output_layout="CHW",
                )
            )
        pipeline.build()
        return pipeline


class HeaderReader:
    """Reads the sizes of encoded images from their headers, with DALI's own parsers."""

    def __init__(self, batch_size: int, threads: int) -> None:
        self._batch_size = batch_size
        self._threads = threads
        self._pipeline: Any = None

    def sizes(self, encoded: Sequence[bytes]) -> np.ndarray:
        """Height and width, int64 [b, 2]; zeros where there is no valid header or the data visibly ends too early.

        It reads JPEG, PNG and WebP only: a BMP with a header that no decoder accepts crashes DALI 2.4 (see read_image)."""
        sizes_b2 = np.zeros((len(encoded), 2), np.int64)
        complete = [at for at, data in enumerate(encoded) if is_complete(data)]
        if complete:
            sizes_b2[complete] = self._parse([encoded[at] for at in complete])
        sizes_b2[sizes_b2.prod(axis=1) > _MAX_PIXELS] = 0
        return sizes_b2

    def _parse(self, encoded: Sequence[bytes]) -> np.ndarray:
        self._pipeline = self._pipeline or self._build()
        self._pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
        try:
            (shapes,) = self._pipeline.run()
            return np.asarray(shapes.as_tensor())[:, :2]
        except RuntimeError:
            self._pipeline = None
        if len(encoded) == 1:
            return np.zeros((1, 2), np.int64)
        half = len(encoded) // 2
        return np.concatenate([self._parse(encoded[:half]), self._parse(encoded[half:])])

    def _build(self) -> Any:
        dali, fn, types = dali_modules()
        pipeline = dali.Pipeline(self._batch_size, self._threads, None, prefetch_queue_depth=1)
        with pipeline:
            pipeline.set_outputs(fn.peek_image_shape(fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)))
        pipeline.build()
        return pipeline


def dali_modules() -> tuple[Any, Any, Any]:
    """nvidia.dali with its fn and types, imported when first needed so that the rest works where DALI does not exist."""
    try:
        from nvidia import dali
        from nvidia.dali import fn, types
    except ImportError as error:
        raise ValueError(f"decoding images needs NVIDIA DALI, which cannot be imported here ({error}); use a Linux machine.") from error
    return dali, fn, types


def read_image(source: Source, index: int) -> bytes:
    """Encoded image `index` as JPEG, PNG or WebP; no bytes where it cannot be read. Other formats become PNG, in the calling thread."""
    try:
        data = source.read(index)
    except (OSError, ValueError):
        return b""
    if not data or _is_common(data):
        return data
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # a size beyond OpenCV's limits
        return b""
    return b"" if image is None else cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def is_complete(data: bytes) -> bool:
    """False for what is no JPEG, PNG or WebP, and for a JPEG without its end marker, whose missing lines a decoder may fill with grey.

    The end must come after the last scan, since an embedded preview has an end marker of its own; bytes after it are allowed."""
    if not data.startswith(_JPEG) or data.endswith(b"\xff\xd9"):
        return _is_common(data)
    return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")


def _is_common(data: bytes) -> bool:
    return data.startswith((_JPEG, _PNG)) or (data.startswith(b"RIFF") and data[8:12] == b"WEBP")
