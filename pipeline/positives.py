"""Whether there is something to learn: several images of an identity in a batch, and something that moves."""

from __future__ import annotations

import numpy as np
from torch import nn

from partial_fc.losses import Loss, name_of


def check_positives(loss: Loss, counts_C: np.ndarray, batch: int, images_per_identity: int) -> str | None:
    """A line to say if batches rarely hold what `loss` needs, None if all is well; ValueError if they never do and the loss learns from
    nothing else.

    counts_C: images of each identity
    batch: samples of a micro-batch, over all ranks
    """
    needs = loss.needs_positives()
    if needs == "no":
        return None
    learns = f"the loss {name_of(loss)} learns {needs} from samples whose identity has another image in the batch"
    if images_per_identity > 1:
        if batch > images_per_identity or needs == "partly":
            return None
        raise ValueError(f"{learns}, and from samples of other identities, but a batch of {batch} holds one: use a larger run.batch")
    counts, images = counts_C.astype(float), float(counts_C.sum())
    partners = (batch - 1) * float((counts * (counts - 1)).sum()) / max(1.0, images * (images - 1))  # of a sample, on average
    if partners == 0 and needs == "only":
        raise ValueError(f"{learns}, but no batch ever holds two: use data.images_per_identity=2 or more, and another loss for such a set")
    if partners >= 1:
        return None
    return f"{learns}: of {batch} samples these are {batch * partners:.2g} on average; set data.images_per_identity=2 or more"


def check_something_moves(loss: Loss, backbone: nn.Module) -> None:
    """ValueError if all of the backbone is frozen and the loss, which learns from samples alone, moves no prototypes either."""
    if loss.needs_positives() == "only" and not any(parameter.requires_grad for parameter in backbone.parameters()):
        raise ValueError(f"optimizer.frozen leaves nothing of the backbone to train, and the loss {name_of(loss)} uses no prototypes")
