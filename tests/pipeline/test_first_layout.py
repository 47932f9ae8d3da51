"""A checkpoint of the first version loads, and its run goes on with the same losses."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest

from partial_fc import losses
from pipeline import checkpoint
from pipeline.config import as_dict, from_dict
from pipeline.monitor import MonitorConfig
from tests.pipeline import first_layout
from tests.pipeline.runs import configuration, faces, train_losses, train_until

STEPS, SAVED = 12, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return faces(str(tmp_path_factory.mktemp("faces")))


@pytest.mark.parametrize("loss", first_layout.LOSSES)
def test_a_run_goes_on_from_a_checkpoint_of_the_first_version(ranks, data, loss, tmp_path):
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in first_layout.LOSSES[loss].items()}

    def config(folder):
        made = configuration(data, str(tmp_path / folder), STEPS, save_every=SAVED, monitor=MonitorConfig())
        return replace(made, loss=losses.build(**fields), classifier=replace(made.classifier, non_finite="raise"))  # as by default then

    whole = ranks(1).run(train_losses, config("whole"))[0]
    ranks(1).run(train_until, config("now"), SAVED + 1)
    found = str(tmp_path / "now" / "checkpoints" / f"step-{SAVED:08}")
    saved = checkpoint.open_checkpoint(found)
    tensors, info = {name: saved.whole(name) for name in saved}, saved.info
    assert set(tensors) == first_layout.names(loss, set(tensors))

    path = str(tmp_path / "old" / "checkpoints" / f"step-{SAVED:08}")
    first_layout.write(path, SAVED, loss, tensors, info["identities"], data, str(tmp_path / "old"))
    saved = from_dict(checkpoint.open_checkpoint(path).info["config"])
    assert as_dict(saved) == as_dict(config("old"))
    for size in (1, 3):
        np.testing.assert_allclose(ranks(size).run(train_losses, config("old"), path)[0], whole[SAVED:], rtol=1e-4)
        for name in sorted(os.listdir(tmp_path / "old" / "checkpoints")):  # the second number of ranks begins where the first did
            if name != os.path.basename(path):
                os.rename(tmp_path / "old" / "checkpoints" / name, tmp_path / f"{size}-{name}")
        os.rename(tmp_path / "old" / "metrics.jsonl", tmp_path / f"metrics-{size}")
