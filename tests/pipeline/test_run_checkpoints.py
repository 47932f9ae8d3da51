"""What a run that goes on says about its checkpoint: differences in one sentence, which may be forced and which not; a run whose folder
cannot be written; which checkpoint is the best."""

from __future__ import annotations

import itertools
import json
import logging
import os
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest

from pipeline import checkpoint, run_checkpoints, same_run
from pipeline.checkpoint import CheckpointConfig
from pipeline.checkpoint.folder import best_of
from pipeline.checkpoint.stores import _LocalSink
from pipeline.config import as_dict
from pipeline.evaluation.evaluate_checkpoint import evaluate_checkpoint
from pipeline.evaluation.evaluator import EvaluationConfig
from pipeline.starting_weights import StartConfig
from tests.pipeline.checkpoint.breaking import full
from tests.pipeline.checkpoint.states import edit_manifest
from tests.pipeline.runs import configuration, faces, train_losses, train_until


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces(str(tmp_path_factory.mktemp("faces")))


NAMES = [f"person {n}" for n in range(13)]


def a_run(data="x.tar", names=NAMES, **changes):
    config = configuration(data, "out/run", 4, **changes)
    fingerprint = {"num_classes": len(names), "identities": f"{hash(tuple(names)):x}", "images": 78}
    return SimpleNamespace(config=config, fingerprint=fingerprint, source=SimpleNamespace(identities=names))


def a_checkpoint(run, **changes):
    info = {**same_run.identity(run), "config": as_dict(run.config), "consumed": 24, "step": 1, **changes}
    return SimpleNamespace(path="out/run/step-1", info=json.loads(json.dumps(info)), identities=lambda: run.source.identities)


def test_nothing_to_say_where_nothing_differs():
    assert same_run.check_identity(a_run(), a_checkpoint(a_run())) == []


def test_differences_are_listed_together():
    theirs = a_run(optimizer={"name": "adamw", "frozen": ("input",)}, run={"batch": 48})
    with pytest.raises(ValueError) as raised:
        same_run.check_identity(a_run(), a_checkpoint(theirs))
    words = str(raised.value)
    assert words.startswith(
        "checkpoint out/run/step-1 has optimizer adamw, but this run has sgd; frozen ['input'], but this run has []; "
        "batch 48, but this run has 24: "
    )
    # The batch decides what was consumed, so that nothing forces it.
    assert "--from instead of --resume" in words and "checkpoint.differences=continue" not in words


def test_some_may_be_forced():
    theirs, ours = a_run(optimizer={"name": "adamw"}), a_run()
    with pytest.raises(ValueError, match=r"to go on in spite of it, --set checkpoint\.differences=continue"):
        same_run.check_identity(ours, a_checkpoint(theirs))
    ours.config = replace(ours.config, checkpoint=CheckpointConfig(differences="continue"))
    assert same_run.check_identity(ours, a_checkpoint(theirs)) == ["checkpoint out/run/step-1 has optimizer adamw, but this run has sgd"]
    with pytest.raises(ValueError, match="has batch 48, but this run has 24"):  # this one may not
        same_run.check_identity(ours, a_checkpoint(a_run(run={"batch": 48})))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([*NAMES[:-1], "person x"], "1 of the identities are not among this run's, such as 'person x'; 1 of the identities are new"),
        ([*NAMES, "person y"], "num_classes 14, but this run has 13; 1 of the identities are not among this run's, such as 'person y'"),
        (NAMES[:-2], "num_classes 11, but this run has 13; 2 of the identities are new, such as 'person 11'"),
        (NAMES[::-1], "the same names of identities stand in another order"),
        ([*NAMES[:-1], "\x1b[2J\ud800"], r"such as '\x1b[2J"),
    ],
)
def test_identities_are_compared_by_name(names, words):
    with pytest.raises(ValueError) as raised:
        same_run.check_identity(a_run(), a_checkpoint(a_run(names=names)))
    assert words in str(raised.value) and str(raised.value).isprintable()


def test_what_a_stranger_wrote_is_shown_without_moving_the_cursor():
    stranger = a_checkpoint(a_run(), backbone="\x1b[31m" + "x" * 10**5)
    with pytest.raises(ValueError) as raised:
        same_run.check_identity(a_run(), stranger)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 700
    stranger = a_checkpoint(a_run(), started_from={"given": "\x1b[2J" + "x" * 10**5, "path": "x", "classifier": "\r", "ema": "\n"})
    ours = a_run()
    ours.config = replace(ours.config, start=StartConfig("y"))
    with pytest.raises(ValueError) as raised:
        same_run.check_start(ours, stranger.path, stranger.info)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 700
    stranger = a_checkpoint(a_run())
    stranger.info["config"]["run"]["batch"] = "\x1b[31m" + "x" * 10**5
    (line,) = same_run.changed_fields(a_run(), stranger.info)
    assert line.isprintable() and len(line) < 700


def run_of(data, folder, **changes):
    config = configuration(data, str(folder), 4, save_every=2)
    return replace(config, checkpoint=replace(config.checkpoint, **changes.pop("checkpoint", {})), **changes)


def test_a_checkpoint_that_is_no_run_s(data, tmp_path):
    config = run_of(data, tmp_path / "run")
    path = checkpoint.save(str(tmp_path), 1, {}, {"backbone": "small_nobn"})
    with pytest.raises(ValueError, match="is not that of a run: begin a new run with its weights, with --from instead of --resume"):
        train_losses(config, path)


def steps_of(run):
    return checkpoint.complete(str(run / "checkpoints"))


def train_on_a_full_disk(config, fails):
    """Trains while the first `fails` writes of checkpoints fail. The sentence in which it ends; None where all went well."""
    write, count = _LocalSink.write, itertools.count(1)

    def failing(self, data):
        if next(count) <= fails:
            raise full()
        write(self, data)

    with mock.patch.object(_LocalSink, "write", failing):
        try:
            train_losses(config)
        except ValueError as error:
            return str(error)


def test_a_disk_that_is_full_for_a_while(ranks, data, tmp_path):
    """The save at step 2 fails, training goes on, the one at step 4 succeeds."""
    config = run_of(data, tmp_path / "run")
    assert ranks(1).run(train_on_a_full_disk, config, 1) == [None]
    assert steps_of(tmp_path / "run") == ["step-00000004"]


def test_a_disk_that_stays_full(ranks, data, tmp_path):
    """The run ends with a sentence; what was saved before is whole, and the same command goes on from it."""
    config = run_of(data, tmp_path / "run")
    whole = ranks(1).run(train_losses, run_of(data, tmp_path / "whole"))[0]
    ranks(1).run(train_losses, replace(config, run=replace(config.run, epochs=config.run.epochs / 2)))
    (sentence,) = ranks(1).run(train_on_a_full_disk, config, 10**6)
    assert sentence == (
        f"step 4 could not be saved to {tmp_path}/run/checkpoints (No space left on device); earlier checkpoints are untouched: see to it, "
        "and run the same command, which goes on from the newest checkpoint"
    )
    assert steps_of(tmp_path / "run") == ["step-00000002"]
    ranks(1).run(train_losses, config)
    assert steps_of(tmp_path / "run") == ["step-00000002", "step-00000004"] and whole


def train_in_memory(config):
    """A run whose checkpoints lie behind an address: goes on from it, and a new run begins with its weights."""
    address = config.checkpoint.folder
    half = replace(config, run=replace(config.run, epochs=config.run.epochs / 2))
    first = train_losses(half)
    names = checkpoint.complete(address)
    losses_ = train_losses(config)
    started = replace(config, run=replace(config.run, folder=config.run.folder + "-new"), start=StartConfig(address, classifier=True))
    started = replace(started, checkpoint=replace(config.checkpoint, folder=""))
    train_losses(started)
    evaluate_checkpoint(address, config.data.train, as_json=True)
    origin = checkpoint.newest(os.path.join(config.run.folder + "-new", "checkpoints")).info["started_from"]
    return names, checkpoint.complete(address), len(first), len(losses_), origin["checkpoint"]


def test_a_run_whose_checkpoints_lie_behind_an_address(ranks, data, tmp_path):
    config = run_of(data, tmp_path / "run", checkpoint={"folder": "memory://runs/this"})
    (found,) = ranks(1).run(train_in_memory, config)
    steps = ["step-00000002", "step-00000004"]
    assert found == (steps[:1], steps, 2, 4, "memory://runs/this/step-00000004")


def test_the_same_command_with_a_path_goes_on_after_a_stop(ranks, data, tmp_path):
    config = run_of(data, tmp_path / "run", checkpoint={"folder": f"file://{tmp_path}/run/checkpoints"})
    path = f"{tmp_path}/run/checkpoints/step-00000002"
    longer = replace(config, run=replace(config.run, epochs=2 * config.run.epochs))

    def there():
        return sorted(name for name in os.listdir(f"{tmp_path}/run/checkpoints") if name.startswith("step-"))

    ranks(1).run(train_losses, config)
    assert there() == ["step-00000002", "step-00000004"]
    ranks(1).run(train_until, longer, 5, path)
    back = ["step-00000002", "step-00000004", "step-00000004.superseded"]
    assert there() == back
    ranks(1).run(train_until, longer, 7, path)  # the same command
    assert there() == [*back, "step-00000006"]
    ranks(1).run(train_until, longer, 8)  # without the path, in between
    ranks(1).run(train_losses, longer, path)
    assert there() == [*back, "step-00000006", "step-00000008"]
    ranks(1).run(train_until, replace(longer, optimizer=replace(longer.optimizer, lr=0.04)), 3, path)  # another command
    aside = [f"step-0000000{step}" for step in ("4.superseded", "4.superseded.2", "6.superseded", "8.superseded")]
    assert there() == ["step-00000002", *aside]


def test_a_folder_that_cannot_be_written(ranks, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AssertionError, match=r"ValueError: checkpoint\.folder=.*/file/x cannot be written \(Not a directory\)"):
        ranks(1).run(train_losses, run_of(data, tmp_path / "run", checkpoint={"folder": str(tmp_path / "file" / "x")}))


@pytest.mark.parametrize(("best", "kept"), [("faces/eer", 2), ("faces/rank1", 3), ("other/loss", 1)])
def test_the_best_one_is_kept(tmp_path, best, kept):
    """By figures that are better when lower, and by such that are better when higher; of equal ones the first."""
    saver = checkpoint.Saver(str(tmp_path), CheckpointConfig(keep=1, best=best, asynchronous=False))
    figures = {
        1: {"faces/eer": 0.4, "faces/rank1": 0.2, "other/loss": 0.0},
        2: {"faces/eer": 0.1},
        3: {"faces/rank1": 0.9, "faces/eer": 0.1},
    }
    for step in range(1, 7):
        saver.start(step, {}, {"figures": figures.get(step, {})})
    assert sorted(os.listdir(tmp_path)) == [f"step-{kept:08d}", "step-00000006"]


def test_every_n_th_is_kept(tmp_path):
    saver = checkpoint.Saver(str(tmp_path), CheckpointConfig(keep=2, keep_every=3, asynchronous=False))
    for step in range(1, 9):
        saver.start(step, {}, {})
    assert sorted(os.listdir(tmp_path)) == [f"step-{step:08d}" for step in (3, 6, 7, 8)]


def test_figures_that_are_none_judge_nothing(tmp_path):
    saver = checkpoint.Saver(str(tmp_path), CheckpointConfig(keep=1, best="x/eer", asynchronous=False))
    saver.start(1, {}, {"figures": {"x/eer": 0.5}})
    edit_manifest(str(tmp_path / "step-00000001"), lambda values: values.update(figures={"x/eer": "0.1"}))
    for step, figure in ((2, float("nan")), (3, None), (4, 0.7), (5, 0.8)):
        saver.start(step, {}, {"figures": {"x/eer": figure}})
    assert sorted(os.listdir(tmp_path)) == ["step-00000004", "step-00000005"]


def test_a_run_keeps_its_best(ranks, data, tmp_path, caplog):
    evaluation = EvaluationConfig(data=data, every_epochs=0.1)
    config = run_of(data, tmp_path / "run", evaluation=evaluation, checkpoint={"keep": 9, "best": "faces/eer"})
    ranks(1).run(train_losses, config)
    figures = checkpoint.newest(str(tmp_path / "run" / "checkpoints")).info["figures"]
    assert {"faces/eer", "faces/rank1"} <= figures.keys() and 0 <= figures["faces/eer"] <= 1
    for best, remedy in (("eer", "such as faces/eer"), ("faces_ema/eer", "such as faces/eer"), ("faces/loss", "such as faces/eer")):
        with pytest.raises(ValueError, match=f"^checkpoint.best is '{best}', but must be a figure of one of .*{remedy}"):
            train_losses(run_of(data, tmp_path / "x", evaluation=evaluation, checkpoint={"best": best}))
    with pytest.raises(ValueError, match=r"and there is none: name a set with evaluation\.data"):
        train_losses(run_of(data, tmp_path / "x", checkpoint={"best": "faces/eer"}))


@pytest.mark.parametrize("best", ["a/people/mfr", "a/people/African/tar_at_far/1e-6", "a/people/1:N/rank5", "a/people/spread"])
def test_figures_of_groups_and_of_protocols_can_be_the_best(best):
    run = mock.MagicMock(evaluator=SimpleNamespace(names={"x": "a/people"}), ema=None)
    run.config.checkpoint.best = best
    with mock.patch.object(run_checkpoints, "Saver"):
        run_checkpoints.saver(run)
        run.config.checkpoint.best = best.replace("people", "other")
        with pytest.raises(ValueError, match="must be a figure of one of this run's evaluation sets, such as a/people/eer"):
            run_checkpoints.saver(run)


@pytest.mark.parametrize(("figure", "kept"), [("x/spread", 1), ("x/Asian/eer", 1), ("x/mfr", 2)])
def test_which_of_two_is_the_better_one(figure, kept):
    assert best_of({"step-00000001": 0.1, "step-00000002": 0.2}, figure) == f"step-0000000{kept}"


def test_a_figure_that_the_evaluation_does_not_give_is_said(caplog):
    saver = mock.Mock()
    run = mock.MagicMock(evaluator=SimpleNamespace(newest={"a/eer": 0.1}), saver=saver, agreement=SimpleNamespace(rank=0))
    run.config.checkpoint.best = "a/eerie"
    with (
        mock.patch.multiple(run_checkpoints, state=mock.DEFAULT, as_dict=mock.DEFAULT),
        mock.patch.multiple(same_run, identity=lambda run: {}, order=lambda run: {}),
        caplog.at_level(logging.WARNING),
    ):
        run_checkpoints.save(run, {"eer": 0.1})
    assert "checkpoint.best is 'a/eerie', which is none of the figures: they are a/eer" in caplog.text
    assert saver.start.call_args.args[2]["figures"] == {"a/eer": 0.1}
