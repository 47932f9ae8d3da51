"""Some images of a source to embeddings, and an account of it: what cannot be decoded, and what is stretched to the network's size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from dali_loaders.config import DataConfig
from dali_loaders.names import printable
from dali_loaders.skipped import Skipped
from dali_loaders.sources import Source
from pipeline.export.description import Description
from pipeline.export.loading import Model


class Stretched(NamedTuple):
    """Images that had another size than the network's."""

    number: int = 0
    first: str = ""  # its name and size

    def and_then(self, other: Stretched) -> Stretched:
        return Stretched(self.number + other.number, self.first or other.first)

    def remark(self, path: str, images: int, about: Description) -> str | None:
        """A line for people; None where there are none."""
        if not self.number:
            return None
        side, advice = about.image_size, "; cut faces out first (protoshard data pack --landmarks)" if about.landmarks else ""
        many = f"{path}: {self.number:,} of {images:,} images are not {side} x {side} pixels and are stretched, such as {self.first}"
        return (f"{self.first} is stretched to {side} x {side}" if images == 1 else many) + advice


class Part(NamedTuple):
    """Of the images that were asked for."""

    embedding_nD: np.ndarray  # float32, finite
    index_n: np.ndarray  # int64, the numbers of their images
    unreadable: list[tuple[int, str]]  # number and reason of the others
    stretched: Stretched


class _Listed(Skipped):
    """Also which image has which reason."""

    def __init__(self, source: Source) -> None:
        super().__init__(source, None)
        self.listed: list[tuple[int, str]] = []

    def add(self, index: int, reason: str) -> None:
        if index not in self:
            self.listed.append((index, reason))
        super().add(index, reason)


def embed_images(model: Model, source: Source, indices: np.ndarray, flip: bool, uses_dali: bool) -> Part:
    """The images `indices`, in batches as the model's run evaluated. ValueError for an embedding that is not finite."""
    about, skipped, stretched = model.description, _Listed(source), Stretched()
    data, device = DataConfig(image_size=about.image_size), next(model.network.parameters()).device
    parts, found = [np.zeros((0, about.backbone.width), np.float32)], [np.zeros(0, np.int64)]

    def seen(index_b: np.ndarray, sizes_b2: np.ndarray) -> None:
        nonlocal stretched
        other = np.flatnonzero((sizes_b2 != about.image_size).any(axis=1)).tolist()
        if other:
            height, width = sizes_b2[other[0]].tolist()
            name = printable(source.name(int(index_b[other[0]])))
            stretched = stretched.and_then(Stretched(len(other), f"{name} ({width} x {height} pixels)"))

    for batch in _batches(source, data, indices, about.batch_size, device, skipped, seen, uses_dali):
        embedding_bD = model.embedded(batch.images.to(device), flip)
        bad = (~torch.isfinite(embedding_bD).all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{model.path} gives an embedding that is not finite for {printable(source.name(int(batch.indices[bad[0]])))}")
        parts.append(embedding_bD.cpu().numpy())
        found.append(np.asarray(batch.indices, np.int64))
    return Part(np.concatenate(parts), np.concatenate(found), skipped.listed, stretched)


def _batches(
    source: Source, data: DataConfig, indices: np.ndarray, size: int, device: torch.device, skipped: Skipped, seen: Any, uses_dali: bool
) -> Iterator[Any]:
    if uses_dali:
        from dali_loaders.loader import evaluation_batches

        return evaluation_batches(source, data, indices, size, device, channels_last=True, skipped=skipped, seen=seen)
    from pipeline.export import decoding

    return decoding.batches(source, data, indices, size, skipped, seen)
