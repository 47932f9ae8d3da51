"""A short run with a network that has batch statistics, and an export of it, shared by all tests of this folder."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from pipeline.evaluation.evaluator import EvaluationConfig
from pipeline.export.model_folder import export
from pipeline.train import train
from tests.pipeline.runs import configuration, faces


class Made(NamedTuple):
    data: str  # 13 identities x 6 images of 32 pixels
    run: str
    folder: str  # the export
    said: list[str]


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Made:
    root = tmp_path_factory.mktemp("export")
    data, run, folder = faces(str(root)), str(root / "run"), str(root / "model")
    evaluation = EvaluationConfig(data=data, batch_size=24)
    train(configuration(data, run, 3, backbone="small", evaluation=evaluation, run={"ema": 0.5}), "auto")
    said: list[str] = []
    export(run, folder, faces=True, program=True, prototypes=True, say=said.append)
    return Made(data, run, folder, said)
