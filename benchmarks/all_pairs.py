"""How fast all pairs and nearest neighbours are counted, beside the product of matrices alone: `python -m benchmarks.all_pairs`.

Embeddings are drawn. The product of 4096 rows is timed before, between and after, because the machine may be busy with other things."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import record
from pipeline.evaluation.all_pairs import all_pairs
from pipeline.evaluation.neighbours import neighbours
from pipeline.measuring import peak_memory

PRODUCT = 4096
EACH = 10  # images of an identity


def rows(images: int, width: int, queries: int, gallery: int, k: int) -> list[dict[str, Any]]:
    """One for all pairs of `images`, one for the k nearest of `gallery` rows to `queries`; without images or queries neither."""
    torch.manual_seed(0)
    found = []
    if images:
        labels = np.repeat(np.arange(-(-images // EACH)), EACH)[:images]
        centres = torch.randn(len(labels), width)[torch.from_numpy(labels)]
        embeddings = centres + 1.5 * torch.randn(images, width)
        found.append(
            _row("all pairs", images, images, width, 0, images * (images - 1) // 2, lambda: all_pairs(embeddings, labels, resamples=0))
        )
        found[-1]["score_error"] = score_error(embeddings[:2048])
    if queries:
        of_queries, of_gallery = torch.randn(queries, width), torch.randn(gallery, width)
        found.append(_row("neighbours", queries, gallery, width, k, queries * gallery, lambda: neighbours(of_queries, of_gallery, k)))
        found[-1]["score_error"] = None
    return found


def score_error(embeddings_nD: torch.Tensor) -> float:
    """The largest difference of a float32 cosine from the float64 one."""
    unit, exact = (torch.nn.functional.normalize(embeddings_nD.to(kind)) for kind in (torch.float32, torch.float64))
    return float(((unit @ unit.T).double() - exact @ exact.T).abs().max())


def _row(what: str, queries: int, gallery: int, width: int, k: int, scores: int, run: Callable[[], object]) -> dict[str, Any]:
    before = _product(width)
    times: list[tuple[float, float]] = []
    _, peak = peak_memory(lambda: times.append(_time(run)), torch.device("cpu"))
    seconds, cpu_seconds = times[0]
    product_seconds, product_cpu = (min(times) for times in zip(before, _product(width), strict=True))
    of_product = scores / PRODUCT**2
    return {
        "what": what, "rows": queries, "gallery": gallery, "width": width, "k": k, "threads": torch.get_num_threads(),
        "seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2), "scores_per_second": round(scores / seconds),
        "product_share": round(of_product * product_seconds / seconds, 3),
        "product_share_cpu": round(of_product * product_cpu / cpu_seconds, 3),
        "peak_mib": round(peak / 2**20),
    }  # fmt: skip


def _product(width: int) -> tuple[float, float]:
    """Least seconds, and seconds of processors, of PRODUCT x PRODUCT scores."""
    unit, out = torch.nn.functional.normalize(torch.randn(PRODUCT, width)), torch.empty(PRODUCT, PRODUCT)
    times = [_time(lambda: torch.mm(unit, unit.T, out=out)) for _ in range(7)]
    return min(seconds for seconds, _ in times), min(cpu for _, cpu in times)


def _time(run: Callable[[], object]) -> tuple[float, float]:
    start, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cpu


def as_text(row: dict[str, Any]) -> str:
    error = "" if row["score_error"] is None else f"; float32 cosines differ from float64 by at most {row['score_error']:.1e}"
    return (
        f"{row['what']}: {row['rows']:,} x {row['gallery']:,} x {row['width']} in {row['seconds']:.1f} s on {row['threads']} threads, "
        f"{row['scores_per_second']:.3g} scores/s: {row['product_share']:.0%} of the product's rate "
        f"({row['product_share_cpu']:.0%} by processor time), peak {row['peak_mib']} MiB{error}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000, help="0: no all pairs")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--queries", type=int, default=3_530, help="0: no neighbours")
    parser.add_argument("--gallery", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--csv", default=os.path.join(record.FOLDER, "all_pairs.csv"))
    options = parser.parse_args()
    found = rows(options.images, options.width, options.queries, options.gallery, options.k)
    record.report(found, as_text, False, options.csv)


if __name__ == "__main__":
    main()
