"""The primitive: the B x C matrix of cosines, reduced to the few numbers per row that a loss needs, without ever storing it. Classes are
sharded over ranks and gradients exact; a loss is a few lines on the resulting vectors."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from partial_fc import collectives
from partial_fc.collectives import Group
from partial_fc.columns import Columns, of_classes
from partial_fc.device_policy import policy_of
from partial_fc.kernels import Kernel, Problem, chunked, reference, triton_kernel
from partial_fc.maps import Map
from partial_fc.prototype_sources import PrototypeSource
from partial_fc.shards import ClassShard
from partial_fc.statistics import Statistic, TopK
from partial_fc.unit_rows import unit_rows

KERNELS: dict[str, Kernel] = {"reference": reference, "chunked": chunked, "triton": triton_kernel}
LARGEST_UNSHIFTED = 64.0  # |logit| up to which float32 sums 1e8 exponentials without a maximum pass: e^64 x 1e8 < 3e38
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Statistics(NamedTuple):
    """What a loss sees, for all B samples of the global batch, equal on every rank."""

    target_B: Tensor  # cos(x_i, w_{y_i})
    non_target_B: Tensor  # the statistic over all j != y_i; -inf for a log-sum-exp of nothing. [B, k] for TopK, as ranked
    norms_B: Tensor  # |x_i|, with gradient
    classes_Bk: Tensor | None = None  # of TopK: int64 global class ids (-1 where there are fewer classes)


def similarity_statistics(
    features_BD: Tensor,
    columns: Columns,
    statistic: Statistic,
    *,
    scale: float | Tensor,
    map: Map | None = None,
    dtype: str = "float32",
    kernel: str = "auto",
    group: Group = None,
    tile_megabytes: int = 0,
) -> Statistics:
    """Target cosine and non-target statistic of every sample of the global batch against the columns of all ranks.

    features_BD  global batch (the same rows on every rank), any norm; the gradient is this rank's part of the sum over columns. A row or
                 column without a direction (norm 0) has cosines 0 and no gradient
    columns      this rank's prototypes or samples, with targets and masks: `of_classes(prototypes_SD, labels_B)` and others in columns.py
    statistic    of the logits z_ij = s_i cos_ij + bias_j over the non-targets j of row i: LogSumExp(), SoftplusSum(threshold) or TopK(k),
                 which ranks by cos_ij + bias_j
    scale        s, a number, or a vector [B] (feature norms) whose gradient is this rank's part: see `collectives.sum_gradient`
    map          replaces non-target cosines element by element (partial_fc.maps)
    dtype        of the products with columns: "float32" (float64 for float64 features), or "bfloat16" with sums in float32 and target
                 entries from float32 rows
    kernel       "auto" (triton for bfloat16 on a GPU, otherwise chunked), "chunked", "triton" (GPU; no map), "reference" (B x n; oracle)

    Communicates 1 packed all-reduce of 2 B floats, or what the statistic says. Memory beyond inputs and gradients: one tile of B x chunk
    (of tile_megabytes; 0 chooses by device, 8 on a CPU and 128 on a GPU) and chunks of columns. On a CPU forward already takes the memory
    of the columns' gradient, for the weight cache."""
    if not isinstance(columns, Columns):
        raise TypeError("similarity_statistics takes columns where it took prototypes and labels: of_classes(prototypes_SD, labels_B)")
    if features_BD.shape[1] != columns.source.shape[1]:
        raise ValueError(f"features have width {features_BD.shape[1]}, but the prototypes have width {columns.source.shape[1]}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
    if map is not None and not statistic.takes_map:
        raise ValueError(f"{type(statistic).__name__} takes no map: it returns cosines as they are")
    features_BD, norms_B = unit_rows(features_BD)
    columns = statistic.biased(columns, group)
    bound = float("inf") if isinstance(scale, Tensor) else abs(scale) * (map.bound if map is not None else 1.0)
    is_bounded = columns.normalize and bound <= LARGEST_UNSHIFTED and (columns.bias_n is None or columns.bias_is_bounded)
    scale_B1 = scale[:, None] if isinstance(scale, Tensor) else features_BD.new_full((len(features_BD), 1), scale)
    scales_queries = map is None and statistic.takes_map  # mapped cosines are scaled after the map, those of TopK not at all
    problem = Problem(
        queries_BD=features_BD * (scale_B1 if isinstance(scale, Tensor) else scale) if scales_queries else features_BD,
        columns=columns,
        statistic=statistic,
        shifts=statistic.may_shift and not is_bounded,
        map=map,
        scale_B1=None if map is None else scale_B1,
        dtype=features_BD.dtype if dtype == "float32" else DTYPES[dtype],
        tile_bytes=tile_megabytes << 20 or policy_of(features_BD.device).tile_bytes,
    )
    target_B, non_target_B, *classes_Bk = statistic.evaluate(problem, _choose(kernel, problem), group)
    # From here on all depends on the rows alone, not on this rank's columns.
    if scales_queries:
        target_B = target_B / (collectives.divide_gradient(scale, group) if isinstance(scale, Tensor) else scale)
    return Statistics(target_B, non_target_B, collectives.divide_gradient(norms_B, group), *classes_Bk)


def _choose(kernel: str, problem: Problem) -> Kernel:
    """The kernel; "auto" is triton for bfloat16 on a GPU, where it can, since float32 products are faster in cuBLAS."""
    if kernel == "auto":
        is_faster = problem.queries_BD.is_cuda and problem.dtype is torch.bfloat16
        return triton_kernel if is_faster and triton_kernel.refusal(problem) is None else chunked
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r} is unknown: choose one of auto, {', '.join(KERNELS)}")
    if kernel == "triton" and (refusal := triton_kernel.refusal(problem)) is not None:
        raise ValueError(f"kernel 'triton' {refusal}")
    return KERNELS[kernel]


@torch.no_grad()
def nearest_classes(shard: ClassShard, prototypes: PrototypeSource, labels_B: Tensor, k: int, **options: Any) -> Tensor:
    """The classes [B k] whose prototypes are nearest to those of the labels; -1 where there are too few. Options: those of
    similarity_statistics. 2 B S D operations; communicates 1 all-reduce of B D floats and 1 all-gather of (3 k + 1) N B."""
    own_BD = torch.zeros(len(labels_B), prototypes.shape[1], dtype=torch.float32, device=labels_B.device)
    if shard.rows:
        rows_B = shard.rows_of(labels_B)
        own_BD = prototypes.load(rows_B.clamp(min=0)).float().where(rows_B[:, None] >= 0, 0)
    (prototypes_BD,) = collectives.sum_packed([own_BD], options.get("group"))
    found = similarity_statistics(prototypes_BD, of_classes(prototypes, labels_B, shard.first), TopK(k), scale=1.0, **options)
    assert found.classes_Bk is not None
    return found.classes_Bk.flatten()
