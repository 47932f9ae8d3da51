"""A run that is started again once it is complete, or was broken off near its end: figures, lines and pictures are those of a run that was
not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dali_loaders import open_source
from dali_loaders.faces import FacesConfig, write_faces
from pipeline.evaluation import evaluate, evaluator, write_bin
from pipeline.evaluation.evaluator import EvaluationConfig, Evaluator
from pipeline.evaluation.kept import Kept
from pipeline.monitor import MonitorConfig
from pipeline.stopping import _RANKS, Asked, Stopped
from pipeline.train import train
from pipeline.trainer import Trainer
from tests.pipeline.runs import InterruptionError, configuration, faces

STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces(str(tmp_path_factory.mktemp("faces")))


@pytest.fixture(scope="module")
def pairs(data):
    """13 genuine and 13 impostor pairs of those faces."""
    source = open_source(data)
    numbers = [number for i in range(0, 78, 6) for number in (i, i + 1, i, (i + 6) % 78)]
    path = os.path.join(os.path.dirname(data), "pairs.bin")
    write_bin(path, [source.read(number) for number in numbers], [True, False] * 13)
    return path


def config(data, pairs, folder):
    evaluation = EvaluationConfig(data=data, pairs=(pairs,), at_start=True)
    return configuration(data, str(folder), STEPS, save_every=2, evaluation=evaluation, monitor=MonitorConfig())


def files(folder) -> dict[str, bytes]:
    """All that a run tells the world."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    told = ("roc-", "events.", "metrics.jsonl", "evaluations.json", "curves-", "hard-pairs-", "run.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.name.startswith(told)}


def lines(folder) -> list[dict]:
    """Without what depends on the clock."""
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    clock = ("time", "images_per_second", "wait_share", "save_stall", "memory/host_gib", "step_seconds/")
    return [{key: value for key, value in row.items() if not key.startswith(clock)} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(data, pairs, tmp_path_factory):
    """Its folder, and the figures that training returned."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train(config(data, pairs, folder))


def pictures(folder) -> dict[str, bytes]:
    return {name: content for name, content in files(folder).items() if name.endswith(".png")}


def results(folder) -> dict[str, bytes]:
    """What pages are made of: pictures, curves, hard pairs, figures with intervals and tables."""
    return {name: content for name, content in files(folder).items() if name.startswith(("roc-", "curves-", "hard-pairs-", "evaluations"))}


def test_a_finished_run_says_so_and_changes_nothing(data, pairs, undisturbed, capsys):
    folder, figures = undisturbed
    before = files(folder)
    assert len(pictures(folder)) == 4  # both sets at step 0, and at the end
    assert before.keys() >= {"curves-faces.npz", "curves-pairs.npz", "hard-pairs-faces.json", "run.json"}
    rows = json.loads(before["evaluations.json"])["evaluations"]
    assert [(row["step"], "eer" in row["intervals"], "tables" in row) for row in rows] == [(0, True, False)] * 2 + [(4, True, True)] * 2
    about = json.loads(before["run.json"])
    assert about["config"]["run"]["batch"] == 24 and (about["start"]["total_steps"], about["start"]["images"]) == (4, 78)
    with mock.patch.object(evaluator, "evaluate", side_effect=AssertionError("evaluated again")):
        for _ in range(2):
            assert train(config(data, pairs, folder)) == figures
            assert files(folder) == before
            assert "this run is complete: nothing is left to train, and its figures are those it had" in capsys.readouterr().err


def test_a_line_that_is_missing_comes_back_without_an_evaluation(data, pairs, undisturbed):
    folder, figures = undisturbed
    path, before = folder / "metrics.jsonl", lines(folder)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with mock.patch.object(evaluator, "evaluate", side_effect=AssertionError("evaluated again")):
        assert train(config(data, pairs, folder)) == figures
    assert lines(folder) == before


def test_stopped_between_the_two_sets_of_the_last_evaluation(data, pairs, undisturbed, tmp_path):
    measure = Evaluator._measure

    def stopped(self, module, path, name, step, *others):
        if path == pairs and step == STEPS:
            raise Asked(signal.SIGTERM * _RANKS)
        return measure(self, module, path, name, step, *others)

    with mock.patch.object(Evaluator, "_measure", stopped), pytest.raises(Stopped):
        train(config(data, pairs, tmp_path / "run"))
    with mock.patch.object(evaluator, "evaluate", wraps=evaluate) as evaluated:
        assert train(config(data, pairs, tmp_path / "run")) == undisturbed[1]
    assert [call.args[1] for call in evaluated.call_args_list] == [pairs]
    assert lines(tmp_path / "run") == lines(undisturbed[0])
    assert results(tmp_path / "run") == results(undisturbed[0])


def test_broken_off_in_the_last_save(data, pairs, undisturbed, tmp_path):
    save = Trainer.save

    def broken(self, figures=None):
        if self.step == STEPS:
            self.saver.finish()
            raise InterruptionError
        save(self, figures)

    for _ in range(2):
        with mock.patch.object(Trainer, "save", broken), pytest.raises(InterruptionError):
            train(config(data, pairs, tmp_path / "run"))
        assert len(list(tmp_path.rglob("events.*.hparams"))) == 1  # a run that is broken off behind the save has told all
    assert train(config(data, pairs, tmp_path / "run")) == undisturbed[1]
    assert lines(tmp_path / "run") == lines(undisturbed[0])
    assert results(tmp_path / "run") == results(undisturbed[0])  # with the curve of step 0 in each
    shown = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "run")).Reload()
    assert [event.step for event in shown.Images("evaluation/faces/roc")] == [0, STEPS]
    assert len(list(tmp_path.rglob("events.*.hparams"))) == 1


def test_another_set_is_evaluated_and_said_to_be(data, pairs, undisturbed, tmp_path, capsys):
    first = config(data, pairs, tmp_path / "run")
    shutil.copytree(undisturbed[0], tmp_path / "run")
    os.mkdir(tmp_path / "others")
    other = str(tmp_path / "others" / os.path.basename(data))  # of the same name
    write_faces(other, FacesConfig(identities=5, images_per_identity=6, size=32, seed=7), workers=1)
    second = replace(first, evaluation=replace(first.evaluation, data=other))
    before = lines(tmp_path / "run")
    figures = train(second)
    assert f"nothing is left to train, and evaluating {other}, of which it has no figures yet" in capsys.readouterr().err
    (line,) = lines(tmp_path / "run")[len(before) :]
    assert line["faces/images"] == 30 and line["faces/eer"] == figures["eer"]
    after = files(tmp_path / "run")
    for again in (second, first):
        train(again)
        assert files(tmp_path / "run") == after


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"evaluations": [1, {"step": 0}]}', b"\xff", b'{"evaluations": {"a": 1}}'])
def test_a_file_that_is_not_whole_is_forgotten(tmp_path, content):
    (tmp_path / "evaluations.json").write_bytes(content)
    kept = Kept(str(tmp_path), 9)
    assert kept.values(0, "a", {}) is None


@pytest.mark.parametrize("values", [[], 7, {"eer": "low"}, {"eer": None}])
def test_damaged_values_are_not_taken_for_measured(tmp_path, values):
    row = {"step": 0, "name": "a", "of": {}, "values": {"eer": 0.5}}
    (tmp_path / "evaluations.json").write_text(json.dumps({"evaluations": [row]}))
    assert Kept(str(tmp_path), 9).values(0, "a", {}) == {"eer": 0.5}
    (tmp_path / "evaluations.json").write_text(json.dumps({"evaluations": [row | {"values": values}]}))
    assert Kept(str(tmp_path), 9).values(0, "a", {}) is None
