"""Trains every loss on small data, all with the same images, network and number of steps, and keeps how well each verifies
other identities. Margins are chosen on identities carved out of the training set, never on the test set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from benchmarks.training_entries import BUDGET, CANDIDATES, ENTRIES
from pipeline.recipes.data import find_data

FOLDER = os.path.join("runs", "bench-training")
FIGURES = {
    "eer": "eer",
    "tar_at_1e-3": "tar_at_far/1e-3",
    "tar_at_1e-2": "tar_at_far/1e-2",
    "rank1": "rank1",
    "best_threshold": "threshold_at_eer",
}


def rows(entries: list[str], seeds: list[int], jobs: int, tune: bool) -> Iterator[dict[str, Any]]:
    """One row per entry and seed, as they finish; with `tune`, one per candidate of the entries, on identities held out of the training
    set. A training takes one core; `jobs` run at a time."""
    for name in entries:
        if name not in ENTRIES:
            raise ValueError(f"there is no entry {name!r}: choose from {', '.join(ENTRIES)}")
    sets = _carved() if tune else (find_data("dogs/train.tar"), find_data("dogs/test.tar"))
    for path in sets:
        if not path or not os.path.exists(path):
            raise ValueError("this benchmark needs dogs/train.tar and dogs/test.tar where the recipe dogs_small looks for its data")
    work = [(name, candidate, seed) for name in entries for candidate in (CANDIDATES.get(name, [()]) if tune else [()]) for seed in seeds]
    with ThreadPoolExecutor(jobs) as pool:
        started = [pool.submit(_train, name, candidate, seed, sets) for name, candidate, seed in work]
        try:
            for future in as_completed(started):
                yield {"tuning": tune, **future.result()}
        finally:
            for future in started:
                future.cancel()


def _train(name: str, candidate: tuple[str, ...], seed: int, sets: tuple[str, str]) -> dict[str, Any]:
    overrides = [*BUDGET, *ENTRIES[name], *candidate]
    folder = os.path.join(FOLDER, f"{zlib.crc32(repr((overrides, sets)).encode()):08x}-{seed}")
    command = [sys.executable, "-m", "pipeline.cli", "train", "dogs_small", "--ranks", "1", "--resume", "none", "--set"]
    fixed = [f"run.folder={folder}", f"run.seed={seed}", f"data.train={sets[0]}", f"evaluation.data={sets[1]}"]
    done = subprocess.run([*command, *overrides, *fixed], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise ValueError(f"training {name} ended with exit code {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}")
    found: dict[str, float] = {}
    with open(os.path.join(folder, "metrics.jsonl")) as file:
        for line in file:
            found |= json.loads(line)
    prefix = os.path.splitext(os.path.basename(sets[1]))[0]
    figures = {key: found.get(f"{prefix}/{figure}") for key, figure in FIGURES.items()}
    # In a sum of losses the name of a threshold begins with the name of its part.
    threshold = next((value for key, value in found.items() if key.endswith("threshold") and "/" not in key), None)
    chosen = [*ENTRIES[name], *candidate]
    return {
        "entry": name,
        "seed": seed,
        **figures,
        "learned_threshold": threshold,
        "loss": found.get("loss"),
        "settings": chosen,
    }


def _carved() -> tuple[str, str]:
    """(training set, held-out set): a fifth of the identities of dogs/train.tar is held out."""
    source = find_data("dogs/train.tar")
    paths = os.path.join(FOLDER, "fit.tar"), os.path.join(FOLDER, "held-out.tar")
    if not all(os.path.exists(path) for path in paths):
        os.makedirs(FOLDER, exist_ok=True)
        with tarfile.open(source) as whole, tarfile.open(paths[0], "w") as fit, tarfile.open(paths[1], "w") as held_out:
            for member in whole:
                if member.isfile():
                    part = held_out if zlib.crc32(os.path.dirname(member.name).encode()) % 5 == 0 else fit
                    part.addfile(member, whole.extractfile(member))
    return paths


def as_text(row: dict[str, Any]) -> str:
    figures = ", ".join(f"{key} {row[key]:.4f}" for key in ("eer", "tar_at_1e-3", "rank1"))
    return f"{row['entry']}, seed {row['seed']}, {' '.join(row['settings'])}: {figures}"
