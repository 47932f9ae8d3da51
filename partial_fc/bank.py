"""The bank: the last feature of each class of this rank, and the step that brought it. It is sharded like the prototypes, in place of
which its rows may stand, or with which they are mixed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from partial_fc.columns import Columns
from partial_fc.kernels.entries import EPSILON, inverse_norms, unit_rows
from partial_fc.sources import Collector, Source


class Bank(NamedTuple):
    """Written after a step, from its gathered batch, and read in later ones; it has no gradient."""

    features_SD: Tensor  # unit rows in float32; of a class without a feature 0
    steps_S: Tensor  # int64: the step that brought each; -1 for none

    def fresh(self, step: int, staleness: int | None = None) -> Tensor:
        """bool [S]: whose feature is at most so many steps old in this step; with None, whoever has one."""
        is_there_S = self.steps_S >= 0
        return is_there_S if staleness is None else is_there_S & (self.steps_S >= step - staleness)

    @torch.no_grad()
    def write(self, features_BD: Tensor, labels_B: Tensor, first_class: int, step: int) -> None:
        """Keeps the unit feature of each class of the shard that is in the batch; of several samples the last one's. Features without a
        direction are left out. Communicates nothing, and the host waits for nothing."""
        rows = len(self.steps_S)
        if not rows or not len(labels_B):
            return
        units_BD, norms_B = unit_rows(features_BD)
        rows_B = labels_B - first_class
        is_kept_B = (rows_B >= 0) & (rows_B < rows) & (norms_B >= EPSILON)
        sample_B = last_of_each(rows_B.where(is_kept_B, -1))
        # Samples of one class write the same row the same, so that their order does not matter. The others repeat what the first of
        # these writes, or where there is none, what a row holds: picking them out would need the host to wait for the device.
        first_1 = is_kept_B.byte().argmax(dim=0, keepdim=True)
        is_any_1 = is_kept_B.index_select(0, first_1)
        sample_B = sample_B.where(is_kept_B, sample_B.index_select(0, first_1))
        rows_B = rows_B.where(is_kept_B, rows_B.index_select(0, first_1)).clamp(0, rows - 1)
        written_BD = units_BD.index_select(0, sample_B).to(self.features_SD.dtype)
        self.features_SD.index_copy_(0, rows_B, written_BD.where(is_any_1[:, None], self.features_SD.index_select(0, rows_B)))
        steps_B = self.steps_S.index_select(0, rows_B)
        self.steps_S.index_copy_(0, rows_B, torch.full_like(steps_B, step).where(is_any_1, steps_B))


def last_of_each(keys_B: Tensor) -> Tensor:
    """int64 [B]: the place of the last one of the same key."""
    sorted_B, order_B = keys_B.sort(stable=True)
    return order_B[torch.searchsorted(sorted_B, keys_B, right=True) - 1]


def empty(rows: int, width: int, device: torch.device) -> Bank:
    """A bank [rows, width] without features. ValueError, before anything is allocated, if it would not fit into the device's memory."""
    check_fits(rows, width, available_bytes(device))
    return Bank(torch.zeros(rows, width, device=device), torch.full((rows,), -1, device=device))


def check_fits(rows: int, width: int, available: float) -> None:
    """`available` in bytes."""
    needed = rows * (4 * width + 8)
    if needed > available:
        raise ValueError(
            f"the bank of last features needs {needed / 1e9:.3g} GB on this rank, for {rows} classes of width {width}, but only "
            f"{available / 1e9:.3g} GB are free: use more ranks, or a loss and a substitution_source without it"
        )


def available_bytes(device: torch.device) -> float:
    """Of memory on a device; infinite where nobody tells."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, free to be used
        return torch.cuda.mem_get_info(device)[0] + cached
    table = Path("/proc/meminfo")
    if device.type == "cpu" and table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return math.inf


def mixed(columns: Columns, bank: Bank, share_S: Tensor) -> Columns:
    """The columns with each prototype mixed with its class's row of the bank: see Mixed. share_S by row of the shard, in [0, 1]. Samples
    that are columns stay what they are."""
    if not len(bank.steps_S):
        return columns
    rows_n = columns.rows_n
    share_n = share_S if rows_n is None else share_S.index_select(0, rows_n)
    if columns.samples is not None:
        if rows_n is None:
            rows_n = torch.arange(len(share_S), device=share_S.device)
        others_n = rows_n.new_zeros(columns.samples.stop - columns.samples.start)
        rows_n, share_n = torch.cat([rows_n, others_n]), torch.cat([share_n, others_n.to(share_n.dtype)])
    return columns._replace(source=Mixed(columns.source, bank.features_SD, rows_n, share_n))


class Mixed:
    """(1 - share) w / |w| + share f: prototypes w of another source, with rows f of a bank, of which nothing flows back. Where the share is
    1, nothing flows to w either. rows_n: the row of the bank of each prototype; None where they are all, in order."""

    def __init__(self, prototypes: Source, bank_SD: Tensor, rows_n: Tensor | None, share_n: Tensor) -> None:
        self.prototypes, self.bank_SD, self.rows_n = prototypes, bank_SD, rows_n
        self.share_n1 = share_n[:, None]
        self.tensors: tuple[Tensor, ...] = (*prototypes.tensors, bank_SD)  # for torch to notice if it changes before backward
        self.shape, self.memory, self.is_consumed = prototypes.shape, prototypes.memory, prototypes.is_consumed
        self.loaded = bank_SD.new_empty(0)

    def load(self, rows: slice | Tensor) -> Tensor:
        prototypes_nD, share_n1 = self.prototypes.load(rows), self.share_n1[rows]
        features_nD = self.bank_SD[rows if self.rows_n is None else self.rows_n[rows]]
        factor_n1 = (1 - share_n1) * inverse_norms(prototypes_nD)
        if isinstance(rows, Tensor):
            return (prototypes_nD * factor_n1).addcmul_(features_nD, share_n1)
        if len(self.loaded) < len(prototypes_nD):
            self.loaded = self.memory.empty((len(prototypes_nD), self.shape[1]), prototypes_nD.dtype, prototypes_nD.device)
        return torch.mul(prototypes_nD, factor_n1, out=self.loaded[: len(prototypes_nD)]).addcmul_(features_nD, share_n1)

    def room(self) -> Tensor | None:
        return self.prototypes.room()

    def collect(self, room: Tensor | None = None) -> Collector:
        return _MixedCollector(self, self.prototypes.collect(room))


class _MixedCollector:
    def __init__(self, mixed: Mixed, collector: Collector) -> None:
        self.mixed, self.collector = mixed, collector

    def store(self, rows: slice, gradient_nD: Tensor) -> None:
        prototypes_nD = self.mixed.prototypes.load(rows)
        inverse_n1 = inverse_norms(prototypes_nD)
        along_n1 = (gradient_nD * prototypes_nD).sum(dim=1, keepdim=True) * inverse_n1.square()
        across_nD = torch.addcmul(gradient_nD, prototypes_nD, along_n1, value=-1)
        self.collector.store(rows, across_nD.mul_((1 - self.mixed.share_n1[rows]) * inverse_n1))

    def gradients(self) -> tuple[Tensor | None, ...]:
        return (*self.collector.gradients(), None)
