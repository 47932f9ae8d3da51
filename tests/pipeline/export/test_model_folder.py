"""What an export holds, that it gives the run's own features, and that half of one never loads."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from dali_loaders import open_source
from dali_loaders.loader import evaluation_batches
from pipeline import checkpoint
from pipeline.cli import main
from pipeline.evaluation.embed import embed
from pipeline.evaluation.evaluate_checkpoint import load_backbone
from pipeline.export import load, model_card, model_folder, prototypes_file
from pipeline.export.model_folder import describe, export, open_model
from pipeline.starting_weights import backbone_of

ROOT = Path(__file__).resolve().parents[3]


def evaluated(made, ema=False):
    """The embeddings that `protoshard eval` compares."""
    network, config = load_backbone(checkpoint.locate(made.run), torch.device("cpu"), ema)
    source = open_source(made.data)
    evaluation = config.evaluation
    return embed(network, source, config.data, batch_size=evaluation.batch_size, flip=evaluation.flip, device="cpu")[0]


FRESH = """
import sys
import numpy as np
import torch
for package in ("nvidia", "deepspeed", "ray", "tensorboard"):
    sys.modules[package] = None  # cannot be imported
torch.set_num_threads(int(sys.argv[4]))
from pipeline.export import load
model = load(sys.argv[1])
images = np.load(sys.argv[2])
parts = [model(torch.from_numpy(images[at : at + 24]).permute(0, 3, 1, 2)) for at in range(0, len(images), 24)]
np.save(sys.argv[3], torch.cat(parts).numpy())
"""


def test_a_fresh_process_gives_the_embeddings_of_eval_to_the_bit(made, tmp_path):
    source = open_source(made.data)
    _, config = load_backbone(checkpoint.locate(made.run), torch.device("cpu"))
    batches = evaluation_batches(source, config.data, np.arange(len(source)), 24, "cpu", channels_last=True)
    images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).contiguous()
    np.save(tmp_path / "images.npy", images.numpy())
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-c", FRESH, made.folder, str(tmp_path / "images.npy"), str(tmp_path / "out.npy"), threads]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])})
    assert np.array_equal(np.load(tmp_path / "out.npy"), evaluated(made).numpy())


def test_averaged_weights(made, tmp_path):
    export(made.run, str(tmp_path / "out"), ema=True, onnx=False, say=lambda _: None)
    saved = backbone_of(checkpoint.locate(made.run), ema=True)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == saved.keys() and all(torch.equal(weights[name], saved[name]) for name in saved)
    last = backbone_of(checkpoint.locate(made.run))
    assert any(not torch.equal(weights[name], last[name]) for name in last)
    about = load(tmp_path / "out").description
    assert about.origin["ema"] and about.thresholds is not None


def test_what_is_in_it(made):
    about = load(made.folder).description
    config = json.loads((Path(made.folder) / "config.json").read_text())
    assert {"README.md", "config.json", "identities.json", "model.pt2", "model.safetensors", "prototypes.safetensors"} == {
        *os.listdir(made.folder)
    } - {"model.onnx"}
    assert (config["colors"], config["mean"], config["std"], config["image_size"]) == ("rgb", 127.5, 127.5, 32)
    assert (about.backbone.name, about.backbone.width, about.batch_size, about.flip) == ("small", 16, 24, True)
    assert about.landmarks[0] == pytest.approx((38.2946 * 32 / 112, 51.6963 * 32 / 112))
    figures = checkpoint.locate(made.run).info["figures"]
    assert about.thresholds.set == "faces"
    assert about.thresholds.cosine_at_far["1e-2"] == figures["faces/threshold_at_far/1e-2"]
    card = (Path(made.folder) / "README.md").read_text()
    assert card.startswith("---\nlicense: unknown\n") and f"{figures['faces/eer']:.4f}" in card and "GDPR" in card


def test_card_is_one_of_the_hub(made):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(Path(made.folder) / "README.md")
    assert card.data.library_name == "protoshard" and card.data.license == "unknown"


def test_a_snapshot_of_the_hub_is_links_and_loads(made, tmp_path):
    """huggingface_hub keeps files as blobs, to which the names in a snapshot lead."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    for number, name in enumerate(("config.json", "model.safetensors", "README.md")):
        shutil.copy(Path(made.folder) / name, tmp_path / "blobs" / str(number))
        (tmp_path / "snapshots" / name).symlink_to(f"../blobs/{number}")
    images = torch.zeros(1, 3, 32, 32)
    assert torch.equal(load(tmp_path / "snapshots")(images), load(made.folder)(images))


def test_thresholds_are_those_of_the_pairs(made, tmp_path):
    """The smallest cosine at which no more impostor pairs are accepted than the rate allows, against all pairs in float64."""
    export(made.run, str(tmp_path / "out"), onnx=False, data=made.data, say=lambda _: None)
    thresholds = load(tmp_path / "out").description.thresholds
    unit = evaluated(made).double().numpy()
    labels = np.asarray(open_source(made.data).labels)
    first, second = np.triu_indices(len(labels), 1)
    impostors = (unit @ unit.T)[first, second][labels[first] != labels[second]]
    assert thresholds.set == "faces" and set(thresholds.cosine_at_far) == {"1e-1", "1e-2", "1e-3"}  # 2,925 pairs allow no 1e-4
    for far, cosine in thresholds.cosine_at_far.items():
        assert (impostors >= cosine).mean() <= float(far) < (impostors >= cosine - 4e-3).mean() + 1e-2


def test_nothing_is_overwritten(made, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert main(["export", made.run, str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err and os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("out", "sentence"),
    [("out.zip", "OUT is a folder, but .* is the name of a file"), ("s3://K:S@bucket/model", r"s3://\*\*\*@bucket/model is an address")],
)
def test_what_is_no_name_for_a_folder_is_refused(made, tmp_path, monkeypatch, out, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        export(made.run, out)
    assert os.listdir(tmp_path) == []


def test_whoever_may_read_one_file_may_read_all(made):
    assert len({(Path(made.folder) / name).stat().st_mode for name in os.listdir(made.folder)}) == 1


def test_thresholds_without_the_mirror_image(made, tmp_path):
    """Pair sets are compared with it in any case, so that a model without it cannot have theirs."""
    saved = checkpoint.locate(made.run)
    network, config = load_backbone(saved, torch.device("cpu"))
    for evaluation, expected in (
        ({"pairs": ("faces.bin",), "data": ""}, None),
        ({"pairs": ("lfw.bin",)}, "faces"),
        ({"pairs": ("faces.bin",), "data": "", "flip": True}, "faces"),
    ):
        changed = replace(config, evaluation=replace(config.evaluation, **{"flip": False, **evaluation}))
        found = describe(saved, changed, network, False).thresholds
        assert (found and found.set) == expected
    without = replace(describe(saved, config, network, False), flip=False)
    with pytest.raises(ValueError, match="a pair set is compared with mirror images added, which this model does not add"):
        model_folder._measured(network, config, without, "lfw.bin")


def test_intervals_and_the_set_of_the_thresholds(made, tmp_path):
    """A run keeps no intervals with its figures; --data measures them. Thresholds of what was trained on are said to be that."""
    assert "Without intervals: `protoshard export --data SET`" in (Path(made.folder) / "README.md").read_text()
    said: list[str] = []
    export(made.run, str(tmp_path / "out"), onnx=False, data=made.data, say=said.append)
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"\| faces/eer \| 0\.\d{4} \(0\.\d{4} to 0\.\d{4}\) \|", card) and "In brackets: the 95 % interval" in card
    assert said[0].startswith("faces is a set that the model was trained on") and said[0] in made.said
    shutil.copy(made.data, tmp_path / "others.tar")
    export(made.run, str(tmp_path / "other"), onnx=False, data=str(tmp_path / "others.tar"), say=said.append)
    assert len(said) == 3


def test_an_incomplete_checkpoint_is_refused(made, tmp_path, capsys):
    for name in ("step-00000003.partial", "step-00000003"):
        (tmp_path / name).mkdir()
        assert main(["export", str(tmp_path / name), str(tmp_path / "out"), "--no-onnx"]) == 2
        assert "no complete checkpoint" in capsys.readouterr().err
    whole = checkpoint.locate(made.run).path
    shutil.copytree(whole, tmp_path / "run" / os.path.basename(whole))
    data = max((tmp_path / "run").glob("*/*"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:-9])
    assert main(["export", str(tmp_path / "run" / os.path.basename(whole)), str(tmp_path / "out"), "--no-onnx"]) == 2
    assert "cannot be used" in capsys.readouterr().err
    assert not any(name.startswith("out") for name in os.listdir(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_export_leaves_no_folder_that_loads(made, tmp_path, number):
    """It is held at the writing of the card: weights are there, config.json is not."""
    slow = "import time; from pipeline.export import model_card; model_card.text = lambda *_: time.sleep(60); "
    code = f"{slow}from pipeline.cli import main; import sys; sys.exit(main(['export', {made.run!r}, 'out', '--no-onnx']))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("out.partial-*/model.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    left = os.listdir(tmp_path)
    if number == signal.SIGTERM:
        assert left == [] and "nothing was written" in said
    else:
        (partial,) = left
        assert partial.startswith("out.partial-")
        with pytest.raises(ValueError, match="an export is whole only with it"):
            load(tmp_path / partial)


def test_a_full_disk_leaves_nothing(made, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prototypes_file, "_write_all", full)
    with pytest.raises(ValueError, match="out cannot be written: No space left"):
        export(made.run, str(tmp_path / "out"), onnx=False, prototypes=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("options", [{}, {"program": True}])
def test_a_disk_that_is_full_for_libraries_leaves_nothing(made, tmp_path, options):
    """In a process that may write no file of more than 1 MB: what libraries make of that is no OSError."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from pipeline.export.model_folder import export\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))\n"
        f"try: export({made.run!r}, 'out', **{ ({'onnx': False} | options)!r})\n"
        "except ValueError as error: print(error)"
    )
    most = str((Path(made.folder) / "model.safetensors").stat().st_size if options.get("program") else 1_000_000)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code, most], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert "out cannot be written: File too large" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == []


def damaged(made, tmp_path) -> Path:
    shutil.copytree(made.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.onnx", "*.pt2"))
    return tmp_path / "copy"


def test_parts_of_a_folder_do_not_load(made, tmp_path):
    copy = damaged(made, tmp_path)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole"):
        load(copy)
    flipped = bytearray(weights)
    flipped[-1] ^= 1
    (copy / "model.safetensors").write_bytes(flipped)
    with pytest.raises(ValueError, match="it has changed, or is of another export"):
        load(copy)
    os.remove(copy / "model.safetensors")
    os.mkfifo(copy / "model.safetensors")  # nobody will write to it
    with pytest.raises(ValueError, match=r"cannot be read \(is a named pipe, not a file\)"):
        load(copy)
    os.remove(copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .*whole only with it"):
        load(copy)
    (copy / "model.safetensors").write_bytes(weights)
    os.remove(copy / "config.json")
    with pytest.raises(ValueError, match=r"config\.json cannot be read .*whole only with it"):
        open_model(str(copy))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "other"}, "its format is not"),
        ({"version": 9}, "of version 9"),
        ({"colors": "bgr"}, "colors is 'bgr', but must be 'rgb'"),
        ({"image_size": 10**9}, "image_size is 1000000000"),
        ({"image_size": True}, "image_size is True"),
        ({"image_size": 48}, "of another network than config.json says"),
        ({"flip": "yes"}, "flip is 'yes'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"weights": "x"}, "weights is 'x'"),
        ({"backbone": {"name": "small", "width": 32}}, "of another network than config.json says"),
        ({"backbone": {"name": "small", "width": 10**12}}, "at most 65536"),
        ({"backbone": {"name": "small", "wide": 3}}, "backbone.wide"),
        ({"backbone": {"name": ["small"]}}, "backbone.name"),
        ({"backbone": {"name": "mine", "width": 16}}, "name the recipe file that registers it"),
        ({"backbone": 3}, "backbone is 3"),
        ({"landmarks": [[1, 2]]}, "five points"),
        ({"thresholds": {"set": "a", "cosine_at_far": {"1e-3": 7}}}, "but must be a cosine"),
        ({"thresholds": {"set": "a", "cosine_at_far": {"1e-3": float("nan")}}}, "but must be a cosine"),
        ({"thresholds": {"set": "a", "cosine_at_far": {"low": 0.1}}}, "names of FARs"),
        ({"thresholds": [1]}, "thresholds is"),
        ({"origin": 1}, "origin is 1"),
    ],
)
def test_a_config_is_checked_before_it_is_used(made, tmp_path, change, sentence):
    copy = damaged(made, tmp_path)
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=sentence):
        load(copy)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff", b"[]", b"{" + b" " * (1 << 20) + b"}"])
def test_a_file_that_is_no_config(made, tmp_path, content):
    copy = damaged(made, tmp_path)
    (copy / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json does not describe a model"):
        load(copy)


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [({"a/threshold_at_far/1e-3": "high"}, "is 'high', but must be a cosine"), ({"a/threshold_at_far/low": 0.1}, "names of FARs")],
)
def test_figures_of_a_strangers_checkpoint_are_checked(made, tmp_path, figures, sentence, monkeypatch):
    monkeypatch.setattr("pipeline.export.model_folder._figures", lambda _: figures)
    with pytest.raises(ValueError, match=sentence):
        export(made.run, str(tmp_path / "out"), onnx=False)


def test_a_card_says_no_paths_and_stays_a_table(made):
    about = load(made.folder).description
    info = {"config": {"data": {"train": "/home/me/a|b<i>.tar, s3://K:S@bucket/c.tar"}, "loss": "none"}, "step": "1\n# x"}
    card = model_card.text(about, info, {}, {})
    assert "| data | a\\|b&lt;i>.tar, c.tar |" in card and "/home/me" not in card and "S@" not in card and "\n# x" not in card


def test_weights_that_are_not_finite_are_refused(made, tmp_path, monkeypatch):
    module, config = load_backbone(checkpoint.locate(made.run), torch.device("cpu"))
    next(module.parameters()).data.view(-1)[0] = float("nan")
    monkeypatch.setattr("pipeline.export.model_folder.load_backbone", lambda *_: (module, config))
    with pytest.raises(ValueError, match="weights that are not finite"):
        export(made.run, str(tmp_path / "out"), onnx=False)


def test_images_of_another_size_are_refused(made):
    with pytest.raises(ValueError, match=r"takes images \[b, 3, 32, 32\], not \[2, 3, 112, 112\]"):
        load(made.folder)(torch.zeros(2, 3, 112, 112))


def test_images_of_another_size_are_said_and_exploded_features_refused(made, tmp_path, caplog):
    model = load(made.folder)
    image = cv2.imencode(".png", np.full((40, 32, 3), 9, np.uint8))[1].tobytes()
    model.embed([image])
    assert "1 images are not 32 x 32 pixels and are stretched, such as an image given as bytes" in caplog.text
    model.network.register_forward_hook(lambda *arguments: arguments[2] * 1e30)  # of which the norm overflows, to a row of zeros
    with pytest.raises(ValueError, match="an embedding that is not finite for an image given as bytes"):
        model.embed([image])


def test_loading_keeps_the_random_numbers_of_the_caller(made):
    torch.manual_seed(4)
    wanted = torch.rand(3)
    torch.manual_seed(4)
    load(made.folder)
    assert torch.equal(torch.rand(3), wanted)


def test_weights_of_another_order_and_metadata_are_the_same_weights(made, tmp_path):
    """As when a tool of the hub writes the file anew."""
    copy = damaged(made, tmp_path)
    weights = load_file(copy / "model.safetensors")
    save_file(dict(reversed(weights.items())), copy / "model.safetensors", {"by": "another tool"})
    images = torch.zeros(1, 3, 32, 32)
    assert torch.equal(load(copy)(images), load(made.folder)(images))


def test_the_program_of_torch_export(made):
    program = torch.export.load(Path(made.folder) / "model.pt2").module()
    model = load(made.folder)
    for count in (1, 7):
        images = torch.rand(count, 3, 32, 32) * 2 - 1
        assert torch.allclose(normalize(program(images)), normalize(model.network(images)), atol=1e-6)
