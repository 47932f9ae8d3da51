"""Forward + backward of the CosFace classifier, chunked against dense eager float32 (normalise, product, margin, cross-entropy):
both in this process, in turn; the ratio is taken pair by pair. python -m benchmarks.classifier_step [--threads N] [--pairs N]"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median, quantiles

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.record import append
from partial_fc import losses, similarity_statistics

SCALE, MARGIN = 64.0, 0.4
SHAPES = [(128, 10_000, 512), (512, 10_000, 512), (512, 50_000, 512), (128, 200_000, 512)]  # batch, classes, width


def eager(features: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    cosines = functional.normalize(features) @ functional.normalize(prototypes).T
    margins = torch.full((len(labels), 1), -SCALE * MARGIN)
    return functional.cross_entropy((SCALE * cosines).scatter_add(1, labels[:, None], margins), labels)


def chunked(features: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    loss = losses.build("cosface", scale=SCALE, margin=MARGIN)
    return loss(similarity_statistics(features, prototypes, labels, scale=SCALE))


def seconds(step: Callable[..., Tensor], *inputs: Tensor) -> float:
    for tensor in inputs:
        tensor.grad = None
    start = time.perf_counter()
    step(*inputs).backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for batch, classes, width in SHAPES:
        inputs = (
            torch.randn(batch, width, requires_grad=True),
            torch.randn(classes, width, requires_grad=True),
            torch.randint(0, classes, (batch,)),
        )
        for step in (eager, chunked):
            seconds(step, *inputs)
        pairs = [(seconds(eager, *inputs), seconds(chunked, *inputs)) for _ in range(options.pairs)]
        ratios = [dense / ours for dense, ours in pairs]
        append(
            "classifier_step",
            {
                "batch": batch,
                "classes": classes,
                "width": width,
                "threads": options.threads,
                "eager_ms": round(1e3 * median(dense for dense, _ in pairs), 1),
                "chunked_ms": round(1e3 * median(ours for _, ours in pairs), 1),
                "eager_over_chunked": round(median(ratios), 2),
                "quartiles": " ".join(f"{value:.2f}" for value in quantiles(ratios, n=4)[::2]),
            },
        )


if __name__ == "__main__":
    main()
