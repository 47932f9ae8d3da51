"""`protoshard import`: the folder of a new run, from files of arcface_torch, AdaFace and CVLface, made up here in their formats."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import batch_norm, conv2d, linear, prelu

from pipeline import backbones, checkpoint
from pipeline.backbones import BackboneConfig, build
from pipeline.cli import main
from pipeline.config import from_dict
from pipeline.interop.classifier_files import merge_classifier
from pipeline.interop.run import import_run
from pipeline.resolve import resolve

CONFIG = "config = edict(network='mbf', embedding_size=4, num_epoch=1, num_classes=6, fp16=True)\n"


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return build(BackboneConfig("mobilefacenet", width=4), 112).state_dict()


@pytest.fixture
def files(tmp_path, weights):
    (tmp_path / "mbf.py").write_text(CONFIG)
    torch.save(weights, tmp_path / "model.pt")
    return str(tmp_path / "mbf.py"), str(tmp_path / "model.pt")


def contents(folder):
    """Every file below a folder, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def loaded(run):
    """The network of a run's newest checkpoint, as `protoshard eval` builds it, and what the checkpoint says of itself."""
    saved = checkpoint.locate(str(run))
    info = saved.info
    config = from_dict({name: part for name, part in info["config"].items() if name != "loss"})
    with torch.device("meta"):
        module = build(config.backbone, config.data.image_size)
    weights = {name.removeprefix("backbone."): part for name, part in ((name, saved.whole(name)) for name in saved) if name != "prototypes"}
    module.load_state_dict(weights, assign=True)
    return module.eval(), info


def test_a_run_is_made_of_a_config_and_a_model(tmp_path, files, weights):
    out = tmp_path / "run"
    said = import_run(files[0], [files[1]], str(out), 8)
    assert f"start checkpoint: {out}/checkpoints/step-00000000 (backbone alone, no optimizer state)" in said
    assert sorted(os.listdir(out)) == ["checkpoints", "recipe.py"] and os.listdir(out / "checkpoints") == ["step-00000000"]
    module, info = loaded(out)
    torch.testing.assert_close(module.state_dict(), weights, rtol=0, atol=0)
    assert (info["step"], info["backbone"], info["width"], info["num_classes"]) == (0, "mobilefacenet", 4, None)
    assert info["config"]["run"]["folder"] == str(out) == resolve(str(out / "recipe.py")).run.folder
    out.rename(tmp_path / "moved")
    assert resolve(str(tmp_path / "moved" / "recipe.py")).run.folder == str(tmp_path / "moved")  # finds its start checkpoint there


@pytest.mark.parametrize("kind", ["run", "checkpoint", "recipe", "link", "file", "interrupted"])
def test_an_import_never_touches_what_is_there(tmp_path, files, capsys, kind):
    out = tmp_path / "run"
    if kind == "file":
        out.write_text("mine")
    elif kind == "recipe":
        import_run(files[0], [], str(out), 8)
    else:
        (out / {"interrupted": ".importing"}.get(kind, "checkpoints/step-00000120")).mkdir(parents=True)
    if kind in ("run", "link"):
        (out / "recipe.py").touch()
    if kind == "link":
        out.rename(tmp_path / "elsewhere")
        out.symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path), sorted(tmp_path.rglob("*"))
    for models in ([], [files[1]]):
        assert main(["import", "insightface", files[0], *models, "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert f"{out} holds something already, such as an earlier run: give another --out, or move it away." in said
    assert (contents(tmp_path), sorted(tmp_path.rglob("*"))) == before


def test_what_fails_half_way_leaves_nothing(tmp_path, files, monkeypatch):
    save = checkpoint.save

    def interrupted(*args, **options):
        save(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    before = contents(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(KeyboardInterrupt):
            import_run(files[0], [files[1]], str(tmp_path / name), 8)
    assert contents(tmp_path) == before and not (tmp_path / "new").exists() and (tmp_path / "empty").exists()
    monkeypatch.undo()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    import_run(files[0], [], str(tmp_path / "link"), 8)  # an empty folder is as good as none
    assert os.listdir(tmp_path / "empty") == ["recipe.py"]


def test_a_network_that_does_not_fit_makes_no_folder(tmp_path, files):
    (tmp_path / "r18.py").write_text(CONFIG.replace("mbf", "r18"))
    words = r"model\.pt does not fit iresnet18 of width 4: \d+ are missing \(conv1\.weight, .* and \d+ more\); \d+ are unknown to it \("
    with pytest.raises(ValueError, match=words):
        import_run(str(tmp_path / "r18.py"), [files[1]], str(tmp_path / "run"), 8)
    assert not (tmp_path / "run").exists()


def split(weight, ranks):
    return list(weight.split([len(weight) // ranks + (rank < len(weight) % ranks) for rank in range(ranks)]))


@pytest.mark.parametrize(
    ("name", "wrap", "has_backbone"),
    [
        ("checkpoint_gpu_{}.pt", lambda part, weights: {"state_dict_backbone": weights, "state_dict_softmax_fc": {"weight": part}}, True),
        ("softmax_fc_gpu_{}.pt", lambda part, weights: {"weight": part}, False),
        ("rank_{}_softmax_weight.pt", lambda part, weights: part, False),
        ("rank:{}_softmax_weight.pt", lambda part, weights: part, False),
    ],
)
def test_classifier_files_of_all_versions(tmp_path, files, weights, name, wrap, has_backbone):
    prototypes = torch.randn(6, 4)
    parts = []
    for rank, part in enumerate(split(prototypes, 4)):
        parts.append(str(tmp_path / name.format(rank)))
        torch.save(wrap(part.clone(), weights), parts[-1])
    random.Random(0).shuffle(parts)
    models = parts if has_backbone else [files[1], *parts]
    assert "backbone and 6 prototypes" in import_run(files[0], models, str(tmp_path / "run"), 4)
    saved = checkpoint.locate(str(tmp_path / "run"))
    torch.testing.assert_close(saved.whole("prototypes"), prototypes, rtol=0, atol=0)
    if not has_backbone:
        with pytest.raises(ValueError, match="holds a part of a classifier, and no backbone"):
            import_run(files[0], parts, str(tmp_path / "other"), 4)
        with pytest.raises(ValueError, match="both stand for the backbone"):
            import_run(files[0], [files[1], files[1], *parts], str(tmp_path / "other"), 4)
    missing = sorted(models)[:-1] if has_backbone else [files[1], *sorted(parts)[:-1]]
    with pytest.raises(ValueError, match="3 classifier files hold 5 classes together, but 6 are expected"):
        import_run(files[0], missing, str(tmp_path / "other"), 4)


@pytest.mark.parametrize("ranks", [1, 3, 4, 12])
def test_classifier_files_merge_in_rank_order(tmp_path, ranks):
    weight, paths = torch.randn(26, 4), []
    for rank, part in enumerate(split(weight, ranks)):
        paths.append(str(tmp_path / f"checkpoint_gpu_{rank}.pt"))
        torch.save({"state_dict_softmax_fc": {"weight": part.clone()}}, paths[-1])
    torch.testing.assert_close(merge_classifier(sorted(paths)), weight, rtol=0, atol=0)  # gpu_10 before gpu_2
    torch.testing.assert_close(merge_classifier([{"weight": part} for part in split(weight, ranks)], 26), weight, rtol=0, atol=0)


def test_classifier_mismatch_is_named(tmp_path):
    parts = [{"state_dict_softmax_fc": {"weight": part}} for part in split(torch.randn(10, 4), 4)]
    with pytest.raises(ValueError, match=r"classifier of rank 0 is \(2, 4\), but \(3, 4\) is its part of 7 classes"):
        merge_classifier([parts[2], parts[1], parts[3]])
    with pytest.raises(ValueError, match=r"rank 1 is \(5, 3\), but \(5, 4\)"):
        merge_classifier([{"weight": torch.zeros(5, 4)}, {"weight": torch.zeros(5, 3)}])
    with pytest.raises(ValueError, match="the given state dict holds no classifier"):
        merge_classifier([{"state_dict_backbone": {}}])
    with pytest.raises(ValueError, match="no classifier file"):
        merge_classifier([])
    with pytest.raises(ValueError, match=r"NaN or infinity: in classes 1, 3, 4 and 1 more"):
        merge_classifier([{"weight": torch.tensor([[0.0], [float("nan")], [1.0], [float("inf")], [float("nan")], [float("nan")]])}])
    paths = [str(tmp_path / f"checkpoint_gpu_{rank}.pt") for rank in range(4)]
    with pytest.raises(ValueError, match="that of rank 1 is missing"):
        merge_classifier([paths[0], paths[2]])


STAGES = {"ir18": (2, 2, 2, 2), "ir50": (3, 4, 14, 3)}


def ir_weights(name, width):
    """Weights in the naming of AdaFace's net.py, all random, batch statistics too."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def add(prefix, *shape):
        fan_in = max(1, torch.Size(shape[1:]).numel())
        state[prefix] = torch.randn(shape, generator=generator) / fan_in**0.5

    def add_norm(prefix, channels, affine=True):
        for part in ("weight", "bias") if affine else ():
            state[f"{prefix}.{part}"] = 0.5 + torch.rand(channels, generator=generator)
        state[f"{prefix}.running_mean"] = torch.randn(channels, generator=generator) / 4
        state[f"{prefix}.running_var"] = 0.5 + torch.rand(channels, generator=generator)

    add("input_layer.0.weight", 64, 3, 3, 3)
    add_norm("input_layer.1", 64)
    state["input_layer.2.weight"] = torch.rand(64, generator=generator)
    block, channels = 0, 64
    for count, wider in zip(STAGES[name], (64, 128, 256, 512), strict=True):
        for _ in range(count):
            if channels != wider:
                add(f"body.{block}.shortcut_layer.0.weight", wider, channels, 1, 1)
                add_norm(f"body.{block}.shortcut_layer.1", wider)
            add_norm(f"body.{block}.res_layer.0", channels)
            add(f"body.{block}.res_layer.1.weight", wider, channels, 3, 3)
            add_norm(f"body.{block}.res_layer.2", wider)
            state[f"body.{block}.res_layer.3.weight"] = torch.rand(wider, generator=generator)
            add(f"body.{block}.res_layer.4.weight", wider, wider, 3, 3)
            add_norm(f"body.{block}.res_layer.5", wider)
            block, channels = block + 1, wider
    add_norm("output_layer.0", 512)
    add("output_layer.3.weight", width, 512 * 49)
    add("output_layer.3.bias", width)
    add_norm("output_layer.4", width, affine=False)
    return state


def ir_features(state, name, images):
    """The features of AdaFace's IR networks before they are normalised, as its paper's code describes them, without modules."""

    def norm(x, prefix):
        weight, bias = state.get(f"{prefix}.weight"), state.get(f"{prefix}.bias")
        return batch_norm(x, state[f"{prefix}.running_mean"], state[f"{prefix}.running_var"], weight, bias, eps=1e-5)

    x = norm(conv2d(images, state["input_layer.0.weight"], padding=1), "input_layer.1")
    x = prelu(x, state["input_layer.2.weight"])
    block = 0
    for count in STAGES[name]:
        for stride in [2] + [1] * (count - 1):
            prefix = f"body.{block}."
            shortcut = x[:, :, ::stride, ::stride]  # a maximum over 1 pixel
            if prefix + "shortcut_layer.0.weight" in state:
                shortcut = conv2d(x, state[prefix + "shortcut_layer.0.weight"], stride=stride)
                shortcut = norm(shortcut, prefix + "shortcut_layer.1")
            y = conv2d(norm(x, prefix + "res_layer.0"), state[prefix + "res_layer.1.weight"], padding=1)
            y = prelu(norm(y, prefix + "res_layer.2"), state[prefix + "res_layer.3.weight"])
            y = conv2d(y, state[prefix + "res_layer.4.weight"], stride=stride, padding=1)
            x = norm(y, prefix + "res_layer.5") + shortcut
            block += 1
    x = norm(x, "output_layer.0").flatten(1)
    return norm(linear(x, state["output_layer.3.weight"], state["output_layer.3.bias"]), "output_layer.4")


@pytest.mark.parametrize("name", ["ir18", pytest.param("ir50", marks=pytest.mark.slow)])
def test_adaface_gives_the_same_features_for_rgb_as_it_did_for_bgr(tmp_path, name, capsys):
    state = ir_weights(name, 8)
    lightning = {
        "state_dict": {f"model.{part}": tensor for part, tensor in state.items()} | {"head.kernel": torch.zeros(8, 5)},
        "epoch": 25,
    }
    torch.save(lightning, tmp_path / "adaface.ckpt")
    assert main(["import", "adaface", str(tmp_path / "adaface.ckpt"), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert f"network: {name}, features of 8 numbers, images of 112 pixels" in said
    assert "not taken over: 1 tensors that are not the network's (head.kernel)" in said and "exchanged, for red, green, blue" in said
    rgb = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        ours, theirs = loaded(tmp_path / "run")[0](rgb), ir_features(state, name, rgb.flip(1))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    assert f"--from {tmp_path / 'run'} --set backbone.name={name} backbone.width=8 data.image_size=112" in said


def test_cvlface_says_in_which_order_colours_come(tmp_path, capsys):
    state = ir_weights("ir18", 4)
    path = str(tmp_path / "model.safetensors")
    save_file({f"net.{part}": tensor for part, tensor in state.items()}, path)
    for number, (name, text, options, flips) in enumerate(
        [
            ("model.yaml", "input_size: [3, 112, 112]\ncolor_space: 'RGB'\n", ["--colors", "bgr"], True),
            ("config.json", json.dumps({"conf": {"color_space": "BGR"}}), [], True),
            ("model.yaml", "nothing of the kind", [], False),
        ]
    ):
        (tmp_path / name).write_text(text)
        assert main(["import", "cvlface", path, "--out", str(tmp_path / str(number)), *options]) == 0
        (tmp_path / name).unlink()
        stem, first = loaded(tmp_path / str(number))[0].input_layer[0].weight, state["input_layer.0.weight"]
        torch.testing.assert_close(stem.data, first.flip(1) if flips else first, rtol=0, atol=0)
        assert ("since no configuration beside the file says color_space" in capsys.readouterr().out) != flips


def test_cvlface_has_iresnets_in_the_naming_of_insightface_too(tmp_path):
    weights = build(BackboneConfig("iresnet18", width=4), 112).state_dict()
    torch.save({f"net.{part}": tensor for part, tensor in weights.items()}, tmp_path / "model.pt")
    assert main(["import", "cvlface", str(tmp_path / "model.pt"), "--out", str(tmp_path / "run")]) == 0
    module, info = loaded(tmp_path / "run")
    assert info["backbone"] == "iresnet18"
    torch.testing.assert_close(module.state_dict(), weights, rtol=0, atol=0)


def test_other_networks_are_refused(tmp_path, capsys):
    state = ir_weights("ir18", 4)
    bottleneck = {name: tensor for name, tensor in state.items() if not name.startswith("body.7.")}
    se = state | {f"body.{block}.res_layer.se_block.fc1.weight": torch.zeros(4, 64, 1, 1) for block in range(8)}
    vit = {"net.pos_embed": torch.zeros(1, 4, 4), "net.blocks.0.norm1.weight": torch.zeros(4)}
    for found, words in (
        (vit, "holds no IR or IResNet 18 to 101, which are those that can be imported: it begins with net.pos_embed"),
        (bottleneck, "holds no IR or IResNet"),
        (se, "does not fit ir18 of width 4: 8 are unknown to it (body.0.res_layer.se_block.fc1.weight, "),
        (state | {"output_layer.3.bias": torch.full((4,), float("nan"))}, "holds NaN or infinity: 1 is not finite (output_layer.3.bias)"),
    ):
        torch.save(found, tmp_path / "model.pt")
        assert main(["import", "cvlface", str(tmp_path / "model.pt"), "--out", str(tmp_path / "run")]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ir_networks_train():
    for name in ("ir18", "ir34", "ir50", "ir101"):
        with torch.device("meta"):
            module = build(BackboneConfig(name, width=512), 112)
        assert len(module.body) == {"ir18": 8, "ir34": 16, "ir50": 24, "ir101": 49}[name]
    module = build(BackboneConfig("ir18", width=4), 32)
    module(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert set(backbones.names()) >= set(STAGES)
