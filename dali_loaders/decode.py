"""From encoded bytes to batches of images, and which images are unreadable. The random numbers of an augmentation come from counters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from dali_loaders.config import AugmentConfig
from dali_loaders.config import DataConfig as DataConfig  # older recipe files import it from here
from dali_loaders.extras import extra
from dali_loaders.graphs import Graph, byte_arrays, image_pipeline, size_pipeline
from dali_loaders.order import uniform
from dali_loaders.sources import Source

with extra("train"):
    import cv2

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
    """Decodes one batch at a time: [b, 3, image_size, image_size], RGB, (x - 127.5) / 127.5, on `device`.

    `arguments` at a call are those of augment_arguments, the same set at every call; none for plain decoding. decoder: as in DataConfig.
    channels_last: images lie in that memory format. dtype: float32 or float16; their values are 256 levels, which float16 keeps apart."""

    def __init__(
        self,
        image_size: int,
        batch_size: int,
        threads: int,
        device: torch.device,
        *,
        decoder: str = "auto",
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        on_gpu = device.type == "cuda"
        if decoder == "gpu" and not on_gpu:
            raise ValueError("data.decoder is 'gpu', but this runs on the CPU; expected 'auto' or 'cpu', or a run on a GPU.")
        self.decodes_on = "gpu" if on_gpu and decoder != "cpu" else "cpu"
        # A GPU without a number is the current one of this thread; the thread that calls later may have another.
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu and device.index is None else device
        self.batch_size = batch_size
        self._size, self._channels_last, self._dtype = image_size, channels_last, dtype
        self._stream = torch.cuda.Stream(self.device) if on_gpu else None
        self._headers = HeaderReader(batch_size)
        # On a CPU resizing halves the throughput even where it changes nothing, so it joins the graph at the first image of another size.
        # There it is known to leave images of the right size as they are; on a GPU no image may depend on what came before it.
        self._resize = on_gpu
        self._graph: Graph | None = None
        # Partial functions and no methods: a cycle would keep the memory of pipelines until Python looks for cycles.
        pipeline = partial(image_pipeline, image_size, batch_size, threads, self.device)
        self._pipeline = partial(pipeline, decode_on=self.decodes_on, channels_last=channels_last, dtype=dtype)
        # Which images are unreadable is decided on the CPU, also in a run on a GPU: what a GPU cannot decode DALI hands to the CPU.
        self._judge = Graph(partial(image_pipeline, image_size, 1, 1, torch.device("cpu"), decode_on="cpu", resize=False))

    def __call__(self, encoded: Sequence[bytes], arguments: dict[str, np.ndarray]) -> torch.Tensor:
        """Raises UnreadableImagesError, after which other images can be decoded; RuntimeError for what is not the images' fault."""
        # Headers are read first, because one that cannot be parsed makes the decoder of DALI 2.4 crash the process (its threads outlive
        # the error).
        sizes_b2 = self._headers.sizes(encoded)
        if not sizes_b2.all():
            raise UnreadableImagesError(np.flatnonzero(sizes_b2[:, 0] == 0).tolist())
        if not self._resize and (sizes_b2 != self._size).any():
            self._resize, self._graph = True, None
        self._graph = self._graph or Graph(partial(self._pipeline, resize=self._resize, arguments=set(arguments)))
        try:
            output = self._graph.run({"encoded": byte_arrays(encoded)} | arguments, self._stream)
        except RuntimeError as error:
            raise UnreadableImagesError(self._judge.unreadable(encoded, error)) from error
        return self._to_torch(output)

    def to_device(self, labels: torch.Tensor) -> torch.Tensor:
        """A CPU tensor brought to the device on the decoder's own stream, so that it does not queue behind the training step."""
        if self._stream is None:
            return labels
        with torch.cuda.stream(self._stream):
            moved = labels.pin_memory().to(self.device, non_blocking=True)
        self._stream.synchronize()
        return moved

    def _to_torch(self, output: Any) -> torch.Tensor:
        tensor = output.as_tensor()
        if self._stream is None:
            images = torch.from_dlpack(tensor)  # no copy: DALI's buffer lives as long as the tensor
        else:
            from nvidia.dali.plugin.pytorch import feed_ndarray

            with torch.cuda.stream(self._stream):
                images = torch.empty(tensor.shape(), dtype=self._dtype, device=self.device)
                feed_ndarray(tensor, images, cuda_stream=self._stream)
            # Only the thread that feeds waits here, never the training step; afterwards DALI may reuse its buffer.
            self._stream.synchronize()
        return images.permute(0, 3, 1, 2) if self._channels_last else images


class HeaderReader:
    """Reads the sizes of encoded images from their headers."""

    def __init__(self, batch_size: int) -> None:
        self._graph = Graph(partial(size_pipeline, batch_size))

    def sizes(self, encoded: Sequence[bytes]) -> np.ndarray:
        """Height and width, int64 [b, 2]; zeros where there is no valid header or the data visibly ends too early.

        It reads JPEG, PNG and WebP only: a BMP with a header that no decoder accepts crashes DALI 2.4 (see read_image)."""
        sizes_b2 = np.zeros((len(encoded), 2), np.int64)
        complete = [at for at, data in enumerate(encoded) if is_complete(data)]
        try:
            self._parse(encoded, complete, sizes_b2)
        except RuntimeError as error:
            broken = self._graph.unreadable([encoded[at] for at in complete], error)
            self._parse(encoded, np.delete(complete, broken).tolist(), sizes_b2)
        sizes_b2[sizes_b2.prod(axis=1) > _MAX_PIXELS] = 0
        return sizes_b2

    def _parse(self, encoded: Sequence[bytes], places: list[int], sizes_b2: np.ndarray) -> None:
        if places:
            shapes = self._graph.run({"encoded": byte_arrays([encoded[at] for at in places])})
            sizes_b2[places] = np.asarray(shapes.as_tensor())[:, :2]


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
