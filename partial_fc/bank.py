"""The bank: the last feature of each class of this rank and its step, sharded like the prototypes; its rows can replace prototypes."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.unit_rows import EPSILON, unit_rows


class Bank(NamedTuple):
    """Written after a step from its gathered batch, and read in later steps; it has no gradient."""

    features_SD: Tensor  # unit rows in float32; 0 for a class without a feature
    steps_S: Tensor  # int64: the step of each feature; -1 for none

    def fresh(self, step: int, staleness: int | None = None) -> Tensor:
        """bool [S]: classes whose feature is at most `staleness` steps old in this step; with None all classes that have one."""
        is_there_S = self.steps_S >= 0
        return is_there_S if staleness is None else is_there_S & (self.steps_S >= step - staleness)

    @torch.no_grad()
    def write(self, features_BD: Tensor, labels_B: Tensor, first_class: int, step: int) -> None:
        """Keeps the unit feature of each class of the shard that is in the batch: with several samples, that of the last one. Features
        without a direction are left out. Communicates nothing, and the host waits for nothing."""
        rows = len(self.steps_S)
        if not rows or not len(labels_B):
            return
        units_BD, norms_B = unit_rows(features_BD)
        rows_B = labels_B - first_class
        is_kept_B = (rows_B >= 0) & (rows_B < rows) & (norms_B >= EPSILON)
        sample_B = last_of_each(rows_B.where(is_kept_B, -1))
        # Samples of one class write the same values, so their order does not matter. All other samples repeat the first kept sample's
        # write, or write what the row holds if none is kept: selecting the kept ones would make the host wait for the device.
        first_1 = is_kept_B.byte().argmax(dim=0, keepdim=True)
        is_any_1 = is_kept_B.index_select(0, first_1)
        sample_B = sample_B.where(is_kept_B, sample_B.index_select(0, first_1))
        rows_B = rows_B.where(is_kept_B, rows_B.index_select(0, first_1)).clamp(0, rows - 1)
        written_BD = units_BD.index_select(0, sample_B).to(self.features_SD.dtype)
        self.features_SD.index_copy_(0, rows_B, written_BD.where(is_any_1[:, None], self.features_SD.index_select(0, rows_B)))
        steps_B = self.steps_S.index_select(0, rows_B)
        self.steps_S.index_copy_(0, rows_B, torch.full_like(steps_B, step).where(is_any_1, steps_B))


def last_of_each(keys_B: Tensor) -> Tensor:
    """int64 [B]: the place of the last entry with the same key."""
    sorted_B, order_B = keys_B.sort(stable=True)
    return order_B[torch.searchsorted(sorted_B, keys_B, right=True) - 1]


def empty(rows: int, width: int, device: torch.device) -> Bank:
    """A bank [rows, width] without features. ValueError, before anything is allocated, if it would not fit into the device's memory."""
    check_fits(rows, width, available_bytes(device))
    return Bank(torch.zeros(rows, width, dtype=torch.float32, device=device), torch.full((rows,), -1, device=device))


def check_fits(rows: int, width: int, available: float) -> None:
    """`available` in bytes."""
    needed = rows * (4 * width + 8)
    if needed > available:
        raise ValueError(
            f"the bank of last features needs {needed / 1e9:.3g} GB on this rank, for {rows} classes of width {width}, but only "
            f"{available / 1e9:.3g} GB are free: use more ranks, or a loss and a substitution_source without it"
        )


def available_bytes(device: torch.device) -> float:
    """Free memory of a device; infinite where it is unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, free to use
        return torch.cuda.mem_get_info(device)[0] + cached
    table = Path("/proc/meminfo")
    if device.type == "cpu" and table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return math.inf
