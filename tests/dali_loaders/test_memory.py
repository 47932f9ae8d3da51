"""Memory of a run on a large set stays what it was after the first steps."""

from __future__ import annotations

import multiprocessing as mp
import os
import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from pictures import picture

from dali_loaders import DataConfig, TrainLoader
from dali_loaders.recordio.records import MAGIC, index_path
from dali_loaders.sources import open_data

STEPS = 100


def write_large_set(path: str, identities: int, images: int) -> None:
    """A .rec of `images` records of one JPEG of 32 x 32, `images / identities` of each identity, in no order."""
    jpeg = picture(1)
    length = 24 + len(jpeg)
    record = np.zeros(8 + length + -length % 4, np.uint8)
    record[:8] = np.array([MAGIC, length], "<u4").view(np.uint8)
    record[32 : 32 + len(jpeg)] = np.frombuffer(jpeg, np.uint8)
    with open(path, "wb") as file:
        for start in range(0, images, 10_000):
            rows = np.tile(record, (min(10_000, images - start), 1))
            keys = np.arange(start, start + len(rows))
            rows[:, 12:16] = (keys * 7919 % images % identities).astype("<f4").view(np.uint8).reshape(-1, 4)
            rows[:, 16:24] = keys.astype("<u8").view(np.uint8).reshape(-1, 8)
            rows.tofile(file)
    with open(index_path(path), "w") as file:
        file.writelines(f"{key}\t{key * len(record)}\n" for key in range(images))


def megabytes() -> float:
    """Of this process's own, without files that are mapped."""
    return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def of_loading(path: str, group: int, batch: int = 256) -> list[float]:
    """Memory after each step of a loader."""
    config = DataConfig(train=path, image_size=32, threads=1, images_per_identity=group)
    loader = TrainLoader(open_data(config), config, seed=1, global_batch=batch)
    return [megabytes() for _ in range(STEPS) if next(loader)]


def of_training(path: str, group: int) -> list[float]:
    """Memory after each step of a run, with a small network."""
    from pipeline.train import train
    from pipeline.trainer import Trainer
    from tests.pipeline.runs import configuration

    found: list[float] = []
    train_step = Trainer._train_step

    def measured(self: Trainer):
        self.total_steps = STEPS
        loss = train_step(self)
        found.append(megabytes())
        return loss

    with mock.patch.object(Trainer, "_train_step", measured):
        train(configuration(path, os.path.join(os.path.dirname(path), f"run{group}"), STEPS), "none")
    return found


def _send(connection, measure: Callable[..., list[float]], *arguments) -> None:
    connection.send(measure(*arguments))


def check(measure: Callable[..., list[float]], *arguments) -> None:
    """In a process of its own, whose memory nothing else moves."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, measure, *arguments))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    print(
        f"{measure.__name__}{arguments[1:]}, MB after steps 1, 20, 40, 60, 80, 100:",
        *(round(found[step - 1]) for step in (1, 20, 40, 60, 80, 100)),
    )
    assert max(found[80:]) - max(found[19:40]) < 8


def test_memory_of_a_loader_is_flat(tmp_path):
    path = str(tmp_path / "large.rec")
    write_large_set(path, 1000, 10_000)
    check(of_loading, path, 1, 64)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_memory_is_flat_on_a_million_images_of_100_000_identities(tmp_path):
    path = str(tmp_path / "large.rec")
    write_large_set(path, 100_000, 1_000_000)
    try:
        for measure, group in ((of_loading, 1), (of_loading, 4), (of_training, 1)):
            check(measure, path, group)
    finally:
        os.remove(path)
