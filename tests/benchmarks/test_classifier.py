"""`protoshard bench classifier` at sizes that take no time: what it prints, keeps and refuses."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from benchmarks import commands
from benchmarks.classifier import Setting, measure
from pipeline import plan
from pipeline.cli import main
from pipeline.engine import config

TINY = ["--classes", "300", "--batch", "8", "--width", "256", "--threads", "1", "--pairs", "2"]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return tmp_path_factory.mktemp("bench") / "rows.csv"


def bench(capsys, table, *more):
    assert main(["bench", "classifier", *TINY, "--csv", str(table), *more]) == 0
    return capsys.readouterr().out


def test_help_has_one_example(capsys):
    for command in ("bench classifier", "bench accuracy", "plan"):
        with pytest.raises(SystemExit) as stop:
            main([*command.split(), "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0 and text.count("example:") == 1 and f"protoshard {command}" in text


def test_one_object_with_a_row_per_allocator_and_the_same_rows_in_the_file(capsys, table):
    report = json.loads(bench(capsys, table, "--json"))
    assert {"date", "commit", "hardware", "torch", "command", "rows"} == set(report)
    assert [row["allocator"] for row in report["rows"]] == ["default", "keeping"]
    for row in report["rows"]:
        assert row["eager_loss"] == pytest.approx(row["ours_loss"], rel=1e-5)
        assert row["eager_over_ours"] > 0 and 0 < row["matrix_share"] < 1 and row["matrix_gflops"] > 0
        assert row["eager_sent_bytes"] == row["ours_sent_bytes"] == 0 and not row["step"]
        for name in ("eager_s", "ours_s", "eager_over_ours", "matrix_share"):
            low, high = row[f"{name}_quartiles"]
            assert low <= row[name] <= high
    with open(table, newline="") as file:
        kept = list(csv.DictReader(file))
    assert [row["ours_s"] for row in kept] == [str(row["ours_s"]) for row in report["rows"]]
    assert all(row["commit"] and row["hardware"] and row["command"] for row in kept)


def test_text_without_eager_has_the_same_columns(capsys, table):
    text = bench(capsys, table, "--skip-eager", "--allocator", "default")  # the file would be refused if columns differed
    assert "300 classes x 256, batch 8, rate 1" in text and "process at its peak" in text and "eager" not in text


def test_two_ranks_sample_update_and_send_what_the_plan_says():
    row = measure(Setting(classes=301, batch=8, width=16, rate=0.2, ranks=2, pairs=1, step=True))
    assert row["one_rank_deviation"] < 1e-6
    assert row["ours_calls"] == "3 allgather, 1 allreduce, 1 reducescatter"
    assert row["eager_calls"] == "2 allgather, 3 allreduce, 2 reduce"
    job, hardware = plan.Job(301, width=16, batch=8, ranks=2), plan.PRESETS["h200"]
    assert row["ours_sent_bytes"] == pytest.approx(plan.seconds(job, hardware)["network"] * hardware.network)
    # 151 rows of 16 weights with momentum
    assert row["ours_state_mib"] == row["eager_state_mib"] == round(2 * 151 * 16 * 4 / 2**20, 1)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"classes": 0}, "--classes is 0"),
        ({"rate": 1.5}, "--rate is 1.5"),
        ({"batch": 9, "ranks": 2}, "give a multiple of 2"),
        ({"in_backward": True}, "leave out --no-step"),
    ],
)
def test_bad_settings_end_in_a_sentence(setting, words):
    with pytest.raises(ValueError, match=words):
        Setting(**setting)


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    from benchmarks.record import append

    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns than this benchmark: rename it"):
        append(str(path), {"c": 1})
    assert path.read_text() == "a,b\n1,2\n"
    with pytest.raises(ValueError, match="cannot be written"):
        append(str(path / "below" / "rows.csv"), {"c": 1})


@pytest.mark.parametrize(("dtype", "has_units", "said"), [("bfloat16", False, True), ("bfloat16", True, False), ("float32", False, False)])
def test_bfloat16_that_a_processor_emulates_is_said(monkeypatch, capsys, dtype, has_units, said):
    monkeypatch.setattr(config, "has_bfloat16", lambda device: has_units)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    commands._say_if_emulated([dtype])
    assert ("emulates bfloat16" in capsys.readouterr().err) is said
