"""The file FOLDER/regroup: the ranks save and end, and start anew, on the same or another number of ranks, with the losses of a run that
was not asked. Only where a launcher starts ranks again."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest

from pipeline.stopping import ATTEMPT, REGROUP, Asked, Regrouped, Stop, Stopped
from pipeline.train import train
from pipeline.trainer import Trainer
from tests.pipeline.runs import configuration, faces, train_losses

STEPS = 12


def regroup_at(config, step, attempt):
    """Runs on every rank, of which the first is asked during that step: the sentence with which it ended."""
    train_step = Trainer._train_step

    def asking(self):
        if self.step == step and self.place.is_first:
            Path(config.run.folder, REGROUP).touch()
        return train_step(self)

    with mock.patch.object(Trainer, "_train_step", asking), mock.patch.dict(os.environ, {ATTEMPT: attempt} if attempt else {}):
        try:
            train(config)
        except Regrouped as end:
            return str(end)
    return None


@pytest.mark.slow
def test_ranks_save_and_start_anew(ranks, tmp_path):
    data = faces(str(tmp_path))
    expected = ranks(1).run(train_losses, configuration(data, str(tmp_path / "whole"), STEPS))[0]
    config = configuration(data, str(tmp_path / "run"), STEPS)
    ends = ranks(2).run(regroup_at, config, 4, "job 1")
    assert all(end.startswith("stopped by the file regroup at step 5, saved as") for end in ends)
    assert not (tmp_path / "run" / REGROUP).exists()
    assert ranks(1).run(regroup_at, config, 7, "")[0] is None  # nobody would start them again
    assert ranks(1).run(train_losses, config)[0] == pytest.approx(expected, rel=1e-4)


def test_what_a_rank_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv(ATTEMPT, raising=False)
    (tmp_path / REGROUP).touch()
    stop = Stop()
    stop.watch(str(tmp_path), 0, keep=True)
    assert not (tmp_path / REGROUP).exists()  # of an earlier start
    (tmp_path / REGROUP).touch()
    assert stop.asked() == 0
    monkeypatch.setenv(ATTEMPT, "job 3")
    (tmp_path / "stop").touch()
    stop = Stop()
    stop.watch(str(tmp_path), 0, keep=True)
    assert (tmp_path / "stop").exists() and Asked(stop.asked()).kind is Stopped
    (tmp_path / "stop").unlink()
    stop = Stop()
    stop.watch(str(tmp_path), 0)
    assert stop.asked() == 0
    (tmp_path / REGROUP).touch()
    assert Asked(stop.asked()).kind is Regrouped and str(Asked(stop.asked())) == "the file regroup"
    (tmp_path / "stop").touch()
    assert Asked(stop.asked()).kind is Stopped and str(Asked(stop.asked())) == "the file stop"
    stop.obeyed()
    assert not list(tmp_path.iterdir())
