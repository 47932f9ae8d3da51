"""Images a second of the training loader, beside DALI's own reader of RecordIO and the loaders that people write around DataLoader.

All read the same .rec and give the same output, in turns within one run. A row of its own is the feed alone, with decoding taken out."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks import loader_peers
from benchmarks.loader_peers import Batches, Set, Setting
from benchmarks.record import quartiles, spread
from dali_loaders import DataConfig, TrainLoader, open_source
from dali_loaders.encoded import HeaderReader, Unreadable, read_image
from dali_loaders.graphs import dali_modules
from dali_loaders.recordio.records import IRHeader, RecordWriter, pack_record
from pipeline.distributed import keep_freed_memory

OURS, FEED = "protoshard", "protoshard, without decoding"
_QUALITY = 96  # of JPEG: drawn faces then take 7 KB, as aligned photos do in the usual sets
_PAUSE = 0.3  # seconds in which a side fills its queues before the next one's turn


@dataclass
class Side:
    name: str
    batches: Batches
    own_process: bool  # whether its work is done by this process, whose CPU time then counts
    rates: list[float]  # images a second, one per round
    core_rates: list[float]  # images in a second of CPU time


def rows(setting: Setting, data: str | None, images: int, ranks: int, feed_only: bool) -> Iterator[dict[str, Any]]:
    """One row per side, then one for the feeds of `ranks` processes at once. `data`: any set, of which `images` are taken; else faces are
    drawn."""
    if setting.device.type == "cpu":
        keep_freed_memory()  # as training does, for all sides
    with tempfile.TemporaryDirectory(prefix="protoshard-bench-") as folder:
        found = _write_set(folder, data, images, setting)
        shared = {"images": found.images, "kilobytes": found.kilobytes} | vars(setting) | {"device": setting.device.type}
        sides, missing = _sides(found, setting, feed_only)
        try:
            for turn in range(1 + setting.rounds):
                for side in sides:
                    rate, core_rate = _turn(side.batches, setting)
                    if turn:  # the first fills caches
                        side.rates.append(rate)
                        side.core_rates.append(core_rate)
                    time.sleep(_PAUSE)
        finally:
            for side in sides:
                side.batches.close()
        for side in sides:
            yield shared | _figures(side, sides[0], ranks=1)
        for name, reason in missing.items():
            yield shared | _figures(Side(name, sides[0].batches, False, [], []), sides[0], ranks=1) | {"note": f"not measured: {reason}"}
        if ranks > 1:
            yield shared | _figures(_feeds_at_once(found.rec, setting, ranks), sides[0], ranks)


def _write_set(folder: str, data: str | None, images: int, setting: Setting) -> Set:
    """Up to `images` readable images as a .rec with an .idx of nothing but images: DALI 2.4 crashes the process on InsightFace's header
    records."""
    rec, written, held = os.path.join(folder, "set.rec"), 0, 0
    headers, resize = HeaderReader(1), False
    with RecordWriter(rec) as writer:
        for label, image in _images(data, images):
            if isinstance(image, Unreadable):
                continue
            (size,), why = headers.sizes([image])
            if not why:
                writer.write(written, pack_record(IRHeader(0, float(label), written, 0), image))
                written, held, resize = written + 1, held + len(image), resize or bool((size != setting.image_size).any())
    if written < setting.batch:
        raise ValueError(f"{data} gives {written} readable images; a batch of {setting.batch} needs as many")
    return Set(rec, rec[:-4] + ".idx", written, round(held / written / 1000, 1), resize)


def _images(data: str | None, images: int) -> Iterator[tuple[int, bytes | Unreadable]]:
    if data is None:
        yield from ((number // 10, _face(number)) for number in range(images))
    else:
        source = open_source(data)
        for index in np.linspace(0, len(source) - 1, min(images, len(source))).astype(int).tolist():
            yield int(source.labels[index]), read_image(source, index)


def _face(number: int) -> bytes:
    import cv2

    from dali_loaders.faces import face_image

    face = face_image(0, number // 10, number % 10)
    return cv2.imencode(".jpg", face[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])[1].tobytes()


def _sides(found: Set, setting: Setting, feed_only: bool) -> tuple[list[Side], dict[str, str]]:
    """The sides, of which the first is this project's, and those that cannot be measured, with what they need."""
    made: list[Side] = []
    missing: dict[str, str] = {}
    makers: dict[str, Callable[[Set, Setting], Batches]] = {} if feed_only else {OURS: _ours}
    makers[FEED] = _feed
    makers |= {} if feed_only else loader_peers.MAKERS
    for name, make in makers.items():
        try:
            made.append(Side(name, make(found, setting), name in (OURS, FEED, loader_peers.DALI), [], []))
        except ImportError as error:
            missing[name] = f"needs {error.name or error}"
    return made, missing


def _ours(found: Set, setting: Setting) -> Batches:
    return _loader(found.rec, setting)


def _loader(rec: str, setting: Setting) -> Batches:
    config = DataConfig(threads=setting.threads, image_size=setting.image_size)
    loader = TrainLoader(open_source(rec), config, seed=0, global_batch=setting.batch, device=setting.device)
    return Batches((batch.images for batch in loader), loader.close, ahead=config.prefetch + 1)


def _feed(found: Set, setting: Setting) -> Batches:
    return _feed_of(found.rec, setting)


def _feed_of(rec: str, setting: Setting) -> Batches:
    """The loader as it is, with a graph in place of the decoding one that takes the same inputs and gives each image's number of bytes."""
    with mock.patch("dali_loaders.decode.image_pipeline", _lengths):
        batches = _loader(rec, setting)
        next(batches)  # the graph is built at the first batch
    return batches


def _lengths(image_size: int, batch_size: int, threads: int, device: torch.device, *, arguments: set[str], **_: Any) -> Any:
    dali, fn, types = dali_modules()
    pipeline = dali.Pipeline(batch_size, threads, device.index if device.type == "cuda" else None, prefetch_queue_depth=1)
    with pipeline:
        lengths = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1).shape()
        flips = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        output = fn.cast(lengths + flips, dtype=types.FLOAT)
        pipeline.set_outputs(output.gpu() if device.type == "cuda" else output)
    return pipeline


def _turn(batches: Batches, setting: Setting) -> tuple[float, float]:
    """Images a second, and images in a second of this process's CPU time, while all queues are in flow."""
    for _ in range(batches.ahead):
        next(batches)
    images, start, cpu = 0, time.perf_counter(), time.process_time()
    while (passed := time.perf_counter() - start) < setting.seconds:
        images += len(next(batches))
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
        passed = time.perf_counter() - start
    return images / passed, images / (time.process_time() - cpu)


_barrier: Any = None  # of the processes that feed at the same time


def _feeds_at_once(rec: str, setting: Setting, ranks: int) -> Side:
    """Sums over `ranks` processes that feed at the same time, each with its share of the cores."""
    context = get_context("spawn")
    share = replace(setting, threads=max(1, len(os.sched_getaffinity(0)) // ranks))
    with ProcessPoolExecutor(ranks, context, initializer=_meet_at, initargs=(context.Barrier(ranks),)) as pool:
        found = [future.result() for future in [pool.submit(_feed_rates, rec, share) for _ in range(ranks)]]
    rates, core_rates = np.array(found).transpose(1, 2, 0)
    per_core = rates.sum(1) / (rates / core_rates).sum(1)  # a rate over a rate per CPU second: the CPU seconds of a second
    return Side(FEED, Batches(iter(()), lambda: None, 0), True, rates.sum(1).tolist(), per_core.tolist())


def _meet_at(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _feed_rates(rec: str, setting: Setting) -> list[list[float]]:
    """[rates, core rates], one per round."""
    batches = _feed_of(rec, setting)
    try:
        found = []
        for _ in range(1 + setting.rounds):
            _barrier.wait(300)
            found.append(_turn(batches, setting))
    finally:
        batches.close()
    return [list(part) for part in zip(*found[1:], strict=True)]


def _figures(side: Side, ours: Side, ranks: int) -> dict[str, Any]:
    beside = ours.name == OURS and side.name not in (OURS, FEED)
    ratios = [mine / theirs for mine, theirs in zip(ours.rates, side.rates, strict=False)] if beside else []
    core = side.core_rates if side.own_process else []
    return {
        "side": side.name,
        "ranks": ranks,
        **quartiles("images_per_s", side.rates),
        **quartiles("images_per_core_s", core),
        **quartiles("ours_over_this", ratios),
        "note": "",
    }


def as_text(row: dict[str, Any]) -> str:
    """One line for people; before the first of them, what was measured."""
    head = f"{row['images']} images of {row['kilobytes']} KB, batch {row['batch']}, {row['threads']} threads, {row['device']}: "
    if row["note"]:
        return f"{head}{row['side']}: {row['note']}"
    ranks = f", {row['ranks']} ranks" if row["ranks"] > 1 else ""
    line = f"{head}{row['side']}{ranks}: {spread(row, 'images_per_s', 'images/s')}"
    if row["images_per_core_s"] is not None:
        line += f", {row['images_per_core_s']:,.0f} a core"
    if row["ours_over_this"] is not None:
        line += f"; protoshard / this {spread(row, 'ours_over_this')}"
    return line
