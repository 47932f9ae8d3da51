"""The command line: what it prints, and that bad input ends in one sentence with exit code 2."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from dali_loaders.faces import FacesConfig, write_faces
from pipeline import checkpoint
from pipeline.backbones import BackboneConfig, build
from pipeline.cli import main
from pipeline.local_ranks import run_local
from tests.pipeline.checkpoint.states import edit_manifest

COMMANDS = ["train", "eval", "data faces", "data pack", "data pairs", "data check", "config", "import insightface"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_one_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.count("example:") == 1 and f"protoshard {command}" in text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with faces.tar (9 identities), and run, trained for one epoch on one rank."""
    folder = tmp_path_factory.mktemp("cli")
    assert main(["data", "faces", str(folder / "faces.tar"), "--identities", "9", "--images", "6", "--size", "32"]) == 0
    assert main(train(folder)) == 0
    return folder


def train(folder, *more, data="faces.tar", run="run"):
    settings = [
        f"data.train={folder / data}",
        f"evaluation.data={folder / 'faces.tar'}",
        f"run.folder={folder / run}",
        "data.image_size=32",
        "run.batch=18",
        "run.epochs=1",
        "run.log_every=1",
        "backbone.width=16",
        "engine.name=ddp",
        "checkpoint.keep=9",
        *(["monitor.writers="] if run != "run" else []),  # pictures take half the time of such a run
        *[item for item in more if not item.startswith("--")],
    ]
    flags = [part for item in more if item.startswith("--") for part in item.split("=", 1)]
    return ["train", "faces_small", *flags, *[part for setting in settings for part in ("--set", setting)]]


def refused(arguments, capsys, *words):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("protoshard: ") or "\nprotoshard: " in error
    assert "Traceback" not in error
    for word in words:
        assert word in error


def test_train_ends_with_a_summary_and_leaves_its_files(trained, capsys):
    assert main(train(trained)) == 0  # nothing left to train
    out, error = capsys.readouterr()
    assert "this run is complete: nothing is left to train, and its figures are those it had" in error
    for word in ("EER", "TAR@FAR=1e-2", "checkpoint", "tensorboard --logdir"):
        assert word in out
    names = os.listdir(trained / "run")
    assert {"metrics.jsonl", "tensorboard", "checkpoints"} <= set(names) and any(name.startswith("roc-") for name in names)


def test_one_rank_with_the_default_engine(trained, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert main(train(trained, "engine.name=deepspeed", run="alone")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL, signal.SIGINT])
def test_ending_the_command_ends_its_ranks(trained, number, capsys):
    settings = ["run.epochs=1000", "evaluation.at_start=false"]
    job = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *train(trained, "--ranks=2", *settings, run=f"ended{number}")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # In the background of a shell SIGINT is ignored; at a terminal it is not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN),
    )
    try:
        deadline = time.monotonic() + 60
        while (
            not (trained / f"ended{number}" / "metrics.jsonl").exists() or not (trained / f"ended{number}" / "metrics.jsonl").stat().st_size
        ):
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        ranks = psutil.Process(job.pid).children(recursive=True)
        assert len(ranks) >= 2
        second = train(trained, "--ranks=1", *settings, run=f"ended{number}")
        assert main(second) == 2 and "another run is writing to" in capsys.readouterr().err
    finally:
        job.send_signal(number)
        job.wait(30)
    _, alive = psutil.wait_procs(ranks, timeout=20)
    for process in alive:
        process.kill()
    assert not alive


@pytest.mark.slow
def test_torchrun(trained, tmp_path):
    """Its ranks end although something aborts at the end of their interpreters, as threads of gloo may do."""
    (tmp_path / "sitecustomize.py").write_text("import atexit, os\nif 'RANK' in os.environ:\n    atexit.register(os.abort)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pipeline.cli"]
    command += train(trained, run="torchrun")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ROC figure") == 1


def test_eval_prints_one_json_object(trained, capsys, tmp_path):
    figure = str(tmp_path / "roc.png")
    assert main(["eval", str(trained / "run"), "--data", str(trained / "faces.tar"), "--json", "--figure", figure]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"eer", "tar_at_far", "rank1", "images", "identities"} <= set(report)
    assert report["images"] == 54 and report["identities"] == 9 and os.path.getsize(figure) > 1000


def test_what_eval_prints_goes_into_a_report_of_the_run(trained, capsys, tmp_path):
    pairs = str(tmp_path / "others.bin")
    assert main(["data", "pairs", str(trained / "faces.tar"), pairs, "--folds", "2", "--pairs", "6"]) == 0
    capsys.readouterr()
    assert main(["eval", str(trained / "run"), "--data", pairs, "--json"]) == 0
    (tmp_path / "others.json").write_text(capsys.readouterr().out)
    page = tmp_path / "page.html"
    assert main(["report", str(trained / "run"), "--add", str(tmp_path / "others.json"), "--out", str(page)]) == 0
    text = page.read_text()
    assert "Evaluation: faces" in text and "Evaluation: others" in text and "One threshold for all sets" in text
    assert "genuine pairs that look most different" in text.lower() and "data:image/jpeg" in text and "What is not here" not in text


def test_the_roc_curve_of_a_pair_set(trained, capsys, tmp_path):
    pairs, figure = str(trained / "pairs.bin"), tmp_path / "new" / "roc.png"
    assert main(["data", "pairs", str(trained / "faces.tar"), pairs, "--folds", "2", "--pairs", "6"]) == 0
    assert main(["eval", str(trained / "run"), "--data", pairs, "--figure", str(figure)]) == 0
    assert "accuracy" in capsys.readouterr().out and figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10_000


def test_more_ranks_than_cores_are_spoken_of(monkeypatch, caplog):
    monkeypatch.setattr("pipeline.local_ranks.cores", lambda: 1)
    run_local(2, time.sleep, 0)
    assert caplog.messages == ["--ranks 2, but this command may use 1 core: ranks take turns on them"]


def test_eval_prints_intervals_and_writes_a_cleaning_report(trained, capsys, tmp_path):
    command = ["eval", str(trained / "run"), "--data", str(trained / "faces.tar"), "--cleaning", str(tmp_path / "doubts.csv")]
    assert main([*command, "--resamples", "20"]) == 0
    printed = capsys.readouterr().out
    assert "tar_at_far=1e-6             unreached: too few impostor pairs" in printed and "threshold_at_far=1e-2" in printed
    assert (tmp_path / "doubts.csv").read_text().startswith("what,image,identity") and (tmp_path / "doubts.subset.txt").exists()
    assert main([*command[:-1], str(tmp_path / "doubts.txt")]) == 2 and "name of a .csv" in capsys.readouterr().err


def test_pack_check_and_train_on_the_packed_set(trained, capsys):
    assert main(["data", "pack", str(trained / "faces.tar"), str(trained / "faces.rec")]) == 0
    assert main(["data", "check", str(trained / "faces.rec")]) == 0
    assert "54 images of 9 identities" in capsys.readouterr().out
    assert main(train(trained, data="faces.rec", run="packed")) == 0
    losses = [
        [row["loss"] for row in map(json.loads, (trained / run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
        for run in ("run", "packed")
    ]
    assert losses[0] == pytest.approx(losses[1])


def test_identities_that_a_network_finds_near_each_other(trained, capsys):
    check = ["data", "check", str(trained / "faces.tar"), "--model", str(trained / "run")]
    assert main([*check, "--near", "0", "--json"]) == 0
    near = json.loads(capsys.readouterr().out)["near"]
    assert near and near == sorted(near, key=lambda pair: -pair["cosine"]) and all(0 < pair["cosine"] <= 1 for pair in near)
    assert {name for pair in near for name in (pair["first"], pair["second"])} <= {f"{identity:06}" for identity in range(9)}
    assert main([*check, "--near", "0.999999"]) == 0
    assert "identities with a cosine above 0.999999: " in capsys.readouterr().out


def test_names_in_other_encodings(trained):
    """Of identities, and of the set itself: its checkpoint, metrics and TensorBoard hold UTF-8 only."""
    data = trained / os.fsdecode(b"\xd5\xc5")
    write_faces(str(data), FacesConfig(identities=9, images_per_identity=6, size=32), workers=1)
    for number, identity in enumerate(sorted(data.iterdir())[:3]):
        identity.rename(data / os.fsdecode(b"\xc0\xee%d" % number))
    assert main(train(trained, f"evaluation.data={data}", data=data.name, run="encodings")) == 0
    names = checkpoint.locate(str(trained / "encodings")).identities()
    assert os.fsdecode(b"\xc0\xee0") in names


def test_a_new_run_from_another_ones_weights(trained, capsys):
    assert main(["data", "faces", str(trained / "more.tar"), "--identities", "8", "--images", "6", "--size", "32"]) == 0
    new = train(trained, f"--from={trained / 'run'}", data="more.tar", run="tuned")
    assert main(new) == 0 and "a new run with the backbone weights of" in capsys.readouterr().err
    assert main(new) == 0 and "resumed from" in capsys.readouterr().err
    refused(train(trained, f"--from={trained / 'run'}", run="run"), capsys, "did not begin with another one's weights", "run.folder=PATH")
    refused(train(trained, data="more.tar"), capsys, "has num_classes 9, but this run has 8", "--from")
    refused(train(trained, f"--from={trained / 'none'}", run="other"), capsys, "none does not exist")


def test_resume_none_keeps_the_earlier_run(trained, capsys):
    assert main(train(trained, run="again")) == 0
    assert main(train(trained, "--resume=none", run="again/")) == 0
    assert os.path.isdir(trained / "again.1") and "kept the earlier run" in capsys.readouterr().err


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(trained, capsys, caplog):
    assert main(train(trained, "checkpoint.every_steps=1", run="damaged")) == 0
    folder = trained / "damaged" / "checkpoints"
    newest, before = sorted(os.listdir(folder))[:-3:-1]
    os.remove(folder / newest / "rank-00000.safetensors")
    assert main(train(trained, run="damaged")) == 0
    assert f"{newest} cannot be used (rank-00000.safetensors is missing)" in caplog.text
    assert before in capsys.readouterr().err  # "resumed from"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["backbone.width=8"], ["has width 16, but this run has 8"]),
        (["data.train={folder}/others.tar"], ["has num_classes 9, but this run has 4"]),
        (["backbone.name=small_nobn"], ["has backbone small, but this run has small_nobn"]),
        (["backbone.name=iresnet51"], ["no backbone named 'iresnet51': did you mean 'iresnet50'"]),
        (["loss=uze"], ["loss 'uze' is unknown: did you mean 'uce'"]),
        (["run.batch=9"], ["has batch 18, but this run has 9"]),
        (["data.images_per_identity=3"], ["has images_per_identity 1, but this run has 3"]),
        (["data.images_per_identity=4"], ["run.batch is 18", "and data.images_per_identity = 4 do not divide: use a multiple of 4"]),
        (
            ["data.images_per_identity=2", "data.train={folder}/lonely"],
            ["identity 'b' has 1 image(s), but data.images_per_identity = 2", "(1 such identities)", "--set data.images_per_identity=1"],
        ),
        (["run.folder={folder}/faces.tar"], ["run.folder is a folder, but", "faces.tar is the name of a file"]),
        (["run.folder={folder}/new", "data.train={folder}/cut.tar"], ["cut.tar is cut off"]),
        (["run.folder={folder}/new", "data.train={folder}/faces.tgz"], ["compressed with gzip"]),
        (["run.folder={folder}/new", "run.epochs=1e300"], ["run.epochs is 1e+300"]),
        (["optimizer.name=adamw"], ["has optimizer sgd, but this run has adamw"]),
        (["data.image_size=48"], ["has image_size 32, but this run has 48"]),
        (["--resume={folder}/nowhere"], ["nowhere does not exist"]),
        (["run.folder={folder}/new", "data.train={folder}/missing"], ["missing", "not exist"]),
        (["run.folder={folder}/new", "data.train={folder}/empty"], ["empty"]),
        (["run.folder={folder}/new", "data.train="], ["data.train is empty"]),
        (["run.folder={folder}/new", "data.train={folder}/lonely"], ["identity 'b' has 1 image", "data.min_images=1"]),
        (["run.folder={folder}/new", "run.accumulation=3", "run.batch=20"], ["run.accumulation = 3 does not divide"]),
        (["run.folder={folder}/new", "data.train={folder}/broken"], ["more than 1%", "skipped.txt"]),
        (
            ["run.folder={folder}/new", "run.batch=1"],
            ["its 1 image cannot give", "small takes batch statistics", "run.batch of at least 2"],
        ),
        (["run.folder={folder}/new", "evaluation.data={folder}/gone.tar"], ["evaluation.data", "gone.tar does not exist"]),
        (["--ranks=0"], ["--ranks is 0"]),
        (["--ranks=19"], ["its 18 images cannot give each of 19 ranks at least 1; use at most 18 ranks"]),
    ],
)
def test_bad_input_to_train(trained, capsys, settings, words):
    if not (trained / "lonely").exists():
        write_faces(str(trained / "others.tar"), FacesConfig(identities=4, images_per_identity=6, size=32), workers=1)
        write_faces(str(trained / "lonely"), FacesConfig(identities=1, images_per_identity=6, size=32), workers=1)
        os.rename(next((trained / "lonely").iterdir()), trained / "lonely" / "a")
        (trained / "lonely" / "b").mkdir()
        (trained / "lonely" / "b" / "0.jpg").write_bytes(next((trained / "lonely" / "a").iterdir()).read_bytes())
        (trained / "empty").mkdir()
        whole = (trained / "faces.tar").read_bytes()
        (trained / "cut.tar").write_bytes(whole[: whole.find(b"000004/000") + 50])
        (trained / "faces.tgz").write_bytes(gzip.compress(whole))
        write_faces(str(trained / "broken"), FacesConfig(identities=6, images_per_identity=6, size=32), workers=1)
        for identity in sorted((trained / "broken").iterdir())[:3]:
            next(identity.iterdir()).write_bytes(b"this is not an image")
    refused(train(trained, *[item.format(folder=trained) for item in settings]), capsys, *words)


def test_a_checkpoint_from_before_there_were_groups_has_none(trained, capsys):
    shutil.copytree(trained / "run", trained / "old")
    (path,) = (trained / "old" / "checkpoints").glob("step-*")
    edit_manifest(path, lambda values: values.pop("images_per_identity"))
    refused(train(trained, "data.images_per_identity=3", run="old"), capsys, "has images_per_identity 1, but this run has 3")
    assert main(train(trained, run="old")) == 0


@pytest.mark.slow
def test_bad_input_to_several_processes(trained):
    """The sentence comes once, from the command itself."""
    command = [sys.executable, "-m", "pipeline.cli", *train(trained, "--ranks=2", "backbone.width=8")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("has width 16, but this run has 8") == 1 and "Traceback" not in done.stderr


RECIPE_WITH_A_LOSS = """from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from typing import Literal

from partial_fc.losses import Loss, register, softplus
from pipeline.recipes.small import faces_small

if os.environ.get("RANK", "0") != "0":
    sys.modules["matplotlib"] = None  # whose import takes a second: only the first rank draws

@register("mine")
@dataclass(frozen=True)
class Mine(Loss):
    scale: float = 16.0
    margin: float = 0.1
    kind: Literal["plain", "other"] = "plain"
    threshold: float | None = None

    def learned(self, num_classes: int) -> dict[str, float]:
        return {"threshold": self.threshold or 0.0}

    def __call__(self, batch):
        statistics = batch.against_classes(scale=self.scale)
        logit_B = self.scale * (statistics.target_B - self.margin)
        return softplus(statistics.non_target_B - logit_B).mean() + batch.parameter("threshold") ** 2

def recipe():
    return replace(faces_small(), loss=Mine())
"""


@pytest.mark.slow
def test_a_recipe_file_with_a_loss_of_its_own_on_two_ranks(trained):
    file = trained / "mine.py"
    file.write_text(RECIPE_WITH_A_LOSS)
    arguments = train(trained, "--ranks=2", "loss.threshold=0.5", "loss.kind=other", run="mine")
    arguments[1] = str(file)
    done = subprocess.run([sys.executable, "-m", "pipeline.cli", *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "ranks: 2" in done.stderr, done.stderr
    rows = map(json.loads, (trained / "mine" / "metrics.jsonl").read_text().splitlines())
    first = next(row for row in rows if "loss" in row)
    assert 0 < first["threshold"] < 0.5 / 16
    saved = checkpoint.locate(str(trained / "mine")).info["config"]["loss"]
    assert saved == {"name": "mine", "scale": 16.0, "margin": 0.1, "kind": "other", "threshold": 0.5}
    assert main(["eval", str(trained / "mine"), "--data", str(trained / "faces.tar")]) == 0  # which knows nothing of the recipe


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["eval", "{folder}/run", "--data", "{folder}/missing.tar"], "missing.tar"),
        (["eval", "{folder}/nothing", "--data", "{folder}/faces.tar"], "nothing does not exist"),
        (["data", "check", "{folder}/missing.rec"], "missing.rec"),
        (["data", "pack", "{folder}/missing", "{folder}/x.rec"], "missing"),
        (["data", "faces", "{folder}/x.tar", "--identities", "0"], "identities"),
        (["config", "dogs_smal"], "did you mean 'dogs_small'"),
        (["config", "dogs_small", "--set", "backbone.name=smal"], "no backbone named 'smal': did you mean 'small'"),
        (["import", "insightface", "{folder}/config.py"], "config.py"),
    ],
)
def test_bad_input_to_the_other_commands(trained, capsys, arguments, word):
    refused([argument.format(folder=trained) for argument in arguments], capsys, word)


@pytest.mark.parametrize("command", [["train", "dogs_small"], ["config", "dogs_small"], ["data", "preview", "faces.tar", "dogs_small"]])
def test_braces_that_a_shell_has_expanded(command, capsys):
    """Or 127 of 128 tars would be missing without a word. Another --set may override an earlier one."""
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--set", "run.epochs=1", "data.train=x-000.tar", "data.train=x-001.tar"])
    words = "argument --set: data.train is given 2 times. Has the shell expanded braces? Then put data.train=VALUE in quotes.\n"
    assert capsys.readouterr().err.endswith(words)
    assert main(["config", "dogs_small", "--set", "data.train=x.tar", "run.epochs=1", "--set", "data.train=y.tar"]) == 0
    assert "data.train = y.tar" in capsys.readouterr().out


def test_import_gives_a_recipe_and_a_checkpoint_that_training_starts_from(trained, capsys):
    torch.manual_seed(1)
    backbone = build(BackboneConfig("iresnet18", width=8), 112).state_dict()
    prototypes = torch.randn(9, 8)
    for rank, rows in enumerate(prototypes.split([5, 4])):
        part = {"state_dict_backbone": backbone, "state_dict_softmax_fc": {"weight": rows}}
        torch.save(part, trained / f"checkpoint_gpu_{rank}.pt")
    (trained / "r18.py").write_text(
        "from easydict import EasyDict as edict\nconfig = edict()\nconfig.network = 'r18'\nconfig.embedding_size = 8\n"
        "config.num_classes = 9\nconfig.batch_size = 9\nconfig.margin_list = (1.0, 0.0, 0.4)\nconfig.fp16 = False\n"
    )
    models = [str(trained / f"checkpoint_gpu_{rank}.pt") for rank in (0, 1)]
    arguments = ["import", "insightface", str(trained / "r18.py"), *models, "--out", str(trained / "imported"), "--gpus", "2"]
    assert main(arguments) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("start with: protoshard ").split()
    settings = [f"data.train={trained / 'faces.tar'}", "engine.name=ddp", "engine.device=cpu", "run.epochs=0.3"]
    assert main([*command, "--set", *settings, "optimizer.lr=0", "optimizer.classifier_lr=0"]) == 0
    saved = checkpoint.locate(str(trained / "imported"))
    assert saved.info["consumed"] > 0
    assert torch.equal(saved.whole("prototypes"), prototypes)
    assert torch.equal(saved.whole("backbone.fc.weight"), backbone["fc.weight"])
    refused([*arguments[:3], models[0], "--out", str(trained / "other"), "--gpus", "2"], capsys, "is a rank missing")
