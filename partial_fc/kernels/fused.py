"""The kernel in Triton, for GPUs: in forward logits stay in registers; backward writes a tile of weights that stays in the L2 cache and
leaves its two products to cuBLAS. All else (targets, gradients of rows computed apart, collectors) is the chunked kernel's."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from partial_fc.kernels import Gradients, Known, Question, Rows, Slopes, Wanted, chunked
from partial_fc.kernels.entries import Apart, Entries
from partial_fc.kernels.walk import LN_2, Chunk, Tile, Walk, Weights, multiply
from partial_fc.sources import Source

UNITS_BYTES = 32 << 20  # of a chunk of unit prototypes, and
WEIGHTS_BYTES = 24 << 20  # of a tile of weights: the product after them finds them in the 50 MB of L2 of an H100
PARTIAL_BYTES = 32 << 20  # of sums per row and block of classes, before they are added up
ROWS = 4  # prototypes per program where no product is involved


class Blocks(NamedTuple):
    """What one program multiplies, m rows and n classes in steps of k of the width, and how."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# The fastest is found by trying, once per kind of question and process: two processes may add up in another order, and round differently.
# In float32 there are no tensor cores, and accumulators compete with operands for registers.
ROUNDED = (Blocks(128, 256, 64, 8, 3), Blocks(128, 128, 64, 4, 3), Blocks(128, 128, 64, 8, 4), Blocks(64, 256, 64, 4, 3))
EXACT = (Blocks(64, 64, 32, 4, 3), Blocks(128, 64, 32, 8, 3))
INTERPRETED = (Blocks(16, 64, 16, 4, 1),)
_fastest: dict[tuple[object, ...], Blocks] = {}


def refusal(question: Question) -> str | None:
    """Why this kernel cannot answer: the rest of a sentence that begins with its name. None if it can."""
    device = question.queries_BD.device
    if not _is_installed():
        return "needs the package triton: pip install triton, or choose kernel 'chunked'"
    if device.type != "cuda" and not _is_interpreted():
        return f"needs a GPU, but the features are on {device}: choose kernel 'auto'"
    if question.map is not None or question.columns:
        return "computes neither maps nor column statistics: choose kernel 'auto'"
    if question.dtype not in (torch.float32, torch.bfloat16):
        return f"multiplies in float32 or bfloat16, but was asked for {question.dtype}: choose kernel 'auto'"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or later: choose kernel 'auto'"
    return None


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _tiles() -> Any:
    from partial_fc.kernels import fused_tiles  # imports triton, which not every machine has

    return fused_tiles


class Reading(Walk):
    """Chunks of unit prototypes, and programs that multiply all queries with one."""

    bias_in_operands = False  # logits in registers take it at no cost

    def __init__(self, question: Question, source: Source) -> None:
        self.reduction = "softplus" if question.reduction == "softplus_sum" else "exp2" if question.bounded else "shifted"
        self.choice = INTERPRETED if _is_interpreted() else EXACT if question.dtype is torch.float32 else ROUNDED
        super().__init__(question, source)

    def largest(self, batch: int, width: int) -> int:
        return max(256, UNITS_BYTES // (width * self.question.dtype.itemsize))

    def allocate(self, batch: int, width: int) -> None:
        self.units = self.queries_BD.new_empty(self.size, width)
        self.inverse = self.question.queries_BD.new_empty(self.size, 1)

    def chunk(self, rows: slice, prototypes_nD: Tensor) -> Chunk:
        prototypes_nD = prototypes_nD.contiguous()
        units_nD, inverse_n1 = self.units[: len(prototypes_nD)], self.inverse[: len(prototypes_nD)]
        if not self.question.normalizes:
            return Chunk(rows, prototypes_nD, None, units_nD.copy_(prototypes_nD))
        self.by_row(_tiles().unit_rows, units_nD, prototypes_nD, inverse_n1)
        return Chunk(rows, prototypes_nD, inverse_n1, units_nD)

    def by_row(self, program: Any, x_nD: Tensor, *tensors: Tensor | None) -> None:
        (count, width), rows = x_nD.shape, 64 if _is_interpreted() else ROWS
        program[(-(-count // rows),)](x_nD, *tensors, count, width, 1 << (width - 1).bit_length(), rows)

    def by_block(self, program: str, chunk: Chunk, *outputs: Tensor | int | None) -> int:
        """Runs a program on all rows and a chunk of classes; the number of classes of its blocks."""
        question, batch, (columns, width) = self.question, len(self.queries_BD), chunk.units_nD.shape
        labels_B, labels_n = (None, None) if question.masks is None else (question.masks[0], question.masks[1][chunk.rows])
        bias_n = None if self.bias_S is None else self.bias_S[chunk.rows]
        inputs = (self.queries_BD, chunk.units_nD, bias_n, question.masked(), labels_B, labels_n, self.apart_rows_B)
        operands = [None if x is None else x.contiguous() for x in inputs]
        kernel = getattr(_tiles(), program)

        def run(blocks: Blocks) -> None:
            grid = (-(-batch // blocks.m) * -(-columns // blocks.n),)
            shapes = (chunk.rows.start, batch, columns, width, self.reduction, blocks.m, blocks.n, blocks.k)
            kernel[grid](*outputs, *operands, *shapes, num_warps=blocks.warps, num_stages=blocks.stages)

        kind = (program, self.reduction, question.dtype, width, batch.bit_length(), self.size.bit_length(), question.queries_BD.device)
        if kind not in _fastest:
            _fastest[kind] = self.choice[0] if len(self.choice) == 1 else min(self.choice, key=lambda blocks: _milliseconds(run, blocks))
        run(_fastest[kind])
        return _fastest[kind].n


def _milliseconds(run: Callable[[Blocks], None], blocks: Blocks) -> float:
    """Of 5 runs after one that compiles; infinite for blocks that the device has no memory for."""
    from triton import OutOfResources

    try:
        run(blocks)
    except OutOfResources:
        return float("inf")
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        run(blocks)
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))


class Total(NamedTuple):
    """Over some classes of the shard, by row."""

    sum_B: Tensor  # of 2^z, 2^(z - largest) or log(1 + e^z) over non-targets
    largest_B: Tensor  # z; -inf where there is no non-target
    rows_B: Tensor  # of the shard, where it is


def _total(walk: Reading) -> Total:
    batch = len(walk.queries_BD)
    most = -(-walk.size // min(blocks.n for blocks in walk.choice))  # blocks of a chunk
    capacity = max(most, min(most * -(-walk.classes // walk.size), PARTIAL_BYTES // (12 * batch)))
    sums, largest = (torch.empty(capacity, batch, device=walk.queries_BD.device) for _ in range(2))
    rows = torch.empty(capacity, batch, device=walk.queries_BD.device, dtype=torch.int32)
    total = Total(sums.new_zeros(batch), sums.new_full((batch,), -torch.inf), rows.new_full((batch,), -1))
    filled = 0
    for chunk in walk.chunks():
        if filled + most > capacity:
            total, filled = _added(total, Total(sums[:filled], largest[:filled], rows[:filled]), walk.reduction), 0
        filled += -(-len(chunk.units_nD) // walk.by_block("row_sums", chunk, sums, largest, rows, filled))
    return _added(total, Total(sums[:filled], largest[:filled], rows[:filled]), walk.reduction)


def _added(total: Total, blocks: Total, reduction: str) -> Total:
    """A total and the sums of blocks, each [blocks, B], in their order."""
    largest_B, block_B = blocks.largest_B.max(dim=0)
    rows_B = blocks.rows_B.gather(0, block_B[None])[0].where(largest_B > total.largest_B, total.rows_B)
    largest_B = torch.maximum(largest_B, total.largest_B)
    if reduction != "shifted":
        return Total(total.sum_B + blocks.sum_B.sum(dim=0), largest_B, rows_B)
    shift_B = largest_B.clamp(min=-1e30)  # -inf minus -inf would be NaN
    sum_B = total.sum_B * torch.exp2(total.largest_B - shift_B) + (blocks.sum_B * torch.exp2(blocks.largest_B - shift_B)).sum(dim=0)
    return Total(sum_B, largest_B, rows_B)


def forward(question: Question, source: Source, keeps: bool = False) -> Rows:
    if not source.shape[0] or not len(question.queries_BD):
        return chunked.forward(question, source)
    with torch.cuda.device_of(question.queries_BD):
        walk = Reading(question, source)
        total = _total(walk)
    has_others_B = total.largest_B > -torch.inf
    apart_B = total.rows_B.to(torch.int64).where(has_others_B, -1)
    # The largest logit counts most: instead of the one in the sum, the one that float32 rows give. Near enough to be subtracted.
    exact = Entries.of(question, source, apart_B)
    exact_B = exact.product_B if question.bias_S is None else exact.product_B + question.bias_S[exact.rows_B]
    exact_B = exact_B.where(has_others_B, -torch.inf)
    sum_B, largest_B = total.sum_B.to(exact_B.dtype), total.largest_B.to(exact_B.dtype)
    shift_B = largest_B if walk.reduction == "shifted" else torch.zeros_like(sum_B)
    finite_B = shift_B.clamp(min=-1e30)
    if walk.reduction == "softplus":
        sum_B = (sum_B - chunked.softplus(largest_B)).clamp(min=0) + chunked.softplus(exact_B)
    else:
        sum_B = (sum_B - torch.exp2(largest_B - finite_B)).clamp(min=0) + torch.exp(exact_B - finite_B * LN_2)
    target_B = Entries.of(question, source, question.target_rows_B).product_B
    return Rows(target_B, sum_B, shift_B * LN_2, apart_B=apart_B)


class Weighing(Reading):
    """Chunks in backward, with their tile of weights."""

    def largest(self, batch: int, width: int) -> int:
        return max(256, min(super().largest(batch, width), WEIGHTS_BYTES // (batch * self.question.dtype.itemsize)))

    def allocate(self, batch: int, width: int) -> None:
        super().allocate(batch, width)
        self.tile = self.queries_BD.new_empty(batch, -(-self.size // 256) * 256)  # whole blocks
        self.wide = self.question.queries_BD.new_empty(self.size, width)
        self.ordered: tuple[Tensor, Tensor] | None = None

    def weigh(self, chunk: Chunk, weights: Weights) -> tuple[Tensor, Tile]:
        self.by_block("weights", chunk, self.tile, weights.shift_B1, self.tile.stride(0))
        weights_Bn = self.tile[:, : len(chunk.units_nD)]
        return weights_Bn, Tile(weights_Bn)

    def prototype_gradient(self, chunk: Chunk, weights_Bn: Tensor, weighted_BD: Tensor, apart: Apart) -> Tensor:
        if self.ordered is None:
            # By class, so that the program of a class finds its rows and adds them one after the other, in the same order every time.
            rows_n, order_n = apart.rows_n.clamp(-1, self.classes).to(torch.int32).sort(stable=True)
            classes = torch.arange(self.classes + 1, device=rows_n.device, dtype=torch.int32)
            self.ordered = torch.searchsorted(rows_n, classes, out_int32=True), apart.gradients_nD[order_n]
        starts_S, gradients_nD = self.ordered
        grad_nD = multiply(weights_Bn.T, weighted_BD, self.wide[: len(chunk.units_nD)])
        starts_n = starts_S[chunk.rows.start : chunk.rows.stop + 1]
        self.by_row(_tiles().prototype_gradients, grad_nD, chunk.prototypes_nD, chunk.inverse_n1, starts_n, gradients_nD)
        return grad_nD


def backward(question: Question, source: Source, known: Known, slopes: Slopes, wanted: Wanted) -> Gradients:
    with torch.cuda.device_of(question.queries_BD):
        walk_type = Weighing if len(question.queries_BD) else Walk
        return chunked.backward(question, source, known, slopes, wanted, walk_type)


def top(question: Question, source: Source, k: int) -> tuple[Tensor, Tensor, Tensor]:
    if k > 1 or not source.shape[0] or not len(question.queries_BD):
        return chunked.top(question, source, k)
    with torch.cuda.device_of(question.queries_BD):
        walk = Reading(question, source)
        total = _total(walk)
    largest_B = total.largest_B.to(question.queries_BD.dtype) / walk.base
    rows_B = total.rows_B.to(torch.int64).where(largest_B > -torch.inf, 0)
    return Entries.of(question, source, question.target_rows_B).product_B, largest_B[:, None], rows_B[:, None]
