"""Time of a step on many nodes: the bytes are those that are really sent, and what is said moves the right way."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_fc import PartialFC, losses
from pipeline.cli import main
from pipeline.measuring import Traffic
from pipeline.plan import PRESETS, Job, Scale
from pipeline.plan.links import NEAR_CPU, Links
from pipeline.plan.step_time import classifier_cost, course, ddp_buckets, on_nodes, seconds_of

H100 = PRESETS["h100-80gb"]
CPU = replace(H100, is_gpu=False, network=1e9)
JOB = Job(1_000_000, batch=1024, ranks=8, backbone="iresnet50")
SCALE = Scale((1, 8, 64), between=50e9, latency=1e-5, step_seconds=0.1)


def sent_by_a_step(gather_dtype, batch):
    """Runs on every rank: bytes that the classifier sends, as a ring would."""
    classifier = PartialFC(96, 24, losses.build("cosface"), gather_dtype=gather_dtype)
    classifier.rows_before = batch  # so that the check of ranks is one of a run that goes on
    with Traffic() as traffic:
        features = torch.randn(batch, 24, requires_grad=True)
        classifier(features, torch.arange(batch)).backward()
    return traffic.sent


@pytest.mark.parametrize("gather_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_of_the_classifier_are_those_that_are_sent(ranks, size, gather_dtype):
    job = Job(96, width=24, batch=8 * size, ranks=size)
    links = Links(size, 1, 1e9, 1e9, 0.0, nccl=True)
    assert ranks(size).run(sent_by_a_step, gather_dtype, 8) == [round(classifier_cost(job, links, gather_dtype).sent)] * size


def test_collectives_over_two_levels_of_links():
    gloo = Links(nodes=2, ranks_per_node=2, inside=1e9, between=1e7, latency=0.02, nccl=False)
    assert gloo.all_gather(4e7).sent == 3e7
    assert gloo.all_gather(4e7).seconds == pytest.approx(3e7 / 1e7 + 2.5 * 0.02 + 1.5 * NEAR_CPU)
    assert gloo.all_reduce(4e7).seconds == pytest.approx(2 * gloo.all_gather(4e7).seconds - 0.02)
    assert gloo.reduce_scatter(4e7) == gloo.all_reduce(4e7)  # torch has no other over gloo
    assert replace(gloo, nccl=True).reduce_scatter(4e7).sent == 3e7
    # Windows of 14, 29, 58, 116 and 232 KB, of 0.04 s each; then 400 KB are on their way, as many as the link holds.
    assert gloo.slow_start(1e9) == pytest.approx(5 * 0.04 - 14480 * 31 / 1e7) and gloo.slow_start(1e4) == 0
    assert replace(gloo, nccl=True).slow_start(1e9) == replace(gloo, nodes=1).slow_start(1e9) == 0
    alone = Links(1, 1, 1e9, 1e9, 0.02, nccl=False)
    assert alone.all_gather(1e9).seconds == alone.all_reduce(1e9).seconds == alone.exchange().seconds == 0
    many = Links(256, 1, 1e9, 1e9, 0.02, nccl=False)
    assert many.exchange().seconds == pytest.approx(0.02 * 9) and many.all_reduce(8).seconds > 510 * 0.02


@settings(max_examples=30)
@given(st.integers(0, 9), st.sampled_from([H100, CPU]), st.sampled_from(["ddp", "deepspeed"]), st.integers(1, 3), st.booleans())
def test_more_nodes_never_take_less(power, hardware, engine, zero_stage, compress):
    job = replace(JOB, engine=engine, zero_stage=1 if engine == "ddp" else zero_stage)
    scale = replace(SCALE, compress=compress)
    few, many = (on_nodes(job, hardware, scale, nodes, 0.1) for nodes in (1 << power, 2 << power))
    assert few.step <= many.step and few.classifier <= many.classifier and many.batch == 2 * few.batch
    assert 0 <= many.shown <= many.backbone and 0.1 + many.communication == pytest.approx(many.step)
    faster = on_nodes(job, hardware, replace(scale, between=100e9), 2 << power, 0.1)
    assert faster.step <= many.step
    assert on_nodes(job, hardware, replace(scale, gather_dtype="bfloat16"), 2 << power, 0.1).classifier < many.classifier


def test_what_limits_is_named_with_its_batch_and_what_helps():
    made = course(JOB, H100, replace(SCALE, between=5e9, nodes=(1, 64)), classifier=0.0)
    assert made.limit is not None and made.limit.classifier > 0.25 * made.limit.step
    before = on_nodes(JOB, H100, made.scale, made.limit.nodes // 2, 0.1)
    assert before.classifier <= 0.25 * before.step
    assert made.efficiency(made.rows[0]) == 1 and made.efficiency(made.rows[1]) < 0.9
    assert any("gather_dtype=bfloat16" in change.settings and change.gain > 1.03 for change in made.changes)
    assert course(JOB, H100, replace(SCALE, between=1e15, latency=0.0, step_seconds=100.0), 0.0).limit is None


def test_the_table(capsys):
    arguments = ["plan", "--identities", "1e6", "--ranks", "8", "--backbone", "iresnet50", "--hardware", "h100-80gb", "--engine", "ddp"]
    many = ["--nodes", "1,8,64,256", "--between", "50", "--latency", "10us"]
    assert main([*arguments, *many]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["1"], ["8"], ["64"], ["256"])]
    assert [row[1] for row in rows] == ["8", "64", "512", "2048"] and rows[0][2] == "1,024"
    assert "all-gather of B D features" in out and "Computing is the least that the peaks allow" in out
    assert "classifier.gather_dtype=bfloat16" in out
    assert main([*arguments, *many, "--step-ms", "80", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["course"]
    assert [row["nodes"] for row in made["rows"]] == [1, 8, 64, 256] and made["computing_is_measured"]
    assert made["rows"][0]["computing"] == 0.08 and made["rows"][0]["efficiency"] == 1


def test_buckets_of_ddp():
    assert ddp_buckets(1000) == [1000] and ddp_buckets(30 << 20) == [1 << 20, 25 << 20, 4 << 20]


@pytest.mark.parametrize(("text", "seconds"), [("20ms", 0.02), ("10us", 1e-5), ("1.5 µs", 1.5e-6), ("2s", 2.0)])
def test_times_have_units(text, seconds):
    assert seconds_of(text) == pytest.approx(seconds)
