"""What travels: every collective of a step, with its bytes, against the numbers that docstrings state; and the collectives themselves."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from partial_fc import PartialFC, collectives, losses
from tests.partial_fc.test_classifier import batch

CLASSES, WIDTH, RANKS = 101, 16, 3
EVEN, UNEVEN = [5, 5, 5], [5, 0, 3]  # rows of each rank

# Every way for tensors to leave a process: what this project calls, and what it does not.
CALLS = {
    "all_gather": (collectives, "_all_gather", 0),
    "reduce_scatter": (collectives, "_reduce_scatter", 1),
    "all_reduce": (dist, "all_reduce", 0),
    "all_to_all": (dist, "all_to_all_single", 0),
    **{
        name: (dist, name, 0)
        for name in ("broadcast", "reduce", "gather", "scatter", "send", "recv", "isend", "irecv", "batch_isend_irecv")
    },
    **{name: (dist, name, 0) for name in ("all_gather_object", "all_gather_into_tensor", "reduce_scatter_tensor", "barrier")},
}


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Counts (collective, bytes of the whole tensor: what all ranks gather, or scatter, or add up)."""
    calls: Counter = Counter()

    def counting(name: str, original: Callable[..., Any], position: int) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            whole = arguments[position] if arguments else None
            calls[name, whole.numel() * whole.element_size() if isinstance(whole, torch.Tensor) else -1] += 1
            return original(*arguments, **keywords)

        return call

    with contextlib.ExitStack() as stack:
        for name, (module, attribute, position) in CALLS.items():
            original = getattr(module, attribute)
            stack.enter_context(mock.patch.object(module, attribute, counting(name, original, position)))
        yield calls


class Path(NamedTuple):
    """One way through the classifier, and what it says it costs: (collective, bytes)."""

    name: str
    costs: list[tuple[str, int]]
    rows: list[int] = EVEN
    scale: float = 64.0
    call: str = "step"  # or a method
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    loss: str = "cosface"


def gathered(rows: list[int] = EVEN, feature_bytes: int = 4) -> list[tuple[str, int]]:
    """forward: two numbers per rank, features, and labels of 8 bytes; rows padded to the largest local batch."""
    padded = len(rows) * max(rows)
    return [TOLD, ("all_gather", feature_bytes * padded * WIDTH), ("all_gather", 8 * padded)]


TOLD = ("all_gather", 16 * RANKS)


def scattered(rows: list[int] = EVEN) -> list[tuple[str, int]]:
    return [("reduce_scatter", 4 * len(rows) * max(rows) * WIDTH)]


B, B_UNEVEN = sum(EVEN), sum(UNEVEN)
PATHS = [
    Path("bounded", [*gathered(), ("all_reduce", 4 * 2 * B), *scattered()]),
    Path("maximum", [*gathered(), ("all_gather", 4 * 3 * B * RANKS), *scattered()], scale=96.0),
    Path("sampled", [*gathered(), ("all_reduce", 4 * 2 * B), *scattered()], options={"sample_rate": 0.3, "correct_rate": True}),
    Path("bfloat16", [*gathered(feature_bytes=2), ("all_reduce", 4 * 2 * B), *scattered()], options={"gather_dtype": "bfloat16"}),
    Path("uneven", [*gathered(UNEVEN), ("all_reduce", 4 * 2 * B_UNEVEN), *scattered(UNEVEN)], UNEVEN),
    Path(
        "uneven, sampled", [*gathered(UNEVEN), ("all_reduce", 4 * 2 * B_UNEVEN), *scattered(UNEVEN)], UNEVEN, options={"sample_rate": 0.3}
    ),
    Path("told counts", [*gathered(UNEVEN), ("all_reduce", 4 * 2 * B_UNEVEN), *scattered(UNEVEN)], UNEVEN, call="told"),
    Path("GCE, as CosFace", [*gathered(), ("all_reduce", 4 * 2 * B), *scattered()], loss="gce"),
    Path("substitution", [*gathered(), ("all_reduce", 4 * 2 * B), *scattered()], options={"substitution_rate": 0.5}),
    Path("threshold", [*gathered(), ("all_reduce", 4 * 2 * B), ("all_reduce", 4), *scattered()], loss="uce"),
    Path("map", [*gathered(), ("all_reduce", 4 * B), ("all_reduce", 4 * 2 * B), *scattered()], loss="mv_softmax", scale=32.0),
    Path("nearest", [*gathered(), ("all_gather", 4 * (3 + 1) * B * RANKS), *scattered()], loss="npt"),
    Path("begin_step", [], call="begin_step"),
    Path("begin_step, sampled", [TOLD, ("all_gather", 8 * B)], call="begin_step", options={"sample_rate": 0.3}),
    Path(
        "begin_step, uneven",
        [TOLD, ("all_gather", 8 * RANKS * max(UNEVEN))],
        UNEVEN,
        call="begin_step",
        options={"sample_rate": 0.3},
    ),
    Path(
        "begin_step, hard negatives",
        [TOLD, ("all_gather", 8 * B), ("all_reduce", 4 * B * WIDTH), ("all_gather", 4 * (3 * 2 + 1) * B * RANKS)],
        call="begin_step",
        options={"sample_rate": 0.3, "hard_negatives": 2},
    ),
    Path("cosines", [*gathered(), ("all_gather", 4 * 4 * B * RANKS)], call="cosines"),
    Path("cosines, uneven", [*gathered(UNEVEN), ("all_gather", 4 * 4 * B_UNEVEN * RANKS)], UNEVEN, call="cosines"),
]


def traffic(number: int) -> Counter:
    """Runs on every rank."""
    path, rank = PATHS[number], dist.get_rank()
    loss = losses.build(path.loss) if path.loss == "npt" else losses.build(path.loss, scale=path.scale)
    classifier = PartialFC(CLASSES, WIDTH, loss, uneven_batches=path.rows is UNEVEN and path.call != "told", **path.options)
    features, labels = (x.split(path.rows)[rank] for x in batch(CLASSES, WIDTH, sum(path.rows)))
    with counted() as calls:
        if path.call in ("step", "told"):
            classifier(features.clone().requires_grad_(), labels, path.rows if path.call == "told" else None).backward()
            classifier.is_finite()
        elif path.call == "begin_step":
            classifier.begin_step(labels)
        else:
            getattr(classifier, path.call)(features, labels)
    return calls


@pytest.mark.parametrize("number", range(len(PATHS)), ids=[path.name for path in PATHS])
def test_collectives_and_bytes_are_those_of_the_docstrings(ranks, number):
    for calls in ranks(RANKS).run(traffic, number):
        assert calls == Counter(PATHS[number].costs)


def gather_and_return(counts: list[int], dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs on every rank: (the gathered rows, the gradient of this rank's if rank r weighs row i by (r + 1) (i + 1))."""
    rank = dist.get_rank()
    mine = (torch.arange(counts[rank] * 2.0).view(-1, 2) + 100 * rank + 1 / 3).requires_grad_()
    gathered = collectives.gather_rows(mine, None, 10.0, counts, dtype)
    weights = (rank + 1) * torch.arange(1.0, len(gathered) + 1)[:, None]
    (gathered * weights).sum().backward()
    assert mine.grad is not None
    return gathered.detach(), mine.grad


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("counts", [[2, 2, 2], [3, 0, 1], [0, 0, 1], [1, 2, 0]])
def test_rows_are_gathered_in_order_and_their_gradients_added_up(ranks, counts, dtype):
    results = ranks(3).run(gather_and_return, counts, dtype)
    rows = torch.cat([torch.arange(count * 2.0).view(-1, 2) + 100 * rank + 1 / 3 for rank, count in enumerate(counts)])
    for gathered, _ in results:
        assert torch.equal(gathered, rows.to(dtype).float() if dtype else rows)
    gradients = 10 * (1 + 2 + 3) * torch.arange(1.0, sum(counts) + 1)[:, None].expand(-1, 2)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in results]), gradients)
