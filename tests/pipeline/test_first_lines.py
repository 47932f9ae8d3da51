"""What a command says before anything long begins, and what a run says in a log of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from pipeline.evaluation.evaluator import EvaluationConfig
from tests.pipeline.runs import configuration, faces

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "


@pytest.mark.parametrize(
    "command",
    [
        "train no_such_recipe --ranks 2",
        "eval no_such_run --data x.tar",
        "data faces x.tar",
        "data check x.tar",
        "data pack x.tar y.rec",
        "data pairs x.tar y.bin",
        "data preview x.tar faces_small",
    ],
)
def test_the_first_line_comes_before_anything_that_takes_seconds_is_imported(command):
    code = """
        import sys
        from pipeline import cli
        from pipeline import data_commands, evaluation_commands
        first = lambda what: sys.exit(print(what, "torch" in sys.modules))
        cli.announce = data_commands.announce = evaluation_commands.announce = first
        cli.main(sys.argv[1].split())
    """
    ended = subprocess.run([sys.executable, "-c", re.sub("^ +", "", code, flags=re.MULTILINE), command], capture_output=True, text=True)
    assert ended.stdout == "starting False\n", ended.stderr


@pytest.mark.slow
def test_a_run_of_two_ranks_says_what_it_is_at(tmp_path):
    """One line each, from rank 0 alone."""
    code = """
        import sys
        from pipeline.evaluation.evaluator import EvaluationConfig
        from pipeline.local_ranks import run_local
        from pipeline.train import train
        from tests.pipeline.runs import configuration
        if __name__ == "__main__":
            data, folder = sys.argv[1:]
            evaluation = EvaluationConfig(data=data, every_epochs=1)
            run_local(2, train, configuration(data, folder, steps=6, save_every=3, sample_rate=0.5, evaluation=evaluation))
    """
    data, folder = faces(str(tmp_path)), tmp_path / "my_run"
    (tmp_path / "run.py").write_text(re.sub("^ {8}", "", code, flags=re.MULTILINE))
    ended = subprocess.run([sys.executable, tmp_path / "run.py", data, str(folder)], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    for line in (
        "starting 2 ranks",
        rf"opening the data: {data}",
        rf"opening the evaluation sets: {data}",
        "building the network: small_nobn, and the prototypes of 13 identities",
        rf"looking for a checkpoint: {folder}/checkpoints",
        r"step 6/6  loss \d.*  epoch 1\.85  lr .*",
        rf"checkpoint saved: {folder}/checkpoints/step-00000003",
        rf"checkpoint saved: {folder}/checkpoints/step-00000006",
        "faces at step 6: eer .*",
    ):
        assert len(re.findall(f"^{TIME}{line}$", ended.stderr, re.MULTILINE)) == 1, (line, ended.stderr)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert len(trained) == 6 and all(0.1 < row["memory/host_gib"] < 100 for row in trained)
    looked = [row for row in rows if "prototypes/norm" in row]
    assert [row["step"] for row in looked] == [4, 6]
    assert all({"prototypes/nearest_cosine", "prototypes/never_sampled"} <= row.keys() for row in looked)


def test_the_configuration_can_be_saved_and_read_again(tmp_path):
    from dataclasses import replace

    from pipeline.config import as_dict, from_dict, options_of
    from pipeline.monitor import MonitorConfig

    config = replace(
        configuration("a.tar", str(tmp_path), 4, evaluation=EvaluationConfig()), monitor=MonitorConfig(("tensorboard", "wandb"), 10)
    )
    assert from_dict(json.loads(json.dumps(as_dict(config)))) == config
    assert from_dict({name: part for name, part in as_dict(config).items() if name != "monitor"}).monitor == MonitorConfig()
    options = options_of(config)
    assert options["run.batch"] == 24 and options["loss"] == "cosface" and options["loss.scale"] == 16 and options["monitor.images"] == 10
    assert "run.timeout" not in options and options["monitor.writers"] == "tensorboard, wandb"
