"""A run's folder is not one of data, of other things or of another run; a folder that somebody made for it is."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.distributed as dist

from dali_loaders.config import DataConfig
from pipeline import run_folder
from pipeline.backbones import BackboneConfig
from pipeline.cli import main
from pipeline.config import RunConfig, TrainConfig
from pipeline.distributed import Place, join
from pipeline.evaluation.evaluator import EvaluationConfig
from pipeline.resolve import resolve
from tests.pipeline.runs import configuration, faces, train_until

PLACE = Place(0, 1, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    join("cpu")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    dist.destroy_process_group()


def check(run="run", data="", resume="auto", **sections):
    config = TrainConfig(run=RunConfig(folder=str(run)), data=DataConfig(train=data), **sections)
    run_folder.check(config, PLACE, resume)
    return config


@pytest.mark.parametrize("run", ["set", "set/runs/a", "link/runs/a", "link"])
@pytest.mark.parametrize("data", ["set", "other,set", "link", "se*", "{other,set}"])
def test_a_folder_within_the_data(folder, run, data):
    for name in ("set/a", "other/a"):
        os.makedirs(name)
    os.symlink("set", "link")
    words = rf"run\.folder={run} lies in the data .*, which the files of the run would change"
    with pytest.raises(ValueError, match=words):
        check(run, data)
    with pytest.raises(ValueError, match=words):
        check(run, evaluation=EvaluationConfig(data=data))
    check("elsewhere", data)


@pytest.mark.parametrize("data", ["set.tar", "sets/*.tar", "set-{0..2}.tar", "s3://bucket/run"])
def test_a_folder_beside_the_data(folder, data):
    os.makedirs("sets/runs/a")
    check("sets/runs/a", data)
    check("run", data)


def test_the_data_are_not_renamed_with_the_run(folder):
    data = faces(str(folder))
    config = configuration(data, str(folder), steps=1)
    (folder / "run.json").touch()  # otherwise the folder is none of a run
    with pytest.raises(ValueError, match=r"--resume none would rename .*, where .*faces\.tar lies"):
        train_until(config, 0, resume="none")
    assert os.path.exists(data)


@pytest.mark.parametrize("names", [["photos/a.jpg"], ["train.rec"], [".git/HEAD", "src/main.py"], ["checkpoints/step-100/model.pt"]])
def test_a_folder_of_other_things(folder, names):
    for name in names:
        (folder / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "run" / name).write_bytes(b"\xff\xd8\0")
    first = names[-1].partition("/")[0]
    with pytest.raises(ValueError, match=rf"run\.folder=run holds no run, but other things \({first}\).* touch run/run\.json"):
        check()
    (folder / "run" / "run.json").touch()
    check()


@pytest.mark.parametrize(
    "name",
    [
        *("train.log", "slurm-17.out", "notes", "logs/rank0.log", "lost+found/", ".hydra/config.yaml", "checkpoints/", "empty/"),
        *("metrics.jsonl", "lease-3.json", "checkpoints/lease-3.json", "checkpoints/step-00000000/protoshard.json"),
    ],
)
def test_a_folder_that_is_made_for_the_run_or_has_one(folder, name):
    path = folder / "run" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if name.endswith("/") else path.write_text("text\n")
    check()


def test_a_run_without_a_checkpoint_of_which_another_recipe_would_drop_the_metrics(folder):
    os.mkdir("run")
    config = check(data="a.tar")
    run_folder.mark(config, PLACE)
    check(data="b.tar")  # it has not done a step
    (folder / "run" / "metrics.jsonl").write_text('{"step": 0}\n{"step": 20, "loss": 3.0}\n')
    check(data="a.tar")
    with pytest.raises(ValueError, match=r"run\.folder=run belongs to another run.*\(data\.train=a\.tar, here b\.tar\): .*--resume none"):
        check(data="b.tar")
    with pytest.raises(ValueError, match=r"\(backbone\.width=512, here 384\)"):
        check(data="a.tar", backbone=BackboneConfig(width=384))
    check(data="b.tar", resume="none")
    os.makedirs("run/checkpoints/step-00000020")
    (folder / "run/checkpoints/step-00000020/protoshard.json").touch()
    check(data="b.tar")  # what may go on is decided by the checkpoint
    assert json.loads((folder / "run" / "run.json").read_text())["data.train"] == "a.tar"


def test_what_a_run_writes_cannot_be_written_by_everybody(folder):
    data = faces(str(folder))
    config = configuration(data, str(folder / "run"), steps=1)
    before = os.umask(0)
    try:
        train_until(config, 9)
    finally:
        os.umask(before)
    paths = [os.path.join(where, name) for where, names, files in os.walk(folder / "run") for name in [*names, *files]]
    assert len(paths) > 5
    assert [path for path in [str(folder / "run"), *paths] if os.stat(path).st_mode & 0o002] == []


def test_a_bad_folder_ends_the_command_in_a_sentence(folder, capsys):
    data = faces(str(folder))
    assert main(["train", "faces_small", "--set", f"data.train={data}", f"run.folder={folder}"]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith(f"protoshard: run.folder={folder} holds no run, but other things (faces.tar)")
    )


def test_the_same_command_begins_where_a_start_failed_and_no_secret_is_left(folder):
    (folder / "run" / "ranks").mkdir(parents=True)
    (folder / "run" / "ranks" / "rank-00001").touch()
    config = resolve("faces_small", [f"run.folder={folder}/run", "data.train=s3://me:SECRET@b/a.tar?sig=SECRET"])
    run_folder.check(config, PLACE, "auto")
    run_folder.mark(config, PLACE)
    assert "SECRET" not in (folder / "run" / "run.json").read_text()
