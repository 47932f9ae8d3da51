"""Sums of losses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from partial_fc.global_batch import GlobalBatch
from partial_fc.losses.base import Loss, Needs, build, name_of, register
from partial_fc.losses.margins import CosFace
from partial_fc.losses.thresholds import USS

TITLE = "Sums of losses"


class _Parts(Loss):
    """A loss made of others. Each part has its own names for what it keeps."""

    def weighted(self) -> list[tuple[str, float, Loss]]:
        """(name, weight, loss) of each part."""
        raise NotImplementedError

    def __call__(self, batch: GlobalBatch) -> Tensor:
        return torch.stack([weight * loss(batch.part(name)) for name, weight, loss in self.weighted()]).sum()

    def learned(self, num_classes: int) -> dict[str, float]:
        return {f"{name}_{key}": value for name, _, loss in self.weighted() for key, value in loss.learned(num_classes).items()}

    def learned_by_class(self, num_classes: int) -> dict[str, float]:
        return {f"{name}_{key}": value for name, _, loss in self.weighted() for key, value in loss.learned_by_class(num_classes).items()}

    def tracked(self) -> dict[str, float | Tensor]:
        return {f"{name}_{key}": value for name, _, loss in self.weighted() for key, value in loss.tracked().items()}

    def queued(self) -> dict[str, int]:
        return {f"{name}_{key}": rows for name, _, loss in self.weighted() for key, rows in loss.queued().items()}

    def uses_bank(self) -> bool:
        return any(loss.uses_bank() for _, _, loss in self.weighted())

    def needs_positives(self) -> Needs:
        parts = {loss.needs_positives() for _, weight, loss in self.weighted() if weight}
        return "no" if parts <= {"no"} else "only" if parts == {"only"} else "partly"


@register("unitsface")
class UniTSFace(_Parts):
    """CosFace plus USS. Li et al., NeurIPS 2023: scale 64, margins 0.4 and 0.1.

    threshold, source, start, staleness  see `uss`: the authors compare with a bank of last features
    weighting                            "sum": weights 1 and 1, as in the authors' code; "average": one half each, as in the paper"""

    formula = (
        r"w \left[\mathrm{softplus}\left(a_i - s (t_i - m_1)\right) + \mathrm{softplus}\left(b - s (p_i - m_2)\right) + "
        r"\sum_j\mathrm{softplus}\left(s n'_{ij} - b\right)\right],\qquad w = 1\text{ or } \frac{1}{2},\qquad m_1 = \text{margin},\quad "
        r"m_2 = \text{sample margin},\quad p_i, n'_{ij} = \text{cosines with samples}"
    )
    use = "Among the best losses of our comparison on a small set; needs batches with several images per identity."
    scale: float = 64.0
    margin: float = 0.4
    sample_margin: float = 0.1  # on the cosine with samples of the identity
    threshold: float | None = None
    source: Literal["batch", "bank"] = "batch"
    start: int = 0
    staleness: int | None = None
    weighting: Literal["sum", "average"] = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.weighted()  # checks the rest

    def weighted(self) -> list[tuple[str, float, Loss]]:
        weight = 1.0 if self.weighting == "sum" else 0.5
        uss = USS(self.scale, self.sample_margin, self.threshold, self.source, self.start, self.staleness)
        return [("cosface", weight, CosFace(self.scale, self.margin)), ("uss", weight, uss)]


@register("sum")
class Sum(_Parts):
    """A weighted sum of any losses.

    parts    each as build() takes it: {"name": "gce", "scale": 32.0}
    weights  one per part; 1 each by default"""

    formula = r"\sum_k w_k L_k,\qquad w_k, L_k = \text{weights and parts}"
    use = "Any combination, from a recipe: parts and weights."
    parts: tuple[Mapping[str, Any], ...] = ({"name": "cosface"}, {"name": "uss"})
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts or any(not isinstance(part, Mapping) or not isinstance(part.get("name"), str) for part in self.parts):
            raise ValueError("a sum needs at least one part, and each part a 'name': parts=({'name': 'cosface'}, {'name': 'uss'})")
        if self.weights and len(self.weights) != len(self.parts):
            raise ValueError(f"a sum of {len(self.parts)} parts got {len(self.weights)} weights: give one per part, or none")
        if not all(0 <= weight < math.inf for weight in self.weights):
            raise ValueError(f"a sum's weights are {self.weights}, but must be 0 or more")
        try:
            self.weighted()  # checks the rest
        except TypeError as error:
            raise ValueError(f"a part of a sum has a value of the wrong type: {error}") from None

    def weighted(self) -> list[tuple[str, float, Loss]]:
        weights = self.weights or (1.0,) * len(self.parts)
        return [(str(place), weights[place], build(**part)) for place, part in enumerate(self.parts)]

    def with_margins(self, share: float) -> Sum:
        warmed = [loss.with_margins(share) for _, _, loss in self.weighted()]
        return replace(self, parts=tuple({"name": name_of(loss), **vars(loss)} for loss in warmed))
