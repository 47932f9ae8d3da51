"""New runs that begin with the weights of another one, and layers that do not move."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from dali_loaders.faces import FacesConfig, write_faces
from partial_fc import losses
from partial_fc.shards import ClassShard
from pipeline import checkpoint
from pipeline.distributed import join
from pipeline.starting_weights import StartConfig, backbone_of
from pipeline.trainer import Trainer
from tests.pipeline.checkpoint.states import edit_manifest
from tests.pipeline.runs import BATCH, configuration, faces, train_losses, train_until

pytestmark = pytest.mark.slow
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces(str(tmp_path_factory.mktemp("faces")))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A tar of 10 identities, of whom the first 3 are the last 3 of `data`."""
    path = str(tmp_path_factory.mktemp("others") / "others.tar")
    write_faces(path, FacesConfig(identities=10, images_per_identity=6, size=32, first_identity=10), workers=1)
    return path


@pytest.fixture(scope="module")
def source(ranks, data, tmp_path_factory):
    """The folder of a finished run."""
    config = configuration(data, str(tmp_path_factory.mktemp("source")), STEPS, backbone="small")
    ranks(2).run(train_losses, config)
    return config.run.folder


def tuned(data, folder, weights, steps=STEPS, engine="ddp", **changes):
    """A run on `others`, which has 60 images, or on `data`."""
    start = StartConfig(str(weights), **changes.pop("start", {}))
    changes = {"backbone": "small", "run": {"epochs": steps * BATCH / (78 if data.endswith("faces.tar") else 60)}, **changes}
    return replace(configuration(data, str(folder), steps, engine, **changes), start=start)


def beginning(config, resume="auto"):
    """Runs on every rank: where a run stands at its beginning, and the remarks that it makes."""
    trainer = Trainer(config, join(), resume)
    try:
        weights = {name: tensor.clone() for name, tensor in trainer.engine.module.state_dict().items()}
        moved = [name for name, part in trainer.engine.state().items() if name.startswith("optimizer.") and part.tensor.any()]
        return trainer.step, weights, trainer.classifier.prototypes.detach().clone(), trainer.resume_remarks, moved
    finally:
        trainer.close()


def refuses(config, sentence, resume="auto"):
    with pytest.raises(ValueError, match=sentence):
        Trainer(config, join(), resume)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
@pytest.mark.parametrize("form", ["run", "checkpoint", "pt", "safetensors"])
def test_a_new_run_begins_with_the_backbone_of_another(ranks, others, source, engine, form, tmp_path):
    path = checkpoint.locate(source).path
    expected = backbone_of(checkpoint.open_checkpoint(path))
    given = {"run": source, "checkpoint": path}.get(form) or str(tmp_path / f"weights.{form}")
    if form == "pt":
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in expected.items()}}, given)
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(expected, given)
    fresh = beginning(configuration(others, str(tmp_path / "fresh"), STEPS, backbone="small"))
    for step, weights, prototypes, remarks, moved in ranks(1).run(beginning, tuned(others, tmp_path / "tuned", given, engine=engine)):
        assert step == 0 and not moved
        assert_same(weights, expected)
        assert torch.equal(prototypes, fresh[2])
        assert remarks == [f"a new run with the backbone weights of {path if form in ('run', 'checkpoint') else given}"]


def test_a_restart_goes_on_and_does_not_begin_again(ranks, others, source, tmp_path):
    def config(folder):
        return tuned(others, tmp_path / folder, tmp_path / "source", save_every=2)

    shutil.copytree(source, tmp_path / "source")
    whole = ranks(2).run(train_losses, config("whole"))[0]
    ranks(2).run(train_until, config("broken"), 3)
    os.rename(tmp_path / "source", tmp_path / "gone")  # which a run that goes on does not need
    (step, _, _, remarks, _), _ = ranks(2).run(beginning, config("broken"))
    assert step == 2 and remarks == []
    asked_otherwise = replace(config("broken"), start=StartConfig(str(tmp_path / "source"), classifier=True))
    refuses(asked_otherwise, r"/broken/.* began with .*source \(classifier=False, ema=False\)")
    np.testing.assert_allclose(ranks(2).run(train_losses, config("broken"))[0], whole, rtol=1e-4)
    for name in checkpoint.complete(str(tmp_path / "broken" / "checkpoints")):
        info = checkpoint.open_checkpoint(str(tmp_path / "broken" / "checkpoints" / name)).info
        assert info["started_from"]["path"] == str(tmp_path / "source") and info["started_from"]["step"] == STEPS


def test_a_folder_of_another_run_is_not_gone_on_with(data, others, source, tmp_path):
    shutil.copytree(source, tmp_path / "own")
    config = tuned(data, tmp_path / "own", source)
    refuses(config, r"--from .*: the run of checkpoint .*/own/.* did not begin with another one's weights\. .*run\.folder=PATH")
    refuses(tuned(data, tmp_path / "own", tmp_path / "own"), "did not begin with another one's weights")
    refuses(tuned(data, tmp_path / "own", tmp_path / "own"), "--resume none would rename .*/own, where .*/own lies", "none")
    refuses(tuned(data, tmp_path / "new", source), "leave out --from", checkpoint.locate(source).path)
    assert beginning(config, "none")[0] == 0 and os.path.isdir(tmp_path / "own.1")
    refuses(configuration(others, str(tmp_path / "own.1"), STEPS, backbone="small"), "begin a new run with its backbone, with --from")


def named_rows(config, expected_SD):
    """Runs on every rank: how many of the first rows are the expected ones, and whether the others are those of a new run."""
    _, _, prototypes, remarks, _ = beginning(config)
    fresh = beginning(replace(config, start=StartConfig(), run=replace(config.run, folder=config.run.folder + "-fresh")))[2]
    place = join()
    shard = ClassShard.of_rank(10, place.rank, place.world_size)
    labels = torch.arange(shard.first, shard.first + shard.rows)
    wanted = torch.where((labels < 3)[:, None], expected_SD[10 + labels.clamp(max=2)], fresh)
    return torch.equal(prototypes, wanted), remarks


@pytest.mark.parametrize("size", [1, 3])
def test_prototypes_of_common_identities_are_taken_over_by_name(ranks, others, source, size, tmp_path):
    expected_SD = checkpoint.locate(source).whole("prototypes")
    config = replace(tuned(others, tmp_path / "tuned", source, start={"classifier": True}), loss=losses.build("uce", scale=16.0))
    for is_right, remarks in ranks(size).run(named_rows, config, expected_SD):
        assert is_right
        assert remarks[1:] == ["prototypes of 3 of 10 identities taken over", "what the loss learns and keeps starts anew: threshold"]


def test_an_older_checkpoint_gives_the_names_of_its_data_set(data, others, source, tmp_path):
    old = str(tmp_path / "old")
    shutil.copytree(checkpoint.locate(source).path, old)
    os.remove(os.path.join(old, "identities.json"))
    edit_manifest(old, lambda values: values["files"].pop("identities.json"))
    start = {"classifier": True}
    assert "prototypes of 3 of 10" in beginning(tuned(others, tmp_path / "tuned", old, start=start))[3][1]
    edit_manifest(old, lambda values: values["config"]["data"].update(train=others))  # as if it had been written anew
    refuses(tuned(others, tmp_path / "tuned", old, start=start), "does not name its identities, and the set .*others.tar, is gone or has")


def test_what_does_not_fit_is_refused_in_a_sentence(others, source, tmp_path):
    def of(folder="tuned", weights=source, **changes):
        return tuned(others, tmp_path / folder, weights, **changes)

    wide = of()
    refuses(
        replace(wide, backbone=replace(wide.backbone, width=8)),
        r"of width 16\) does not fit backbone small of width 8.*\(fc\.weight is .* and 3 more",
    )
    refuses(of(backbone="small_nobn"), r"does not fit backbone small_nobn .*24 are unknown to it \(.*\.running_mean, .* and 21 more\)")
    refuses(of(weights=tmp_path / "none"), "none does not exist: give a checkpoint, a run's folder or a weight file")
    refuses(of(weights=os.path.dirname(others)), "there is no complete checkpoint at")
    refuses(of(start={"ema": True}), r"holds no averaged weights: its run had run\.ema=0")
    torch.save(backbone_of(checkpoint.locate(source)), tmp_path / "weights.pt")
    refuses(of(weights=tmp_path / "weights.pt", start={"classifier": True}), r"start\.classifier takes more .*weights\.pt is a weight file")
    write_faces(str(tmp_path / "far.tar"), FacesConfig(identities=8, images_per_identity=6, size=32, first_identity=900), workers=1)
    config = tuned(str(tmp_path / "far.tar"), tmp_path / "tuned", source, start={"classifier": True})
    refuses(config, r"none of the 13 identities of .* \(such as .*\) is among the 8 of this run \(such as .*\): leave it out")
    torch.save({"input_layer.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "adaface.ckpt")  # blue first, if it is AdaFace's
    refuses(of(weights=tmp_path / "adaface.ckpt"), "run `protoshard import adaface` or `cvlface` with it, and give --from the folder")
    with pytest.raises(ValueError, match=r"start\.classifier needs the checkpoint that a new run begins with: give --from PATH"):
        StartConfig(classifier=True)


HALF = ("stem", "stages.0", "stages.1")


def states(config):
    """Runs on every rank: weights, batch statistics and optimizer state at the beginning and at the end; losses."""
    trainer = Trainer(config, join())
    found = []
    save = Trainer.save

    def keep():
        found.append({name: part.tensor.clone() for name, part in trainer.engine.state().items()})

    try:
        keep()
        with mock.patch.object(Trainer, "save", lambda *given: (keep(), save(*given))):
            trainer.fit()
    finally:
        trainer.close()
    with open(os.path.join(config.run.folder, "metrics.jsonl")) as file:
        return found[0], found[-1], [row["loss"] for row in map(json.loads, file) if "loss" in row]


@pytest.mark.parametrize(
    ("engine", "options", "size"),
    [("ddp", {}, 2), ("ddp", {}, 3), ("deepspeed", {}, 2), ("deepspeed", {"zero_stage": 2}, 3)],
)
def test_frozen_layers_stay_as_they_are_to_the_bit(ranks, others, source, engine, options, size, tmp_path):
    """Batch statistics too, through averages over ranks, evaluations and weight decay."""
    config = tuned(others, tmp_path, source, engine=engine, engine_options=options, optimizer={"frozen": HALF, "weight_decay": 0.1})
    config = replace(config, evaluation=replace(config.evaluation, data=others, every_epochs=0.5))
    expected = backbone_of(checkpoint.locate(source))
    first, last, _ = ranks(size).run(states, config)[0]
    frozen = [name for name in expected if name.startswith(HALF)]
    assert any("running_mean" in name for name in frozen) and any("num_batches" in name for name in frozen)
    for name, tensor in expected.items():
        same = torch.equal(last[f"backbone.{name}"], tensor)
        assert same == name.startswith(HALF), name
    assert not any(name.startswith(tuple(f"optimizer.{part}" for part in HALF)) for name in last)
    assert any(name.startswith("optimizer.stages.2") for name in last)
    assert first["backbone.stem.0.weight"].equal(last["backbone.stem.0.weight"])


def test_fine_tuning_does_not_depend_on_ranks_or_engine(ranks, data, others, tmp_path):
    source = str(tmp_path / "source")
    ranks(1).run(train_losses, configuration(data, source, STEPS))
    optimizer = {"frozen": HALF, "lr_factors": (("fc", 2.0),), "no_decay": ("*.bias",)}

    def losses_of(size, engine, **options):
        folder = tmp_path / f"{size}-{engine}-{len(options)}"
        options |= {"backbone": "small_nobn", "optimizer": dict(optimizer), "start": {"classifier": True}}
        return ranks(size).run(train_losses, tuned(others, folder, source, 12, engine, **options))[0]

    one = losses_of(1, "ddp")
    assert len(one) == 12
    for other in (losses_of(2, "ddp"), losses_of(2, "deepspeed"), losses_of(2, "deepspeed", engine_options={"zero_stage": 2})):
        print(f"largest relative deviation of 12 losses: {max(abs(a / b - 1) for a, b in zip(other, one, strict=True)):.1e}")
        np.testing.assert_allclose(other, one, rtol=1e-4)


@pytest.mark.parametrize("engines", [("ddp", "deepspeed"), ("deepspeed", "ddp")])
def test_groups_of_parameters_resume_in_another_engine(ranks, others, source, engines, tmp_path):
    """Names of optimizer state do not depend on the groups."""
    optimizer = {"name": "adamw", "frozen": ("stem",), "lr_factors": (("fc", 0.5), ("stages.2", 0.1)), "no_decay": ("*.bias",)}

    def config(engine, folder):
        return tuned(others, tmp_path / folder, source, 8, engine, optimizer=optimizer, save_every=4)

    whole = ranks(2).run(train_losses, config(engines[0], "whole"))[0]
    ranks(2).run(train_until, config(engines[0], "broken"), 5)
    np.testing.assert_allclose(ranks(2).run(train_losses, config(engines[1], "broken"))[0], whole, rtol=1e-4)


@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_a_frozen_backbone_trains_the_classifier_alone(ranks, others, source, engine, tmp_path):
    config = tuned(others, tmp_path, source, engine=engine, optimizer={"frozen": ("*",)}, save_every=3)
    config = replace(config, run=replace(config.run, margin_warmup=0.0))
    ranks(2).run(train_until, config, 4)
    first, last, found = ranks(2).run(states, config)[0]
    assert_same(first, last)
    assert_same(last, {f"backbone.{name}": tensor for name, tensor in backbone_of(checkpoint.locate(source)).items()})
    assert len(found) == STEPS and found[-1] < found[0]


def test_frozen_layers_may_not_change_within_a_run(others, source, tmp_path):
    shutil.copytree(source, tmp_path / "own")
    trained_on = checkpoint.locate(str(tmp_path / "own")).info["config"]["data"]["train"]
    config = configuration(trained_on, str(tmp_path / "own"), STEPS, backbone="small", optimizer={"frozen": ("stem",)})
    refuses(config, r"has frozen \[\], but this run has \['stem'\]")


@pytest.mark.parametrize(
    ("field", "value"), [("frozen", ("stem", "stage.0")), ("no_decay", ("*.offset",)), ("lr_factors", (("head", 2.0),))]
)
def test_a_name_that_matches_nothing_is_refused(data, field, value, tmp_path):
    config = configuration(data, str(tmp_path), STEPS, optimizer={field: value})
    refuses(config, rf"optimizer\.{field}: '.*' names no parameter of the backbone, whose parts are stem, stages, .*stem\.0\.weight")


def test_one_image_per_rank_suffices_where_the_batch_norm_is_frozen(data, tmp_path):
    run = {"batch": 1, "epochs": 0.01}
    refuses(configuration(data, str(tmp_path / "a"), 1, backbone="small", run=run), "takes batch statistics")
    assert beginning(configuration(data, str(tmp_path / "b"), 1, backbone="small", run=run, optimizer={"frozen": ("features",)}))[0] == 0
    assert BATCH > 1
