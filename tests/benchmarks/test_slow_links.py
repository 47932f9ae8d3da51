"""Training over slow links, measured and planned."""

from __future__ import annotations

import json
import os
import subprocess
from functools import partial

import pytest

from benchmarks import slow_links
from dali_loaders.faces import FacesConfig, write_faces
from pipeline import cli
from pipeline.commands import positionals_first
from pipeline.resolve import resolve
from tests.launch.conftest import hosts, network  # noqa: F401, fixtures


def test_the_time_of_a_step_is_that_of_most_lines(tmp_path):
    speeds = [1.0, 2.0, 100.0, 50.0, 100.0]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "images_per_second": v}) + "\n" for n, v in enumerate(speeds)))
    assert slow_links.step_seconds(str(tmp_path), batch=50) == 0.5
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "images_per_second": 3}\n')
    with pytest.raises(ValueError, match="has 1 lines of metrics: train longer"):
        slow_links.step_seconds(str(tmp_path), batch=50)


def test_what_has_to_be_given(monkeypatch, tmp_path, capsys):
    """On this machine everything has a default; of hosts nobody else knows the links."""
    asked = []
    monkeypatch.setattr(slow_links, "measured", lambda *arguments, **link: asked.append((arguments, link)) or [])
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(slow_links.tempfile, "tempdir", None)
    slow_links.main(["faces_small", "--local", "2"])
    ((starts, recipe, _, folder), link), *_ = asked
    assert (len(starts), recipe, os.path.dirname(folder)) == (2, "faces_small", str(tmp_path))
    assert (link["between"], link["latency"], link["local"]) == (1e9, pytest.approx(5e-5), True)
    link = ("--between", "1", "--latency", "20ms", "--folder", "f")
    slow_links.main(["faces_small", "--on", "sh -c", "--on", "sh -c", *link, "--csv", str(tmp_path / "rows.csv")])
    starts = asked[-1][0][0]
    assert [start(["printf", "%s|", "two words", "$HOME"]).communicate()[0] for start in starts] == ["two words|$HOME|"] * 2
    for arguments, sentence in (
        (["--on", "ssh node1", "--latency", "20ms", "--folder", "f"], "--on needs --between: see --help"),
        (["--on", "ssh node1", "--between", "1", "--folder", "f"], "--on needs --latency: see --help"),
        (["--on", "ssh node1", "--between", "1", "--latency", "20ms"], "--on needs --folder: see --help"),
        ([], "say where: --local N"),
        (["--on", "ssh node1", "--local", "2"], "say where: --local N"),
    ):
        with pytest.raises(ValueError, match=sentence):
            slow_links.main(["faces_small", *arguments])


@pytest.mark.parametrize("settings", [[], ["run.batch=64", "data.threads=1"]])
def test_the_runs_get_all_settings(settings):
    """With none of one's own too."""
    seen = []

    def start(command):
        seen.extend(command)
        raise InterruptedError

    place = {"address": "127.0.0.1", "interface": "lo", "between": 1e9, "latency": 5e-5, "local": True}
    with pytest.raises(InterruptedError):
        list(slow_links.measured([start], "faces_small", settings, "runs", **place))
    options = cli._parser()[0].parse_args(positionals_first(seen[seen.index("train") :]))
    config = resolve(options.recipe, options.set)
    assert config.run.folder == "runs/alone-0" and config.run.batch == (64 if settings else 128)
    assert config.data.threads == (1 if settings else resolve("faces_small", []).data.threads)


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3])
def test_training_over_slow_links_completes(hosts, tmp_path, count):  # noqa: F811
    """20 ms and 100 Mbit/s between hosts: step and share of communication within a fifth of what plan says."""
    for host in hosts:
        host.limit("100mbit")
        host.delay(10)  # each way, so 20 ms from one host to another
    write_faces(str(tmp_path / "faces.tar"), FacesConfig(identities=60, images_per_identity=10, size=112), workers=1)
    batch, steps = 64 * count, 60
    settings = [f"data.train={tmp_path / 'faces.tar'}", "evaluation.data=", "engine.name=ddp", f"run.batch={batch}", "run.log_every=10"]
    settings += [f"run.epochs={steps * batch / 600}", "checkpoint.every_epochs=1000"]
    piped = {"cwd": os.getcwd(), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    starts = [partial(host.popen, **piped) for host in hosts[:count]]
    link = {"address": hosts[0].address, "interface": "eth0", "between": 12.5e6, "latency": 0.02}
    (row,) = slow_links.measured(starts, "faces_small", settings, str(tmp_path / "runs"), **link)
    print(slow_links.as_text(row))
    if path := os.environ.get("SCALING_CSV"):
        slow_links.append(path, row | {"settings": " ".join(settings[1:])})
    assert 0.8 < row["planned_over_measured"] < 1.25
    assert abs(row["planned_communication"] - row["communication"]) <= 0.2 * row["communication"]
