"""From encoded bytes to batches of images, and which images are unreadable."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from dali_loaders import renamed
from dali_loaders.config import AugmentConfig as AugmentConfig  # older recipe files import both from here
from dali_loaders.config import DataConfig as DataConfig
from dali_loaders.encoded import HeaderReader, Unreadable
from dali_loaders.graphs import Graph, byte_arrays
from dali_loaders.image_graph import image_pipeline
from dali_loaders.reasons import undecodable

renamed.names(
    __name__,
    {
        "augment_arguments": "dali_loaders.augment",
        "is_complete": "dali_loaders.encoded",
        "read_image": "dali_loaders.encoded",
    },
)


class UnreadableImagesError(Exception):
    """Some images of a batch cannot be decoded: those at the places in `why`, which gives the reasons."""

    def __init__(self, why: dict[int, str]) -> None:
        super().__init__(f"unreadable images at places of the batch: {why}")
        self.why = why


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

    def __call__(self, encoded: Sequence[bytes | Unreadable], arguments: dict[str, np.ndarray]) -> torch.Tensor:
        """Raises UnreadableImagesError, after which other images can be decoded; RuntimeError for what is not the images' fault."""
        # Headers are read first, because one that cannot be parsed makes the decoder of DALI 2.4 crash the process (its threads outlive
        # the error).
        sizes_b2, why = self._headers.sizes(encoded)
        if why:
            raise UnreadableImagesError(why)
        good = [data for data in encoded if not isinstance(data, Unreadable)]  # all, as `why` is empty
        if not self._resize and (sizes_b2 != self._size).any():
            self._resize, self._graph = True, None
        self._graph = self._graph or Graph(partial(self._pipeline, resize=self._resize, arguments=set(arguments)))
        try:
            output = self._graph.run({"encoded": byte_arrays(good)} | arguments, self._stream)
        except RuntimeError as error:
            raise UnreadableImagesError({at: undecodable(good[at]) for at in self._judge.unreadable(good, error)}) from error
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
