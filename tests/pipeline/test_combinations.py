"""Options that exclude each other end in a sentence that names both, before anything is built."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipeline import combinations
from pipeline.config import RunConfig, TrainConfig
from pipeline.distributed import Place
from pipeline.engine import EngineConfig, build_engine
from pipeline.schedule import OptimizerConfig
from tests.pipeline.runs import configuration


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"optimizer": {"in_backward": True}, "run": {"accumulation": 2}}, r"in_backward .* run\.accumulation = 2 takes several"),
        (
            {"optimizer": {"in_backward": True}, "engine_options": {"precision": "float16"}},
            r"in_backward .*=float16 judges",
        ),
        ({"optimizer": {"in_backward": True}, "run": {"spike": 3.0}}, r"in_backward .* run\.spike judges the loss after it"),
        (
            {"engine": "deepspeed", "engine_options": {"zero_stage": 3}, "run": {"ema": 0.9}},
            r"run\.ema averages .*zero_stage=3",
        ),
        ({"optimizer": {"unsampled": "lazy"}, "run": {"deterministic": True}}, r"run\.deterministic excludes optimizer\.unsampled=lazy"),
    ],
)
def test_of_different_sections(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        combinations.check(configuration("", "", 1, **options))


def test_all_others_go_together():
    combinations.check(TrainConfig())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: EngineConfig("deepspeed", zero_stage=4), r"engine\.zero_stage is 4, but must be 1, 2 or 3"),
        (lambda: EngineConfig("deepspeed", zero_stage=3, compile=True), r"engine\.compile needs whole weights, which engine\.zero_stage=3"),
        (lambda: EngineConfig("deepspeed", precision="float16", compress=True), r"engine\.compress is for bfloat16"),
        (lambda: EngineConfig(precision="float8"), r"engine\.precision is 'float8', but must be auto, float32, bfloat16 or float16"),
        (lambda: RunConfig(spike=0.5), r"run\.spike is 0\.5, but must be above 1"),
        (lambda: RunConfig(most_skipped=0), r"run\.most_skipped is 0, but must be at least 1"),
        (lambda: OptimizerConfig(lr=math.nan), r"optimizer\.lr is nan, but must be finite and not negative"),
        (lambda: OptimizerConfig(warmup_epochs=math.inf), r"optimizer\.warmup_epochs is inf, but must be finite"),
        (lambda: OptimizerConfig(power=-1.0), r"optimizer\.power is -1\.0, but must be finite and not negative"),
        (lambda: OptimizerConfig(schedule="steps", step_epochs=(math.nan,)), r"optimizer\.step_epochs is \(nan,\), but must hold epochs"),
    ],
)
def test_of_one_section(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("engine", "optimizer", "sentence"),
    [
        (EngineConfig("ddp", zero_stage=2), OptimizerConfig(), r"engine\.zero_stage=2 is of DeepSpeed, but engine\.name is ddp"),
        (EngineConfig("deepspeed"), OptimizerConfig(clip_jointly=True), r"clip_jointly needs engine\.name=ddp"),
    ],
)
def test_of_an_engine(engine, optimizer, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_engine(engine, optimizer, nn.Linear(2, 2), Place(0, 1, torch.device("cpu")), 1)
