"""The kernel in Triton, for GPUs: in forward logits stay in registers; backward writes a tile of weights and leaves its two products to
cuBLAS. The rest (targets, gradients of exact entries, collectors) is shared with the chunked kernel."""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from partial_fc.kernels import ForwardResult, Gradients, NeededGradients, Problem, ShardStatistics, Slopes, chunked
from partial_fc.kernels.exact_entries import ExactEntries, ExactGradients, target_products
from partial_fc.kernels.tiles import Chunk, Tile, TileLoop, multiply

UNITS_BYTES = 32 << 20  # of a chunk of unit columns
# Of a tile of weights. Its three products (103 GFLOP at D = 512) would take an H100 0.16 ms at 65 % of its rate, and the host needs about
# 0.1 ms for the six launches of a chunk. An L2 of 50 MB does not hold it: that costs the products 1.2 TB/s, of the 3.3 that memory has.
WEIGHTS_BYTES = 64 << 20
PARTIAL_BYTES = 32 << 20  # of sums per row and block of columns, before they are added
ROWS = 4  # columns per program where no product is involved, as far as registers hold so many elements:
ELEMENTS = 8192


class Blocks(NamedTuple):
    """The m rows and n columns that one program multiplies, in steps of k of the width, and how."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# The fastest is measured once per kind of problem and process, so two processes may add in another order and round differently. All of
# them fit into registers and shared memory: tests/partial_fc/test_compiled.py. Wider ones do on Hopper alone.
ROUNDED = (Blocks(128, 128, 64, 4, 3), Blocks(128, 128, 64, 8, 4))
ROUNDED_HOPPER = (Blocks(128, 256, 64, 8, 3), *ROUNDED, Blocks(64, 256, 64, 4, 3))
ROUNDED_BLACKWELL = (Blocks(128, 128, 64, 8, 4), Blocks(64, 256, 64, 8, 3))
# float32 has no tensor cores, and its accumulators compete with operands for registers.
EXACT = (Blocks(64, 64, 32, 4, 3), Blocks(128, 64, 32, 8, 3))
INTERPRETED = (Blocks(16, 64, 16, 4, 1),)
_fastest: dict[tuple[object, ...], Blocks] = {}
logger = logging.getLogger(__name__)


def refusal(problem: Problem) -> str | None:
    """Why this kernel cannot serve, as the rest of a sentence that begins with its name; None if it can."""
    device = problem.queries_BD.device
    if not _is_installed():
        return "needs the package triton: pip install triton, or choose kernel 'chunked'"
    if device.type != "cuda" and not _is_interpreted():
        return f"needs a GPU, but the features are on {device}: choose kernel 'auto'"
    if problem.map is not None:
        return "computes no maps: choose kernel 'auto'"
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return f"multiplies in float32 or bfloat16, but was asked for {problem.dtype}: choose kernel 'auto'"
    if device.type == "cuda" and (refusal := _refusal_of(device)) is not None:
        return refusal
    if problem.statistic.triton_terms not in _programs().KNOWN_TERMS:
        return f"has no terms of {type(problem.statistic).__name__}: choose kernel 'auto'"
    return None


@functools.cache
def _refusal_of(device: torch.device) -> str | None:
    """Why no problem can be served on a GPU, found out once per process. Other ranks may find otherwise: kernels answer with the same
    vectors, so that ranks may differ in theirs."""
    if _capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or later: choose kernel 'auto'"
    try:
        _first_launch(device)
    except Exception as error:  # of a compiler, an assembler, a cache, a driver: whatever it is, chunked can do without
        refusal = (
            f"cannot launch its first program ({' '.join(str(error).split())}): Triton needs a C compiler (gcc, clang or the one in CC), "
            "Python.h (package python3-dev) and a folder to write to (TRITON_CACHE_DIR); kernel 'chunked' needs none of them"
        )
        logger.warning("kernel 'triton' %s and is what 'auto' takes", refusal)
        return refusal
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _choice(problem: Problem) -> tuple[Blocks, ...]:
    if _is_interpreted():
        return INTERPRETED
    if problem.dtype is torch.float32:
        return EXACT
    major, _ = _capability(problem.queries_BD.device)
    return {9: ROUNDED_HOPPER, 10: ROUNDED_BLACKWELL}.get(major, ROUNDED)


def _first_launch(device: torch.device) -> None:
    """Of a small program. Triton first compiles, and links with Python, what launches them."""
    row_1D = torch.zeros(1, 16, dtype=torch.float32, device=device)
    with torch.cuda.device_of(row_1D):
        _programs().unit_rows[(1,)](torch.empty_like(row_1D), row_1D, row_1D.new_empty(1), 1, 16, 16, 1)


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _programs() -> Any:
    from partial_fc.kernels import triton_programs  # not every machine has triton

    return triton_programs


class FusedForward(TileLoop):
    """Chunks of unit columns, and programs that multiply all queries with one chunk."""

    bias_in_operands = False  # adding it to logits in registers costs nothing

    def __init__(self, problem: Problem) -> None:
        self.choice = _choice(problem)
        super().__init__(problem)

    def largest(self, batch: int, width: int) -> int:
        return max(256, UNITS_BYTES // (width * self.problem.dtype.itemsize))

    def allocate(self, batch: int, width: int) -> None:
        self.units = self.queries_BD.new_empty(self.size, width)
        self.inverse = self.problem.queries_BD.new_empty(self.size, 1)

    def chunk(self, span: slice, columns_nD: Tensor) -> Chunk:
        columns_nD = columns_nD.contiguous()
        units_nD, inverse_n1 = self.units[: len(columns_nD)], self.inverse[: len(columns_nD)]
        if not self.problem.columns.normalize:
            return Chunk(span, columns_nD, None, units_nD.copy_(columns_nD))
        self.by_row(_programs().unit_rows, units_nD, columns_nD, inverse_n1)
        return Chunk(span, columns_nD, inverse_n1, units_nD)

    def by_row(self, program: Any, x_nD: Tensor, *tensors: Tensor | None) -> None:
        (count, width), padded = x_nD.shape, 1 << (x_nD.shape[1] - 1).bit_length()
        rows = 64 if _is_interpreted() else max(1, min(ROWS, ELEMENTS // padded))
        program[(-(-count // rows),)](x_nD, *tensors, count, width, padded, rows)

    def by_block(self, program: str, chunk: Chunk, *outputs: Tensor | int | None) -> int:
        """Runs a program on all rows and a chunk of columns; returns the number of columns per block."""
        problem, batch, (columns, width) = self.problem, len(self.queries_BD), chunk.units_nD.shape
        labels = problem.columns.mask.labels
        labels_B, labels_n = (None, None) if labels is None else (labels[0], labels[1][chunk.span])
        bias_n = None if self.bias_n is None else self.bias_n[chunk.span]
        inputs = (self.queries_BD, chunk.units_nD, bias_n, problem.columns.masked_columns(), labels_B, labels_n, self.exact_columns_B)
        operands = [None if x is None else x.contiguous() for x in inputs]
        kernel, terms = getattr(_programs(), program), (problem.statistic.triton_terms, problem.shifts)

        def run(blocks: Blocks) -> None:
            grid = (-(-batch // blocks.m) * -(-columns // blocks.n),)
            shapes = (chunk.span.start, batch, columns, width, *terms, blocks.m, blocks.n, blocks.k)
            kernel[grid](*outputs, *operands, *shapes, num_warps=blocks.warps, num_stages=blocks.stages)

        kind = (program, *terms, problem.dtype, width, batch.bit_length(), self.size.bit_length(), problem.queries_BD.device)
        if kind not in _fastest:
            # Blocks decide in which order sums are taken, and the fastest may be others in every run.
            is_fixed = len(self.choice) == 1 or torch.are_deterministic_algorithms_enabled()
            _fastest[kind] = self.choice[0] if is_fixed else min(self.choice, key=lambda blocks: _milliseconds(run, blocks))
        run(_fastest[kind])
        return _fastest[kind].n


def _milliseconds(run: Callable[[Blocks], None], blocks: Blocks) -> float:
    """Time of 5 runs after one that compiles; infinite if the device lacks the memory for such blocks."""
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
    """By row, over some columns of this rank."""

    sum_B: Tensor  # of terms, of logits less the largest one where they are shifted
    largest_B: Tensor  # logit times base; -inf where there is no non-target
    columns_B: Tensor  # where it is


def _total(loop: FusedForward) -> Total:
    batch, shifts = len(loop.queries_BD), loop.problem.shifts
    most = -(-loop.size // min(blocks.n for blocks in loop.choice))  # blocks of a chunk
    capacity = max(most, min(most * -(-loop.count // loop.size), PARTIAL_BYTES // (12 * batch)))
    sums, largest = (torch.empty(capacity, batch, dtype=torch.float32, device=loop.queries_BD.device) for _ in range(2))
    columns = torch.empty(capacity, batch, device=loop.queries_BD.device, dtype=torch.int32)
    total = Total(sums.new_zeros(batch), sums.new_full((batch,), -torch.inf), columns.new_full((batch,), -1))
    best_B = total.largest_B.clone()
    filled = 0
    for chunk in loop.chunks():
        if filled + most > capacity:
            total, filled = _added(total, Total(sums[:filled], largest[:filled], columns[:filled]), shifts), 0
        filled += -(-len(chunk.units_nD) // loop.by_block("row_sums", chunk, sums, largest, columns, best_B, filled))
    return _added(total, Total(sums[:filled], largest[:filled], columns[:filled]), shifts)


def _added(total: Total, blocks: Total, shifts: bool) -> Total:
    """A total plus the sums of blocks, [blocks, B] each, in their order."""
    largest_B, block_B = blocks.largest_B.max(dim=0)
    columns_B = blocks.columns_B.gather(0, block_B[None])[0].where(largest_B > total.largest_B, total.columns_B)
    largest_B = torch.maximum(largest_B, total.largest_B)
    if not shifts:
        return Total(total.sum_B + blocks.sum_B.sum(dim=0), largest_B, columns_B)
    shift_B = largest_B.clamp(min=-1e30)  # -inf minus -inf would be NaN
    sum_B = total.sum_B * torch.exp2(total.largest_B - shift_B) + (blocks.sum_B * torch.exp2(blocks.largest_B - shift_B)).sum(dim=0)
    return Total(sum_B, largest_B, columns_B)


def forward(problem: Problem, needed: NeededGradients) -> ShardStatistics:
    columns, statistic = problem.columns, problem.statistic
    if not columns.size or not len(problem.queries_BD):
        return chunked.forward(problem, needed)
    with torch.cuda.device_of(problem.queries_BD):
        loop = FusedForward(problem)
        total = _total(loop)
    has_others_B = total.largest_B > -torch.inf
    exact_columns_B = total.columns_B.to(torch.int64).where(has_others_B, -1)
    # The largest logit counts most, so the one from float32 rows replaces the one in the sum, which is close enough to be subtracted.
    exact = ExactEntries.of(problem.queries_BD, columns, exact_columns_B)
    exact_B = exact.product_B if columns.bias_n is None else exact.product_B + columns.bias_n[exact.columns_B]
    exact_B = exact_B.where(has_others_B, -torch.inf)
    sum_B, largest_B = total.sum_B.to(exact_B.dtype), total.largest_B.to(exact_B.dtype)
    shift_B = largest_B if problem.shifts else torch.zeros_like(sum_B)
    finite_B = shift_B.clamp(min=-1e30)
    sum_B = (sum_B - statistic.terms_(largest_B - finite_B)).clamp(min=0) + statistic.term(exact_B, finite_B / loop.base)
    return ShardStatistics(target_products(problem), sum_B, shift_B / loop.base, exact_columns_B)


class FusedBackward(FusedForward):
    """Chunks in backward, with their tile of weights. Gradients of columns are computed where they will lie, unless that is narrower."""

    def __init__(self, problem: Problem, needed: NeededGradients) -> None:
        self.gradient_SD = problem.columns.source.gradient_memory() if needed.source else None
        super().__init__(problem)

    def largest(self, batch: int, width: int) -> int:
        weights_bytes = min(WEIGHTS_BYTES, self.problem.tile_bytes)
        return max(256, min(super().largest(batch, width), weights_bytes // (batch * self.problem.dtype.itemsize)))

    def allocate(self, batch: int, width: int) -> None:
        super().allocate(batch, width)
        self.tile = self.queries_BD.new_empty(batch, -(-self.size // 256) * 256)  # whole blocks
        wide, memory = self.problem.queries_BD.dtype, self.gradient_SD
        self.in_place_SD = memory if memory is not None and memory.dtype is wide else None
        self.wide = self.queries_BD.new_empty(self.size if self.in_place_SD is None else 0, width, dtype=wide)
        self.ordered: tuple[Tensor, Tensor] | None = None

    def gradient_memory(self, span: slice) -> Tensor:
        return self.wide[: span.stop - span.start] if self.in_place_SD is None else self.in_place_SD[span]

    def weigh(self, chunk: Chunk, shift_B1: Tensor | None) -> tuple[Tensor, Tile]:
        self.by_block("weights", chunk, self.tile, shift_B1, self.tile.stride(0))
        weights_Bn = self.tile[:, : len(chunk.units_nD)]
        return weights_Bn, Tile(weights_Bn)

    def column_gradient(self, chunk: Chunk, weights_Bn: Tensor, weighted_BD: Tensor, exact: ExactGradients) -> Tensor:
        if self.ordered is None:
            # Sorted by column, so that the program of a column finds its rows and always adds them in the same order.
            columns_m, order_m = exact.columns_m.clamp(-1, self.count).to(torch.int32).sort(stable=True)
            every = torch.arange(self.count + 1, device=columns_m.device, dtype=torch.int32)
            self.ordered = torch.searchsorted(columns_m, every, out_int32=True), exact.gradients_mD[order_m]
        starts, gradients_mD = self.ordered
        grad_nD = multiply(weights_Bn.T, weighted_BD, self.gradient_memory(chunk.span))
        starts_n = starts[chunk.span.start : chunk.span.stop + 1]
        self.by_row(_programs().column_gradients, grad_nD, chunk.columns_nD, chunk.inverse_n1, starts_n, gradients_mD)
        return grad_nD


def backward(problem: Problem, result: ForwardResult, slopes: Slopes, needed: NeededGradients) -> Gradients:
    with torch.cuda.device_of(problem.queries_BD):
        if problem.columns.size and len(problem.queries_BD):
            result = result._replace(cache=FusedBackward(problem, needed))
        return chunked.backward(problem, result, slopes, needed)


def top(problem: Problem, k: int) -> tuple[Tensor, Tensor, Tensor]:
    if k > 1 or not problem.columns.size or not len(problem.queries_BD):
        return chunked.top(problem, k)
    with torch.cuda.device_of(problem.queries_BD):
        loop = FusedForward(problem)
        total = _total(loop)
    largest_B = total.largest_B.to(problem.queries_BD.dtype) / loop.base
    columns_B = total.columns_B.to(torch.int64).where(largest_B > -torch.inf, 0)
    return target_products(problem), largest_B[:, None], columns_B[:, None]
