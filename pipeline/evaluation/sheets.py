"""Evaluation images to look at: the pairs that a network gets most wrong, side by side, and a cloud of all for TensorBoard's projector."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from dali_loaders.config import DataConfig
from dali_loaders.names import printable
from dali_loaders.sources import Source
from pipeline.monitor import Monitor, of_set
from pipeline.monitor.pictures import jpeg_of, tiled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS = 16  # of each kind on a sheet
THUMBNAIL = 32  # pixels
LARGEST = 112  # pixels of the side of an image in a file of hard pairs
_AT_ONCE = 64


class Pair(NamedTuple):
    first: int
    second: int
    cosine: float


def show(
    monitor: Monitor, step: int, name: str, source: Source, data: DataConfig, embeddings_nD: Tensor, index_n: np.ndarray
) -> dict[str, Any]:
    """Hands sheets and cloud of `monitor.config.images` images of the set to the monitor, and returns the pairs of the sheets for `keep`.

    embeddings_nD: float32 [n, D]; index_n: the number in the source of each of them"""
    labels_n = np.asarray(source.labels)[index_n]
    chosen = some_identities(labels_n, monitor.config.images)
    kept: dict[str, Any] = {"step": step, "name": name, "images": len(chosen)}
    if len(chosen) < 2:
        return kept
    vectors_mD, labels_m, index_m = normalize(embeddings_nD[torch.from_numpy(chosen)].float()).cpu(), labels_n[chosen], index_n[chosen]
    genuine, impostors = hardest_pairs(vectors_mD, labels_m)
    names = [printable(source.identities[label]) for label in labels_m]
    used = sorted({at for pair in genuine + impostors for at in pair[:2]})
    thumbnails_m, large_u = _images(source, data, index_m, np.array(used))
    for kind, pairs in (("genuine pairs that look most different", genuine), ("impostor pairs that look most alike", impostors)):
        if pairs:
            images = large_u[np.searchsorted(used, [at for pair in pairs for at in pair[:2]])]
            titles = [f"{pair.cosine:.3f}  {_short(names[pair.first])} / {_short(names[pair.second])}" for pair in pairs]
            title = f"{name}: {kind}, among {len(chosen):,} images"
            monitor.figure(step, of_set(name, f"hard_{kind.split()[0]}_pairs"), _sheet(images, titles, title))
            kept[kind.split()[0]] = [
                {"cosine": round(pair.cosine, 6), "identities": [names[pair.first], names[pair.second]], "jpeg": _side_by_side(*two)}
                for pair, two in zip(pairs, images.reshape(-1, 2, *images.shape[1:]), strict=True)
            ]
    monitor.points(step, name, vectors_mD.numpy(), names, thumbnails_m)
    return kept


def keep(path: Path, of: Any, pairs: dict[str, Any]) -> None:
    """Writes what `show` returned, and what the set is, as JSON: 0.2 MB for images of 64 pixels, at most 1.1 MB. OSError where that fails;
    then the file is as it was."""
    new = path.with_name(f"{path.name}.tmp")
    new.write_text(json.dumps({"of": of, **pairs}))
    os.replace(new, path)


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


def _images(source: Source, data: DataConfig, index_m: np.ndarray, used_u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RGB, uint8: all images as thumbnails [m, THUMBNAIL, THUMBNAIL, 3], and those at the places `used_u` (rising) as they are. Black where
    an image cannot be read any more."""
    from dali_loaders.loader import evaluation_batches  # here, so that reports and figures need no DALI

    thumbnails = np.zeros((len(index_m), THUMBNAIL, THUMBNAIL, 3), np.uint8)
    large = np.zeros((len(used_u), data.image_size, data.image_size, 3), np.uint8)
    place_of = {int(index): place for place, index in enumerate(index_m)}
    row_of = {int(place): row for row, place in enumerate(used_u)}
    for batch in evaluation_batches(source, data, index_m, min(_AT_ONCE, len(index_m))):
        if not len(batch.images):
            continue
        levels = (batch.images.float() * 127.5 + 127.5).clamp(0, 255)
        small = interpolate(levels, (THUMBNAIL, THUMBNAIL), mode="area")
        for at, index in enumerate(np.asarray(batch.indices).tolist()):
            place = place_of[index]
            thumbnails[place] = _pixels(small[at])
            if place in row_of:
                large[row_of[place]] = _pixels(levels[at])
    return thumbnails, large


def _pixels(levels_CHW: Tensor) -> np.ndarray:
    return levels_CHW.round().byte().permute(1, 2, 0).numpy()


def _side_by_side(first_HWC: np.ndarray, second_HWC: np.ndarray) -> str:
    """Both images in one JPEG file, at most LARGEST high, in base64."""
    import cv2

    size = min(LARGEST, len(first_HWC))
    small = [cv2.resize(image_HWC, (size, size), interpolation=cv2.INTER_AREA) for image_HWC in (first_HWC, second_HWC)]
    gap = np.full((size, max(2, size // 20), 3), 255, np.uint8)
    return base64.b64encode(jpeg_of(np.concatenate([small[0], gap, small[1]], axis=1))).decode()


def _sheet(images_nHWC: np.ndarray, titles: Sequence[str], title: str) -> Figure:
    """Pairs of images, four in a row, each with its title above it. One picture with texts: many axes take seconds to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size, columns = images_nHWC.shape[1], min(4, len(titles))
    wide = np.concatenate([images_nHWC[::2], images_nHWC[1::2]], axis=2)
    top, side = round(0.3 * size), round(0.1 * size)
    sheet = tiled(np.pad(wide, [(0, 0), (top, 0), (0, side), (0, 0)], constant_values=255), columns)
    figure = Figure(figsize=(3.3 * columns, 0.6 + 3.3 * columns * sheet.shape[0] / sheet.shape[1]), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axis("off")
    axes.imshow(sheet)
    axes.set_title(title, fontsize=11, parse_math=False)  # names of files may have any two $
    height, width = top + size, 2 * size + side
    for at, text in enumerate(titles):
        axes.text(at % columns * width, at // columns * height + 0.8 * top, text, fontsize=8, parse_math=False)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"
