"""The classifier of an arcface_torch run: one file per GPU, merged into one matrix of prototypes."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.interop.weights import read_file

# checkpoint_gpu_3.pt; before 2022 softmax_fc_gpu_3.pt, and rank_3_softmax_weight.pt, or rank:3_softmax_weight.pt, with a bare tensor.
RANK = re.compile(r"(?:checkpoint_gpu_|softmax_fc_gpu_|rank[_:])(\d+)(?:_softmax_weight)?\.pth?")


def is_classifier_file(path: str | Path) -> bool:
    """Whether a file has one of the names under which arcface_torch keeps nothing but a rank's part of the classifier."""
    return RANK.fullmatch(Path(path).name) is not None and not Path(path).name.startswith("checkpoint")


def has_classifier(loaded: Any) -> bool:
    return isinstance(loaded, Mapping) and "state_dict_softmax_fc" in loaded


def merge_classifier(parts: Sequence[str | Path | Mapping[str, Any]], num_classes: int | None = None) -> Tensor:
    """The prototypes [C, width], float32, of all ranks' checkpoint_gpu_{rank}.pt files, in any order, or of what they hold.

    Rank r of n holds C // n + (r < C % n) classes. Raises ValueError for a file without a classifier, for NaN or infinity, and where the
    rows do not fit together; only `num_classes` tells that the last ranks' files are missing.
    """
    if not parts:
        raise ValueError("there is no classifier file to merge: name all checkpoint_gpu_*.pt files of a run.")
    weights = [_classifier_rows(part) for part in _in_rank_order(parts)]
    rows, width = sum(len(weight) for weight in weights), weights[0].shape[1]
    if num_classes is not None and rows != num_classes:
        raise ValueError(
            f"the {len(parts)} classifier files hold {rows} classes together, but {num_classes} are expected: is a rank missing?"
        )
    for rank, weight in enumerate(weights):
        shape = (rows // len(parts) + (rank < rows % len(parts)), width)
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"the classifier of rank {rank} is {tuple(weight.shape)}, but {shape} is its part of {rows} classes: is a rank missing?"
            )
    merged = torch.cat(weights).float()
    broken = torch.nonzero(~torch.isfinite(merged).all(dim=1)).flatten().tolist()
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(f"the classifier cannot be used, since it holds NaN or infinity: in classes {str(broken[:3])[1:-1]}{more}.")
    return merged


def _in_rank_order(parts: Sequence[str | Path | Mapping[str, Any]]) -> list[str | Path | Mapping[str, Any]]:
    """Files by the rank in their names, so that a shell's gpu_10 before gpu_2 does no harm; others as given."""
    matches = [None if isinstance(part, Mapping) else RANK.fullmatch(Path(part).name) for part in parts]
    numbers = [int(match[1]) for match in matches if match]
    if len(numbers) < len(parts):
        return list(parts)
    for rank, number in enumerate(sorted(numbers)):
        if rank != number:
            raise ValueError(f"of the {len(parts)} classifier files, that of rank {rank} is missing or another one is named twice.")
    return [part for _, part in sorted(zip(numbers, parts, strict=True), key=lambda pair: pair[0])]


def _classifier_rows(part: str | Path | Mapping[str, Any]) -> Tensor:
    name, loaded = ("the given state dict", part) if isinstance(part, Mapping) else (str(part), read_file(part))
    inner = loaded.get("state_dict_softmax_fc", loaded) if isinstance(loaded, Mapping) else loaded
    weight = inner.get("weight") if isinstance(inner, Mapping) else inner
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(
            f"{name} holds no classifier (state_dict_softmax_fc -> weight [classes, width]): train with save_all_states = True."
        )
    return weight
