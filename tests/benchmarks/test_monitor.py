"""The benchmark of monitoring measures a real run and appends what it measured."""

from __future__ import annotations

import csv

import pytest

from benchmarks import monitor
from tests.pipeline.runs import faces

RECIPE = """
from pipeline.monitor import MonitorConfig
from tests.pipeline.runs import configuration
def recipe():
    return configuration({data!r}, {folder!r}, steps=2, run={{"log_every": 2}}, monitor=MonitorConfig())
"""


def test_a_row_says_what_a_line_takes_of_the_steps(tmp_path, capsys):
    path, out = tmp_path / "tiny.py", tmp_path / "new" / "monitor.csv"
    path.write_text(RECIPE.format(data=faces(str(tmp_path)), folder=str(tmp_path / "run")))
    monitor.main([str(path), "--rounds", "2", "--csv", str(out)])
    with out.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["classes"] == "13" and row["log_every"] == "2" and row["rounds"] == "2" and row["commit"] and row["hardware"]
    assert 0 < float(row["line_ms"]) < 2 * float(row["step_ms"]) and 0 < float(row["share"]) < 1 and float(row["bytes_per_line"]) > 500
    assert f"{'share':20}{row['share']}" in capsys.readouterr().out
    assert not (tmp_path / "run").exists(), "it trains in a folder of its own"


def test_no_rounds_end_in_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit):
        monitor.main(["faces_small", "--rounds", "0", "--csv", str(tmp_path / "a.csv")])
    assert "--rounds is 0, but at least 1 is needed" in capsys.readouterr().err
