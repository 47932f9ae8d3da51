"""Evaluation images to look at: the pairs that a network gets most wrong, side by side, and a cloud of all for TensorBoard's projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from dali_loaders.config import DataConfig
from dali_loaders.names import printable
from dali_loaders.sources import Source
from pipeline.monitor import Monitor, of_set

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS = 16  # of each kind on a sheet
THUMBNAIL = 32  # pixels
_AT_ONCE = 64


class Pair(NamedTuple):
    first: int
    second: int
    cosine: float


def show(monitor: Monitor, step: int, name: str, source: Source, data: DataConfig, embeddings_nD: Tensor, index_n: np.ndarray) -> None:
    """Hands sheets and cloud of `monitor.config.images` images of the set to the monitor.

    embeddings_nD: float32 [n, D]; index_n: the number in the source of each of them"""
    labels_n = np.asarray(source.labels)[index_n]
    chosen = some_identities(labels_n, monitor.config.images)
    if len(chosen) < 2:
        return
    vectors_mD, labels_m, index_m = normalize(embeddings_nD[torch.from_numpy(chosen)].float()).cpu(), labels_n[chosen], index_n[chosen]
    genuine, impostors = hardest_pairs(vectors_mD, labels_m)
    names = [printable(source.identities[label]) for label in labels_m]
    for kind, pairs in (("genuine pairs that look most different", genuine), ("impostor pairs that look most alike", impostors)):
        if pairs:
            numbers = [index_m[at] for pair in pairs for at in pair[:2]]
            images = _images(source, data, np.array(numbers), data.image_size)
            titles = [f"{pair.cosine:.3f}  {_short(names[pair.first])} / {_short(names[pair.second])}" for pair in pairs]
            title = f"{name}: {kind}, among {len(chosen):,} images"
            monitor.figure(step, of_set(name, f"hard_{kind.split()[0]}_pairs"), _sheet(images, titles, title))
    monitor.points(step, name, vectors_mD.numpy(), names, _images(source, data, index_m, THUMBNAIL))


def some_identities(labels_n: np.ndarray, most: int) -> np.ndarray:
    """Places of the images of whole identities, at most `most` of them: all, or identities evenly spread over the set."""
    identities, counts = np.unique(labels_n, return_counts=True)
    order = np.random.default_rng(0).permutation(len(identities))
    fits = counts[order].cumsum() <= most
    return np.flatnonzero(np.isin(labels_n, identities[order[fits]]))


def hardest_pairs(vectors_nD: Tensor, labels_n: np.ndarray) -> tuple[list[Pair], list[Pair]]:
    """The genuine pairs with the lowest and the impostor pairs with the highest cosine, at most PAIRS of each, no image in two of a kind.

    vectors_nD: unit vectors, float32 on the CPU. Looks at all pairs, in blocks of rows."""
    label_n = torch.from_numpy(labels_n)
    place_n = torch.arange(len(label_n))
    found: tuple[list[Pair], list[Pair]] = [], []
    for start in range(0, len(label_n), 512):
        cosine_bn = vectors_nD[start : start + 512] @ vectors_nD.T
        same_bn = label_n[start : start + 512, None] == label_n
        later_bn = place_n[start : start + 512, None] < place_n
        for pairs, score_bn in (
            (found[0], -cosine_bn.masked_fill(~(same_bn & later_bn), 9)),
            (found[1], cosine_bn.masked_fill(same_bn | ~later_bn, -9)),
        ):
            score, at = score_bn.flatten().topk(min(32 * PAIRS, score_bn.numel()))
            for value, place in zip(score.tolist(), at.tolist(), strict=True):
                if value > -2:
                    row, column = divmod(place, len(label_n))
                    pairs.append(Pair(start + row, column, float(cosine_bn[row, column])))
    genuine, impostors = found
    return _apart(sorted(genuine, key=lambda pair: pair.cosine)), _apart(sorted(impostors, key=lambda pair: -pair.cosine))


def _apart(pairs: Sequence[Pair]) -> list[Pair]:
    taken: set[int] = set()
    chosen: list[Pair] = []
    for pair in pairs:
        if len(chosen) < PAIRS and not taken & {pair.first, pair.second}:
            chosen.append(pair)
            taken |= {pair.first, pair.second}
    return chosen


def _images(source: Source, data: DataConfig, index_n: np.ndarray, size: int) -> np.ndarray:
    """RGB, uint8 [n, size, size, 3]; black where an image cannot be read any more."""
    from dali_loaders.loader import evaluation_batches  # here, so that reports and figures need no DALI

    images = np.zeros((len(index_n), size, size, 3), np.uint8)
    places: dict[int, list[int]] = {}
    for place, index in enumerate(index_n.tolist()):
        places.setdefault(index, []).append(place)
    for batch in evaluation_batches(source, data, index_n, min(_AT_ONCE, len(index_n))):
        if len(batch.images):
            levels = (batch.images.float() * 127.5 + 127.5).clamp(0, 255)
            if size != levels.shape[-1]:
                levels = interpolate(levels, size, mode="area")
            for index, image in zip(np.asarray(batch.indices).tolist(), levels.round().byte().permute(0, 2, 3, 1).numpy(), strict=True):
                images[places[index]] = image
    return images


def _sheet(images_nHWC: np.ndarray, titles: Sequence[str], title: str) -> Figure:
    """Pairs of images, four in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(titles) // 4)
    figure = Figure(figsize=(13, 0.5 + 2.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for at, axes in enumerate(figure.subplots(rows, 4, squeeze=False).flat):
        axes.axis("off")
        if at < len(titles):
            axes.imshow(np.concatenate([images_nHWC[2 * at], images_nHWC[2 * at + 1]], axis=1))
            axes.set_title(titles[at], fontsize=8)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"
