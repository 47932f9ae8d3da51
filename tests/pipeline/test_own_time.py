"""A rank that is slower than the others is told by its own part of a step, although all ranks' steps take as long."""

from __future__ import annotations

import json
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from pipeline.engine.ddp import DDPEngine
from pipeline.own_time import OwnTime
from pipeline.train import train
from tests.pipeline.runs import configuration, faces

SLOW = 0.25  # seconds


def train_with_a_slow_rank(data: str, folder: str) -> None:
    forward = DDPEngine.forward

    def slow(self, *arguments):
        if torch.distributed.get_rank() == 1:
            time.sleep(SLOW)
        return forward(self, *arguments)

    with mock.patch.object(DDPEngine, "forward", slow):
        train(configuration(data, folder, steps=4, run={"log_every": 2}))


def test_the_slowest_rank_is_named(ranks, tmp_path):
    folder = tmp_path / "run"
    ranks(2).run(train_with_a_slow_rank, faces(str(tmp_path)), str(folder))
    rows = [row for row in map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert row["step_seconds/slowest_rank"] == 1
        assert row["step_seconds/slowest"] >= SLOW and row["step_seconds/quickest"] > 0
    assert rows[-1]["step_seconds/slowest"] > rows[-1]["step_seconds/quickest"]


def test_time_is_summed_until_it_is_taken():
    own = OwnTime(torch.device("cpu"))
    for _ in range(2):
        own.begin()
        time.sleep(0.01)
        own.end()
        time.sleep(0.01)  # with the others
    assert own.take() >= 0.02 and own.take() == 0.0


def test_on_a_gpu_nothing_waits(monkeypatch):
    """Events are recorded, and read when the line is written."""
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.number = len(said)

        def record(self):
            said.append("record")

        def elapsed_time(self, other):
            said.append("read")
            return 1000.0 * (other.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    own = OwnTime(torch.device("cuda"))
    for _ in range(2):
        own.begin()
        own.end()
    assert said == ["record"] * 4 and own.take() == pytest.approx(2.0) and said[4:] == ["read"] * 2
