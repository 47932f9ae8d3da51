"""Configs, backbone weights and classifier files of arcface_torch, made up here in its formats."""

import pytest
import torch

from partial_fc.losses.margins import ArcFace, Combined, CosFace
from pipeline.backbones import BackboneConfig, build
from pipeline.interop.insightface import ImportedConfig, import_config, load_backbone, merge_classifier, recipe_source
from pipeline.resolve import resolve

CONFIG = """
from easydict import EasyDict as edict
config = edict()
config.margin_list = (1.0, 0.0, 0.4)
config.network = "r100"
config.resume = False
config.output = None
config.embedding_size = 256
config.sample_rate = 0.2
config.fp16 = True
config.momentum = 0.9
config.weight_decay = 1e-4
config.batch_size = 64
config.lr = 0.2
config.verbose = 10000
config.dali = True
config.rec = "/train_tmp/WebFace42M"
config.num_classes = 2059906
config.num_image = 42474557
config.num_epoch = 20
config.warmup_epoch = config.num_epoch // 10
config.val_targets = ['lfw', "agedb_30"]
config.using_wandb = True
config.head_dim = 3
"""


def write(tmp_path, text):
    path = tmp_path / "wf42m.py"
    path.write_text(text)
    return path


def test_config_field_by_field(tmp_path):
    imported = import_config(write(tmp_path, CONFIG), ranks=16)
    assert imported.fields == {
        "backbone.name": "iresnet100",
        "backbone.width": 256,
        "data.image_size": 112,
        "data.min_images": 1,
        "data.train": "/train_tmp/WebFace42M/train.rec",
        "classifier.dtype": "bfloat16",
        "classifier.sample_rate": 0.2,
        "engine.device": "cuda",
        "engine.name": "ddp",
        "engine.precision": "auto",
        "evaluation.every_epochs": 0.241,  # 10,000 steps of 1,024 images
        "evaluation.pairs": ("/train_tmp/WebFace42M/lfw.bin", "/train_tmp/WebFace42M/agedb_30.bin"),
        "loss.margin": 0.4,
        "loss.name": "cosface",
        "loss.scale": 64.0,
        "optimizer.clip": 5.0,
        "optimizer.lr": 0.2,
        "optimizer.momentum": 0.9,
        "optimizer.name": "sgd",
        "optimizer.classifier": "sgd",
        "optimizer.power": 2.0,
        "optimizer.schedule": "polynomial",
        "optimizer.warmup_epochs": 2,
        "optimizer.weight_decay": 1e-4,
        "run.accumulation": 1,
        "run.batch": 1024,
        "run.epochs": 20,
        "run.log_every": 10,
        "run.seed": 2048,
    }


def test_whatever_is_not_taken_over_is_named(tmp_path):
    unmapped = import_config(write(tmp_path, CONFIG)).unmapped
    named = {line.partition(":")[0] for line in unmapped}
    assert named == {"resume", "dali", "num_classes", "num_image", "using_wandb", "head_dim"}
    assert "head_dim: there is no such option here" in unmapped


def chosen(tmp_path, lines):
    """What is chosen, by its first word."""
    imported = import_config(write(tmp_path, f"config = edict()\n{lines}\n"))
    recipe = tmp_path / "imported.py"
    recipe.write_text(recipe_source(imported, "wf42m.py"))
    assert all(line in recipe.read_text() for line in imported.chosen)  # for whoever reads the recipe later
    return dict(line.split(": ", 1) for line in imported.chosen), resolve(str(recipe))


def test_precision_follows_fp16_and_is_said(tmp_path):
    said, config = chosen(tmp_path, "config.fp16 = True")
    assert (config.engine.precision, config.classifier.dtype) == ("auto", "bfloat16")
    assert "engine.precision=auto" in said["precision"] and "classifier.dtype=bfloat16" in said["precision"]
    for lines in ("", "config.fp16 = False"):
        said, config = chosen(tmp_path, lines)
        assert (config.engine.precision, config.classifier.dtype) == ("float32", "float32")
        assert said["precision"] == "float32 in backbone and classifier, as without fp16"


def test_choices_between_versions_of_arcface_torch_are_said(tmp_path):
    said, config = chosen(tmp_path, "config.margin_list = (1.0, 0.5, 0.0)")
    assert config.optimizer.power == 2 and "--set optimizer.power=1" in said["schedule"]
    assert config.loss.slope == "exact" and "--set loss.slope=straight_through" in said["slope"]
    assert config.engine.device == "cuda" and "--set engine.device=cpu" in said["device"]
    assert said.keys() == {"precision", "schedule", "slope", "device"}
    said, _ = chosen(tmp_path, "config.margin_list = (1.0, 0.0, 0.4)\nconfig.gradient_acc = 12\nconfig.momentum = 0.8")
    assert said["gradient_acc"].endswith("12 times this optimizer.lr")
    assert said["momentum"] == "0.8, as written; its script takes 0.9 whatever is written"
    assert "slope" not in said


@pytest.mark.parametrize(
    ("lines", "loss", "remarks"),
    [
        ("", ArcFace(64.0, 0.5), 0),
        ("config.margin_list = [1.0, 0.3, 0.0]", ArcFace(64.0, 0.3), 0),
        ("config.margin_list = (1.0, 0.0, 0.35)", CosFace(64.0, 0.35), 0),
        ("config.margin_list = (1.0, 0.3, 0.2)", Combined(64.0, 1.0, 0.3, 0.2), 1),
        ("config.margin_list = (0.9, 0.4, 0.15)", Combined(64.0, 0.9, 0.4, 0.15), 1),
        ("config.margin_list = (1.35, 0.0, 0.0)", Combined(64.0, 1.35, 0.0, 0.0), 1),
        ("config.loss = 'cosface'", CosFace(64.0, 0.4), 0),
        ("config.loss = 'adaface'", ArcFace(64.0, 0.5), 1),
    ],
)
def test_margins(tmp_path, lines, loss, remarks):
    imported = import_config(write(tmp_path, f"config = edict()\n{lines}\n"))
    assert len(imported.unmapped) == remarks
    recipe = tmp_path / "imported.py"
    recipe.write_text(recipe_source(imported, "wf42m.py"))
    assert resolve(str(recipe)).loss == loss


def test_what_arcface_torch_makes_of_combined_margins_is_said(tmp_path):
    for margins, words in (("(0.9, 0.4, 0.15)", "trains with 0.15 alone"), ("(0.9, 0.4, 0.0)", "refuses them")):
        assert words in import_config(write(tmp_path, f"config = edict()\nconfig.margin_list = {margins}\n")).unmapped[0]


def test_adamw_moves_the_classifier_too_and_a_network_without_counterpart_is_refused(tmp_path):
    imported = import_config(write(tmp_path, "config = edict(network='vit_l', optimizer='adamw', rec='synthetic', warmup_epoch=-1)\n"))
    assert "data.train" not in imported.fields
    recipe = tmp_path / "imported.py"
    recipe.write_text(recipe_source(imported, "vit.py"))
    with pytest.raises(ValueError, match="there is no backbone named 'vit_l'"):  # rather than another one in its place
        resolve(str(recipe))
    config = resolve(str(recipe), ["backbone.name=iresnet100"])
    assert config.backbone.name == "iresnet100"
    assert (config.optimizer.name, config.optimizer.classifier, config.optimizer.warmup_epochs) == ("adamw", "adamw", 0)
    assert [line.partition(":")[0] for line in imported.unmapped] == ["network", "rec"]


@pytest.mark.parametrize("setting", ["batch_size = '64'", "lr = None", "margin_list = 0.5", "network = 50", "margin_list = (1.0, 0.5)"])
def test_values_of_the_wrong_kind(tmp_path, setting):
    with pytest.raises(ValueError, match=rf"config\.{setting.split()[0]} .*must be"):
        import_config(write(tmp_path, f"config = edict()\nconfig.{setting}\n"))


def test_recipe_source_gives_the_configuration_back(tmp_path):
    path = tmp_path / "imported.py"
    path.write_text(recipe_source(import_config(write(tmp_path, CONFIG)), "wf42m.py"))
    config = resolve(str(path))
    assert (config.run.batch, config.backbone.name, config.loss.margin) == (512, "iresnet100", 0.4)
    assert config.data.train == "/train_tmp/WebFace42M/train.rec"
    lines = path.read_text().splitlines()
    assert "from dali_loaders.config import DataConfig" in lines and "from pipeline.config import RunConfig, TrainConfig" in lines


def test_recipe_source_is_python_whatever_the_values():
    source = recipe_source(ImportedConfig({"loss.name": "cosface", "data.train": "a\"\\'b"}, ['odd: """ \\'], ['choice: """']), 'c"""d.py')
    compile(source, "recipe", "exec")


@pytest.fixture(scope="module")
def weights():
    return build(BackboneConfig("iresnet18", width=16), 32).state_dict()


def save(tmp_path, content, name="model.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {f"module.{name}": tensor for name, tensor in w.items()},
        lambda w: {"epoch": 3, "global_step": 7, "state_dict_backbone": w, "state_dict_softmax_fc": {"weight": torch.zeros(2, 16)}},
        lambda w: {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in w.items()},
    ],
    ids=["plain", "module", "checkpoint", "half"],
)
def test_backbone_weights_load(tmp_path, weights, wrap):
    loaded = load_backbone(save(tmp_path, wrap(weights)), "r18", width=16, image_size=32)
    assert list(loaded) == list(weights)
    assert all(loaded[name].dtype == weights[name].dtype for name in weights)
    torch.testing.assert_close(loaded["fc.weight"], weights["fc.weight"], atol=1e-3, rtol=1e-3)
    build(BackboneConfig("iresnet18", width=16), 32).load_state_dict(loaded)


def test_backbone_mismatch_names_the_parameter(tmp_path, weights):
    with pytest.raises(ValueError, match=r"fc.weight in .*model.pt is \(16, 2048\), but r18 of width 32 expects \(32, 2048\)"):
        load_backbone(save(tmp_path, weights), "r18", width=32, image_size=32)
    with pytest.raises(ValueError, match=r"has no parameter layer1.2.bn1.weight, which r34 needs with the shape \(64,\)"):
        load_backbone(save(tmp_path, weights), "r34", width=16, image_size=32)
    with pytest.raises(ValueError, match=r"has a parameter extra that r18 lacks"):
        load_backbone(save(tmp_path, {**weights, "extra": torch.zeros(1)}), "r18", width=16, image_size=32)
    with pytest.raises(ValueError, match="did you mean 'iresnet50'"):
        load_backbone(save(tmp_path, weights), "resnet50")


class NotPlain:
    pass


def test_files_that_hold_no_weights(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    for path, words in [
        (tmp_path / "missing.pt", "cannot read"),
        (tmp_path / "text.pt", "not a file of weights"),
        (save(tmp_path, {"a": NotPlain()}, "object.pt"), "more than weights"),
        (save(tmp_path, [1]), "holds a list"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_backbone(path, "r18")


def split(weight, ranks):
    sizes = [len(weight) // ranks + (rank < len(weight) % ranks) for rank in range(ranks)]
    return [{"state_dict_softmax_fc": {"weight": part.clone()}} for part in weight.split(sizes)]


@pytest.mark.parametrize("ranks", [1, 3, 4, 12])
def test_classifier_files_merge_in_rank_order(tmp_path, ranks):
    weight = torch.randn(26, 4)
    files = [save(tmp_path, part, f"checkpoint_gpu_{rank}.pt") for rank, part in enumerate(split(weight, ranks))]
    torch.testing.assert_close(merge_classifier(sorted(map(str, files))), weight, rtol=0, atol=0)
    torch.testing.assert_close(merge_classifier(split(weight, ranks), num_classes=26), weight, rtol=0, atol=0)


def test_classifier_mismatch_is_named(tmp_path):
    parts = split(torch.randn(10, 4), 4)
    with pytest.raises(ValueError, match=r"classifier of rank 0 is \(2, 4\), but \(3, 4\) is its part of 7 classes"):
        merge_classifier([parts[2], parts[1], parts[3]])
    with pytest.raises(ValueError, match=r"3 classifier files hold 8 classes together, but 10 are expected"):
        merge_classifier(parts[:3], num_classes=10)
    with pytest.raises(ValueError, match=r"rank 1 is \(5, 3\), but \(5, 4\)"):
        merge_classifier([{"weight": torch.zeros(5, 4)}, {"weight": torch.zeros(5, 3)}])
    with pytest.raises(ValueError, match="the given state dict holds no classifier"):
        merge_classifier([{"state_dict_backbone": {}}])
    with pytest.raises(ValueError, match="no classifier file"):
        merge_classifier([])
    files = [save(tmp_path, part, f"checkpoint_gpu_{rank}.pt") for rank, part in enumerate(parts)]
    with pytest.raises(ValueError, match=r"checkpoint_gpu_1\.pt is missing"):
        merge_classifier([files[0], files[2]])
