"""The programs that triton_kernel.py runs: a product with unit columns whose logits stay in registers. Needs triton, which a machine
without a GPU may lack. Tensors are contiguous; offsets of elements are int64."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
KNOWN_TERMS = ("exp2", "softplus")  # a name more needs a branch in _terms and _weights
GROUP = tl.constexpr(8)  # blocks of classes that are worked on together with all rows, so that prototypes are read from memory once


@triton.jit(do_not_specialize=["count"])
def unit_rows(units, prototypes, inverse, count, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """inverse [n] = 1 / |w|, 0 where w has no direction; units [n, D] = w / |w|, rounded. One read, one write."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, PADDED)
    places = rows.to(tl.int64)[:, None] * WIDTH + inner[None, :]
    is_inside = (rows < count)[:, None] & (inner < WIDTH)[None, :]
    w = tl.load(prototypes + places, mask=is_inside, other=0.0)
    norms = tl.sqrt(tl.sum(w * w, axis=1))
    factors = tl.where(norms < 1e-12, 0.0, 1.0 / tl.maximum(norms, 1e-12))
    tl.store(inverse + rows, factors, mask=rows < count)
    tl.store(units + places, (w * factors[:, None]).to(units.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=["count"])
def column_gradients(gradient, prototypes, inverse, starts, extra, count, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """In place: from the gradient of w / |w| to that of w, plus the rows starts[r] to starts[r + 1] of `extra`, in this order."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, PADDED)
    places = rows.to(tl.int64)[:, None] * WIDTH + inner[None, :]
    is_inside = (rows < count)[:, None] & (inner < WIDTH)[None, :]
    value = tl.load(gradient + places, mask=is_inside, other=0.0)
    if inverse is not None:
        w = tl.load(prototypes + places, mask=is_inside, other=0.0)
        factors = tl.load(inverse + rows, mask=rows < count, other=0.0)
        along = tl.sum(value * w, axis=1) * factors * factors
        value = (value - w * along[:, None]) * factors[:, None]
    start = tl.load(starts + rows, mask=rows < count, other=0)
    stop = tl.load(starts + rows + 1, mask=rows < count, other=0)
    for step in range(0, tl.max(stop - start, axis=0)):
        at = start + step
        from_extra = at.to(tl.int64)[:, None] * WIDTH + inner[None, :]
        value += tl.load(extra + from_extra, mask=is_inside & (at < stop)[:, None], other=0.0)
    tl.store(gradient + places, value, mask=is_inside)


@triton.jit
def _block(batch, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(block of rows, block of columns) of this program: all rows meet GROUP blocks of columns before the next ones."""
    blocks_m, blocks_n = tl.cdiv(batch, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    first_n = program // (blocks_m * GROUP) * GROUP
    wide = tl.minimum(blocks_n - first_n, GROUP)
    inside = program % (blocks_m * GROUP)
    return inside // wide, first_n + inside % wide


@triton.jit
def _left_out(columns_of_rows, rows, first, batch, columns):
    """Column in this chunk of each row's entry, or -1: comparing 32 bits with every entry costs half as much as 64."""
    local = tl.load(columns_of_rows + rows, mask=rows < batch, other=-1) - first
    return tl.where((local >= 0) & (local < columns), local, -1).to(tl.int32)


@triton.jit
def _any(is_so):
    return tl.max(is_so.to(tl.int32), axis=0) > 0


@triton.jit
def _logits(
    queries, units, bias, masked, labels, column_labels, exact, first, rows, start, batch, columns,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits [BLOCK_M, BLOCK_N] of these rows and of columns from `start` on in float32, -inf for columns that are not non-targets."""
    cols = start + tl.arange(0, BLOCK_N)
    # Read before the product, which hides it.
    if labels is None:
        target = _left_out(masked, rows, first, batch, columns)
    if exact is not None:
        other = _left_out(exact, rows, first, batch, columns)
    inner = tl.arange(0, BLOCK_K)
    # Beyond the edges the last row or column is read again.
    query = queries + tl.minimum(rows, batch - 1).to(tl.int64)[:, None] * WIDTH + inner[None, :]
    unit = units + tl.minimum(cols, columns - 1).to(tl.int64)[None, :] * WIDTH + inner[:, None]
    logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        if WIDTH % BLOCK_K == 0:
            left, right = tl.load(query), tl.load(unit)
        else:
            is_inside = inner < WIDTH - k
            left = tl.load(query, mask=is_inside[None, :], other=0.0)
            right = tl.load(unit, mask=is_inside[:, None], other=0.0)
        logits = tl.dot(left, right, logits, input_precision="ieee")
        query += BLOCK_K
        unit += BLOCK_K
    if bias is not None:
        logits += tl.load(bias + cols, mask=cols < columns, other=0.0).to(tl.float32)[None, :]
    if labels is not None:
        label = tl.load(labels + rows, mask=rows < batch, other=0)
        column_label = tl.load(column_labels + cols, mask=cols < columns, other=0)
        logits = tl.where(column_label[None, :] == label[:, None], float("-inf"), logits)
    # Few blocks have an entry to leave out, and one in a row has an edge: the others compare none of their entries.
    is_special = start + BLOCK_N > columns
    if labels is None:
        is_special |= _any((target >= start) & (target < start + BLOCK_N))
    if exact is not None:
        is_special |= _any((other >= start) & (other < start + BLOCK_N))
    if is_special:
        logits += tl.where(cols < columns, 0.0, float("-inf"))[None, :]
        if labels is None:
            logits = tl.where(cols[None, :] == target[:, None], float("-inf"), logits)
        if exact is not None:
            logits = tl.where(cols[None, :] == other[:, None], float("-inf"), logits)
    return logits


@triton.jit
def softplus(x):
    """log(1 + e^x), accurate down to e^x: a sum over a million classes needs the small terms, which 1 + e^x rounds away."""
    t = tl.exp2(-tl.abs(x) * LOG2_E)
    # log(1 + t) / t for t in [0, 1], to 2e-7 of its value: a least-squares fit in Chebyshev polynomials, reweighted until its errors were
    # level. A logarithm would cost as much as the exponential, and lose the digits of a small t.
    ratio = -0.0295051327 + t * 0.00523266806
    ratio = -0.136632304 + t * (0.0782257758 + t * ratio)
    ratio = -0.248429801 + t * (0.191059991 + t * ratio)
    ratio = -0.499994931 + t * (0.333190965 + t * ratio)
    return tl.maximum(x, 0.0) + t * (0.99999997 + t * ratio)


@triton.jit
def _terms(z, TERMS: tl.constexpr):
    """f(z) of the statistic whose `triton_terms` is TERMS."""
    tl.static_assert(TERMS == "softplus" or TERMS == "exp2")
    if TERMS == "softplus":
        return softplus(z)
    else:
        return tl.exp2(z)


@triton.jit
def _weights(z, TERMS: tl.constexpr):
    """f'(z). 2^z stands for e^u with z = u log2(e), whose derivative by u is itself."""
    tl.static_assert(TERMS == "softplus" or TERMS == "exp2")
    if TERMS == "softplus":
        return 1.0 / (1.0 + tl.exp2(-z * LOG2_E))
    else:
        return tl.exp2(z)


@triton.jit(do_not_specialize=["offset", "first", "batch", "columns"])
def row_sums(
    sums, largest, places, best, offset,
    queries, units, bias, masked, labels, column_labels, exact, first, batch, columns,
    WIDTH: tl.constexpr, TERMS: tl.constexpr, SHIFTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """For every row and block of columns, [blocks, B] each from block `offset` on: the sum of terms (with SHIFTS of logits minus the
    largest), the largest logit, and, where no block before had a larger one, its column. `best` [B] is the largest of all so far."""
    block_m, block_n = _block(batch, columns, BLOCK_M, BLOCK_N)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    start = block_n * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    known = tl.load(best + rows, mask=rows < batch, other=float("inf"))
    logits = _logits(
        queries, units, bias, masked, labels, column_labels, exact, first, rows, start, batch, columns, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K
    )
    top = tl.max(logits, axis=1)
    at = (offset + block_n).to(tl.int64) * batch + rows
    tl.store(largest + at, top, mask=rows < batch)
    # The block of the largest of all comes here whatever ran before it, so that the result does not depend on the order.
    if _any(top >= known):
        place = tl.max(tl.where(logits == top[:, None], cols[None, :], -1), axis=1)
        tl.store(places + at, (first + place).to(tl.int32), mask=rows < batch)
        tl.atomic_max(best + rows, top, mask=rows < batch, sem="relaxed")
    if SHIFTS:
        logits -= tl.maximum(top, -1e30)[:, None]  # -inf minus -inf would be NaN
    tl.store(sums + at, tl.sum(_terms(logits, TERMS), axis=1), mask=rows < batch)


@triton.jit(do_not_specialize=["first", "batch", "columns"])
def weights(
    out, shift, stride,
    queries, units, bias, masked, labels, column_labels, exact, first, batch, columns,
    WIDTH: tl.constexpr, TERMS: tl.constexpr, SHIFTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [B, stride] = rounded weights of z, with SHIFTS of z - shift; 0 for columns that are not non-targets or beyond the edge."""
    block_m, block_n = _block(batch, columns, BLOCK_M, BLOCK_N)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    start = block_n * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    logits = _logits(
        queries, units, bias, masked, labels, column_labels, exact, first, rows, start, batch, columns, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K
    )
    if SHIFTS:
        logits -= tl.load(shift + rows, mask=rows < batch, other=0.0).to(tl.float32)[:, None]
    values = _weights(logits, TERMS)
    # Rows of `out` hold whole blocks: stores are wide without a mask for columns, which would be one per entry.
    tl.store(out + rows.to(tl.int64)[:, None] * stride + cols[None, :], values.to(out.dtype.element_ty), mask=(rows < batch)[:, None])
