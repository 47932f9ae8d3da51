"""Checkpoints of format 1, as its last version wrote them on several ranks: a run goes on from them, and `copy` converts them."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from unittest import mock

import numpy as np
import pytest
import torch

from pipeline import checkpoint, run_checkpoints
from pipeline.checkpoint import comparing, looking
from pipeline.cli import main
from tests.pipeline import first_format
from tests.pipeline.checkpoint import states
from tests.pipeline.runs import BATCH, IMAGES, configuration, faces, train_losses, train_until

STEPS, SAVED = 10, 5
KINDS = {
    "sgd": {},
    "bfloat16, lazy, with an average": {"classifier": {"sample_rate": 0.5, "storage_dtype": "bfloat16"}, "unsampled": "lazy", "ema": 0.9},
    "adamw": {"name": "adamw"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces(str(tmp_path_factory.mktemp("faces")))


def config_of(data, folder, kind):
    options = dict(KINDS[kind])
    classifier, ema = options.pop("classifier", {}), options.pop("ema", 0.0)
    config = configuration(data, folder, STEPS, save_every=SAVED, run={"ema": ema}, optimizer=options)
    return replace(config, classifier=replace(config.classifier, **classifier))


def train_in_format_1(config):
    with mock.patch.object(run_checkpoints, "save", first_format.save):
        train_until(config, SAVED + 1)


@pytest.mark.parametrize(("kind", "before"), [("sgd", 1), ("bfloat16, lazy, with an average", 2), ("adamw", 2)])
def test_a_run_goes_on_from_it_and_from_its_copy(ranks, data, tmp_path, kind, before):
    whole = ranks(1).run(train_losses, config_of(data, str(tmp_path / "whole"), kind))[0]
    ranks(before).run(train_in_format_1, config_of(data, str(tmp_path / "old"), kind))
    old = tmp_path / "old" / "checkpoints" / f"step-{SAVED:08}"
    assert (old / ".metadata").exists() and len(list(old.glob("*.distcp"))) == before
    kept = {name: (old / name).read_bytes() for name in os.listdir(old)}

    assert main(["checkpoint", "copy", str(old), str(tmp_path / "new" / "checkpoints")]) == 0
    assert kept == {name: (old / name).read_bytes() for name in os.listdir(old)}
    new = checkpoint.open_checkpoint(str(tmp_path / "new" / "checkpoints" / old.name))
    assert looking.format_of(new) == 2 and looking.fault_of(new) is None
    assert main(["checkpoint", "diff", str(old), new.path]) == 0
    assert any(name.startswith("ema.") for name in new) == (KINDS[kind].get("ema", 0) > 0)
    assert new.dtype("prototypes") == (torch.bfloat16 if "bfloat16" in kind else torch.float32)

    tolerance = 2e-2 if "bfloat16" in kind else 1e-4  # several ranks sum in another order, which storage in bfloat16 rounds
    for folder, path in (("goes-on", str(old)), ("goes-on-from-the-copy", new.path)):
        for size in (1, 2):
            config = config_of(data, str(tmp_path / f"{folder}-{size}"), kind)
            np.testing.assert_allclose(ranks(size).run(train_losses, config, path)[0], whole[SAVED:], rtol=tolerance)
            info = looking.one(config.run.folder).info
            assert info["format"] == 2 and info["epoch"] == pytest.approx(STEPS * BATCH / IMAGES) and info["host"] == platform.node()
            assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(info["when"]) < timedelta(minutes=10)


def save_first(folder):
    parts = states.state()
    parts["optimizer.weight.exp_avg"] = checkpoint.whole(torch.arange(7.0))
    info = {"consumed": 1, "num_classes": states.ROWS, "world_size": states.place()[1], "config": {}}
    return first_format.write(folder, 1, parts, info, [f"name {n}" for n in range(states.ROWS)])


@pytest.mark.parametrize("before", [2, 3])
def test_written_on_any_number_of_ranks_it_is_read_and_converted(ranks, tmp_path, before):
    old = ranks(before).run(save_first, str(tmp_path / "old"))[0]
    assert all(ranks(2).run(states.load, old))
    assert main(["checkpoint", "copy", old, str(tmp_path)]) == 0
    assert all(ranks(1).run(states.load, str(tmp_path / "step-00000001")))
    first, second = looking.one(old), looking.one(str(tmp_path))
    assert comparing.said(first, second) == ({}, {}) and not comparing.contents(first, second) and not comparing.kinds(first, second)


def test_what_is_damaged_is_not_converted(tmp_path, capsys):
    old = save_first(str(tmp_path / "old"))
    file = next((tmp_path / "old" / "step-00000001").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert main(["checkpoint", "copy", old, str(tmp_path / "new")]) == 2
    assert f"a damaged checkpoint is not copied: the contents of {file.name} have changed" in capsys.readouterr().err
    assert main(["checkpoint", "verify", old]) == 1 and not (tmp_path / "new").exists()


def test_it_is_listed_and_shown(tmp_path, capsys):
    old = save_first(str(tmp_path))
    assert main(["checkpoint", "list", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (row["format"], row["ranks"], row["state"], row["fault"]) == (1, 1, "complete", None)
    assert main(["checkpoint", "show", old, "--tensors", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["tensors"]["prototypes"] == {"dtype": "float32", "shape": [10, 3], "files": ["__0_0.distcp"]}
    assert shown["bytes"] == sum(shown["files"].values())
