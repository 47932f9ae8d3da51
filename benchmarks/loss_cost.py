"""What a step of each loss costs beside one of CosFace: both on the same prototypes, in turn; every pair of steps gives one ratio."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from partial_fc import PartialFC, losses
from pipeline.measuring import seconds


def rows(names: list[str], classes: int, batch: int, width: int, dtype: str, pairs: int) -> Iterator[dict[str, Any]]:
    """One row per loss with its defaults. Every identity of the batch comes with two samples; forward and backward, without update."""
    if classes < 2 or batch < 4 or batch % 2 or pairs < 1:
        raise ValueError(f"--classes is {classes}, --batch {batch} and --pairs {pairs}, but must be at least 2, an even 4 and 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    features_BD = 8.0 * torch.randn(batch, width, generator=generator).to(device)
    labels_B = torch.randint(classes, (batch // 2,), generator=generator).repeat_interleave(2).to(device)
    class_counts = torch.randint(2, 50, (classes,), generator=generator)
    plain = PartialFC(classes, width, losses.build("cosface"), dtype=dtype, device=device)
    for name in names:
        loss = losses.build(name)
        other = PartialFC(classes, width, loss, dtype=dtype, device=device, class_counts=class_counts)
        other.prototypes, other.pool = plain.prototypes, plain.pool
        other.step = 10_000  # past the step at which some losses switch parts on
        times = np.array([[seconds(_step(side, features_BD, labels_B), device) for side in (plain, other)] for _ in range(pairs + 2)][2:])
        quartiles = np.quantile(times[:, 1] / times[:, 0], (0.5, 0.25, 0.75)).tolist()
        row: dict[str, Any] = {"loss": name, "classes": classes, "batch": batch, "width": width, "dtype": dtype, "pairs": pairs}
        row |= {"cosface_seconds": float(np.median(times[:, 0])), "seconds": float(np.median(times[:, 1]))}
        yield row | dict(zip(("ratio", "ratio_25", "ratio_75"), quartiles, strict=True))


def _step(classifier: PartialFC, features_BD: Tensor, labels_B: Tensor) -> Any:
    def run() -> None:
        classifier(features_BD.detach().requires_grad_(), labels_B).backward()
        classifier.zero_grad()
        classifier.end_step()

    return run


def as_text(row: dict[str, Any]) -> str:
    return (
        f"{row['loss']}: {row['ratio']:.2f} ({row['ratio_25']:.2f} to {row['ratio_75']:.2f}) of CosFace's {row['cosface_seconds']:.3g} s, "
        f"{row['classes']:,} classes, batch {row['batch']}, {row['dtype']}"
    )
