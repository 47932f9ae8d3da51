"""Killed at any moment and resumed on any number of ranks, a job sees what one undisturbed epoch holds: nothing twice, nothing left out."""

from __future__ import annotations

import itertools
import json
import multiprocessing as mp
import random
import time
from pathlib import Path

import numpy as np
import pytest
from pictures import write_folder

from dali_loaders import DataConfig, TrainLoader, open_source, pack
from dali_loaders.order import build_order
from dali_loaders.sources import open_data

BATCH, SEED = 24, 11
KINDS = {
    "uniform": {},
    "groups": {"images_per_identity": 2},
    "mixed": {"weights": (1.0, 1.0)},
    "mixed groups": {"images_per_identity": 2, "weights": (1.0, 1.0)},
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> str:
    """Two sets: 400 images of 20 identities in a folder, and 800 of 40 in a .rec."""
    folder = tmp_path_factory.mktemp("sets")
    write_folder(folder / "a", identities=20, images=20, size=16)
    write_folder(folder / "other", identities=40, images=20, size=16)
    pack(open_source(str(folder / "other")), str(folder / "b.rec"))
    return f"{folder / 'a'},{folder / 'b.rec'}"


def config_of(sets: str, kind: str) -> DataConfig:
    return DataConfig(train=sets, image_size=16, threads=1, **KINDS[kind])


def train(config: DataConfig, rank: int, ranks: int, consumed: int, record: str) -> None:
    """One rank of a job, until it is killed: a line for each step that it has done."""
    source = open_data(config)
    loader = TrainLoader(source, config, seed=SEED, global_batch=BATCH, rank=rank, world_size=ranks, consumed=consumed)
    pauses = random.Random(rank)
    with open(record, "w", buffering=1) as file:
        for batch in loader:
            assert np.array_equal(batch.labels, source.labels[batch.indices])
            file.write(json.dumps(batch.indices.tolist()) + "\n")
            time.sleep(pauses.uniform(0.01, 0.05))


def steps_of(record: Path) -> list[list[int]]:
    """What a rank wrote; a line that it was killed in does not count."""
    return [json.loads(line) for line in record.read_text().splitlines(keepends=True) if line.endswith("\n")] if record.exists() else []


def seen_by_killed_jobs(config: DataConfig, length: int, kills: int, chance: random.Random, folder: Path) -> list[int]:
    """The images of the stream's first `length` places, as jobs of 1 to 4 processes saw them that were killed after a random number of
    steps, but for the last one. A job goes on after the last step that all ranks of the one before had done."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["dali_loaders.loader", "nvidia.dali.fn"])  # which forks then have at once
    seen: list[int] = []
    for life in range(kills + 1):
        ranks = chance.choice([1, 2, 3, 4])
        records = [folder / f"{life}-{rank}" for rank in range(ranks)]
        jobs = [
            context.Process(target=train, args=(config, rank, ranks, len(seen), str(record)), daemon=True)
            for rank, record in enumerate(records)
        ]
        for job in jobs:
            job.start()
        left = (length - len(seen)) // BATCH
        # Half of an equal share, since a step more may be done until the kill.
        target = chance.randint(0, max(0, left // (kills - life) - 1)) if life < kills else left
        while any(len(steps_of(record)) < target for record in records):
            assert all(job.is_alive() for job in jobs)
            time.sleep(0.01)
        for job in jobs:
            job.kill()
        for job in jobs:
            job.join()
        done = [steps_of(record) for record in records]
        assert life == kills or min(map(len, done)) < left  # the last one reaches the end
        for step in range(min(map(len, done))):
            seen += [index for rank in done for index in rank[step]]
    assert len(seen) >= length
    return seen[:length]


def check(config: DataConfig, seen: list[int]) -> None:
    """An epoch was seen: of uniform orders and groups every image once; of mixed ones 600 of each set, of 400 and of 800 images."""
    order = build_order(open_data(config), config.images_per_identity, SEED)
    assert sorted(seen) == sorted(order.indices(0, order.epoch_length).tolist())
    times = np.bincount(seen, minlength=1200)
    if config.weights:
        assert times[:400].sum() == times[400:].sum() == 600
        assert set(times[:400].tolist()) == {1, 2} and set(times[400:].tolist()) == {0, 1}
    else:
        assert (times == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_24_resumes_on_1_to_4_ranks(sets, kind):
    """The ranks of a job one after another in this process, each some steps ahead of what the job has done when it ends."""
    config, chance = config_of(sets, kind), random.Random(kind)
    source = open_data(config)
    length = build_order(source, config.images_per_identity, SEED).epoch_length
    cuts = [0, *sorted(chance.sample(range(1, length // BATCH), 24)), -(-length // BATCH)]
    seen: list[int] = []
    for start, stop in itertools.pairwise(cuts):
        ranks = chance.choice([1, 2, 3, 4])
        steps: list[list[int]] = [[] for _ in range(start, stop)]
        for rank in range(ranks):
            loader = TrainLoader(source, config, seed=SEED, global_batch=BATCH, rank=rank, world_size=ranks, consumed=start * BATCH)
            for step in steps:
                step += next(loader).indices.tolist()
            loader.close()
        seen += [index for step in steps for index in step]
    check(config, seen[:length])


@pytest.mark.parametrize(("kind", "kills"), [("uniform", 2), *(pytest.param(kind, 24, marks=pytest.mark.long) for kind in KINDS)])
def test_killed_processes(sets, kind, kills, tmp_path):
    config = config_of(sets, kind)
    length = build_order(open_data(config), config.images_per_identity, SEED).epoch_length
    check(config, seen_by_killed_jobs(config, length, kills, random.Random(f"{kind} {kills}"), tmp_path))
