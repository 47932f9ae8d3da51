"""Embeddings of a source: every rank embeds a contiguous share of the images and receives all of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from dali_loaders.config import DataConfig
from dali_loaders.progress import progress
from dali_loaders.sources import Source

logger = logging.getLogger(__name__)
NAMED = 5  # unreadable images that a message names; more are only counted


@dataclass(frozen=True)
class Breaks:
    """How an evaluation is broken off."""

    wanted: Callable[[], bool]  # asked before each batch of this rank, and each block of pairs
    agree: Callable[[], None]  # called by all ranks once each has done its batches, or its pairs, or broken off; raises on all, or on none


Look = Callable[[Source, Tensor, np.ndarray], None]  # gets a source, its embeddings, and the number in the source of each of them


def embed(
    model: Callable[[Tensor], Tensor],
    source: Source,
    data: DataConfig,
    *,
    batch_size: int,
    flip: bool,
    unit: bool = True,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    breaks: Breaks | None = None,
) -> tuple[Tensor, np.ndarray]:
    """Embeddings float32 [n, D] and numbers int64 [n] of the n readable images, in source order, on every rank.

    `model` maps images float32 [b, 3, H, W] to features [b, D]; it runs in eval mode and gets its modes back. `flip` adds the
    features of the mirror image (the protocol of the face pair sets). Rows have unit length; without `unit` they are the features as
    they are. An unreadable image is left out and named in the log. With world_size > 1 all ranks of `group` must call: four
    all-gathers, 4 n (D + 2) bytes received per rank.
    Ranks may make different numbers of forward calls, so the model must not communicate: DDP is unwrapped here.
    Raises ValueError when no image is readable.
    """
    from dali_loaders.loader import evaluation_batches  # here, so that reports and figures need no DALI

    device = torch.device(device)
    # Whole batches, which are the same on any number of ranks: the last bits of a network's features depend on the size of its batch.
    batches = -(-len(source) // batch_size)
    first, last = (min(batches * at // world_size * batch_size, len(source)) for at in (rank, rank + 1))
    share = np.arange(first, last)
    features: list[Tensor] = []
    indices: list[np.ndarray] = []
    if isinstance(model, DistributedDataParallel):
        model = model.module
    with torch.no_grad(), _eval_mode(model), progress(f"embedding {os.path.basename(source.path)}", len(share)) as done:
        for batch in evaluation_batches(source, data, share, batch_size, device, channels_last=True) if len(share) else ():
            if breaks and breaks.wanted():
                break
            done.add(batch_size)
            if len(batch.images) == 0:
                continue
            feature_bD = features_of(model, batch.images, flip)
            features.append(normalize(feature_bD) if unit else feature_bD)
            indices.append(np.asarray(batch.indices, dtype=np.int64))
    if breaks:
        breaks.agree()
    embedding_nD = torch.cat(features) if features else torch.zeros(0, 0, device=device)
    index_n = torch.from_numpy(np.concatenate(indices) if indices else np.zeros(0, np.int64)).to(device)
    if world_size > 1:
        embedding_nD = _gather_rows(embedding_nD, world_size, group)
        index_n = _gather_rows(index_n[:, None], world_size, group)[:, 0]
    readable = index_n.cpu().numpy()
    _report_unreadable(source, readable, rank)
    return embedding_nD, readable


def features_of(model: Callable[[Tensor], Tensor], images_b3HW: Tensor, flip: bool) -> Tensor:
    """Features float32 [b, D]; with `flip` the sum with those of the mirror image. A row whose norm is not finite is NaN throughout: a
    norm that overflows would make a row of zeros of features that have exploded."""
    feature_bD = model(images_b3HW).float()
    if flip:
        feature_bD = feature_bD + model(torch.flip(images_b3HW, dims=[3])).float()
    return torch.where(feature_bD.norm(dim=1, keepdim=True).isfinite(), feature_bD, torch.nan)


@contextmanager
def _eval_mode(model: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Modes are restored module by module, because a training loop may keep some (frozen batch norms) in eval mode all the time."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _gather_rows(rows_nD: Tensor, world_size: int, group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all ranks in rank order. Two all-gathers: the shapes, then the rows padded to the longest share.

    A rank without rows passes a [0, 0] tensor: it never learnt the width.
    """
    shape = torch.tensor(rows_nD.shape, dtype=torch.int64, device=rows_nD.device)
    shapes = [torch.empty_like(shape) for _ in range(world_size)]
    dist.all_gather(shapes, shape, group=group)
    counts, widths = zip(*(s.tolist() for s in shapes), strict=True)
    padded = rows_nD.new_zeros(max(counts), max(widths))
    padded[: rows_nD.shape[0], : rows_nD.shape[1]] = rows_nD
    gathered = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def _report_unreadable(source: Source, readable: np.ndarray, rank: int) -> None:
    if len(readable) == len(source):
        return
    missing = np.setdiff1d(np.arange(len(source)), readable)
    names = ", ".join(source.name(int(i)) for i in missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
    if len(readable) == 0:
        raise ValueError(f"{source.path}: none of its {len(source)} images can be decoded ({names}); expected JPEG or PNG images.")
    if rank == 0:
        logger.warning("%s: %d of %d images cannot be decoded and are left out: %s", source.path, len(missing), len(source), names)
