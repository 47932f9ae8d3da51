"""Identities that may be one person under two names: those whose centres a trained network puts close together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dali_loaders import open_source
from dali_loaders.config import DataConfig
from dali_loaders.progress import progress
from dali_loaders.sources import Source
from pipeline import checkpoint
from pipeline.config import TrainConfig
from pipeline.distributed import join
from pipeline.evaluation.embed import features_of
from pipeline.evaluation.evaluate_checkpoint import load_backbone

MOST = 1000  # pairs that are kept, the nearest first
_BLOCK = 2**22  # cosines held at a time (16 MiB)


class Near(NamedTuple):
    first: str
    second: str
    cosine: float


class Network(NamedTuple):
    backbone: nn.Module
    config: TrainConfig
    device: torch.device


def network(path: str) -> Network:
    """The backbone of the newest checkpoint at `path`, with the configuration of its run. ValueError if it cannot be had."""
    device = join().device
    return Network(*load_backbone(checkpoint.locate(path), device), device)


def near_identities(model: Network, data: str, above: float, reader: str = "native", cache: str = "") -> list[Near]:
    """Pairs of identities of the set `data` whose centres have a cosine above `above`, the nearest first, at most MOST of them. Images are
    embedded as `protoshard eval` does; a centre is the mean of their unit features."""
    source = open_source(data, reader, cache=cache)
    evaluation = model.config.evaluation
    centers_CD = class_centers(model.backbone, source, model.config.data, evaluation.batch_size, evaluation.flip, model.device)
    cosines, pairs = near_pairs(centers_CD, above)
    names = source.identities
    return [Near(names[a], names[b], cosine) for (a, b), cosine in zip(pairs.tolist(), cosines.tolist(), strict=True)]


def class_centers(model: nn.Module, source: Source, data: DataConfig, batch_size: int, flip: bool, device: torch.device) -> Tensor:
    """float32 [C, D] of unit length: the normalised mean of the unit embeddings of each identity's readable images, zero where it has none.
    Embeddings are added as they come, so that memory grows with the identities alone. ValueError where they are not finite."""
    from dali_loaders.loader import evaluation_batches  # here, so that reports and figures need no DALI

    model.eval()
    centers_CD = torch.zeros(0)
    with torch.no_grad(), progress("embedding", len(source)) as done:
        for batch in evaluation_batches(source, data, np.arange(len(source)), batch_size, device, channels_last=True):
            features_bD = features_of(model, batch.images, flip)
            if not centers_CD.numel():
                centers_CD = torch.zeros(len(source.identities), features_bD.shape[1], device=device)
            centers_CD.index_add_(0, batch.labels, normalize(features_bD))
            done.add(len(batch.indices))
    if not centers_CD.numel():
        raise ValueError(f"{source.path}: none of its {len(source)} images can be decoded; run the check without a model.")
    diverged = int((~torch.isfinite(centers_CD).all(dim=1)).sum())
    if diverged:
        raise ValueError(f"{source.path}: the network gives features that are not finite for {diverged} identities; it has diverged.")
    return normalize(centers_CD)


def near_pairs(centers_CD: Tensor, above: float, most: int = MOST) -> tuple[Tensor, Tensor]:
    """Cosines float32 [n] above `above`, which is at least 0, and their pairs of rows int64 [n, 2], the smaller row first. Of more than
    `most` the nearest are kept; the nearest comes first."""
    rows = len(centers_CD)
    step = max(1, _BLOCK // max(1, rows))
    cosines, pairs = centers_CD.new_zeros(0), torch.zeros(0, 2, dtype=torch.int64, device=centers_CD.device)
    for start in range(0, rows, step):
        block_bn = centers_CD[start : start + step] @ centers_CD[start:].T
        # Only columns right of the diagonal: each pair once, and none with itself.
        places = (block_bn.triu(1) > above).nonzero()
        cosines = torch.cat([cosines, block_bn[places[:, 0], places[:, 1]]])
        pairs = torch.cat([pairs, places + start])
        if len(cosines) > most:
            cosines, kept = cosines.topk(most)
            pairs = pairs[kept]
    order = cosines.argsort(descending=True, stable=True)
    return cosines[order], pairs[order]
