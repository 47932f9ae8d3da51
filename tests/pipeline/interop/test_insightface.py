"""Configs of arcface_torch and of its forks, made up here in their form."""

import pytest

from partial_fc.losses.margins import ArcFace, Combined, CosFace
from pipeline.interop.insightface import ImportedConfig, import_config
from pipeline.interop.recipe_file import recipe_source
from pipeline.resolve import resolve
from tests.pipeline.interop.official_configs import PAGE, import_all, page_with_table

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
    imported = import_config(write(tmp_path, f"config = edict(num_epoch=20)\n{lines}\n"))
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
        ("config.loss = 'ArcFace'", ArcFace(64.0, 0.5), 0),
        ("config.loss = 'adaface'\nconfig.margin_list = (1.0, 0.0, 0.3)", CosFace(64.0, 0.3), 1),
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


def test_adamw_moves_the_classifier_too(tmp_path):
    imported = import_config(write(tmp_path, "config = edict(optimizer='adamw', rec='synthetic', warmup_epoch=-1)\n"))
    assert "data.train" not in imported.fields
    recipe = tmp_path / "imported.py"
    recipe.write_text(recipe_source(imported, "vit.py"))
    config = resolve(str(recipe))
    assert (config.optimizer.name, config.optimizer.classifier, config.optimizer.warmup_epochs) == ("adamw", "adamw", 0)
    assert [line.partition(":")[0] for line in imported.unmapped] == ["rec"]


@pytest.mark.parametrize(
    ("network", "fields"),
    [
        ("r200", {"name": "iresnet200"}),
        ("iresnet50", {"name": "iresnet50"}),  # its name before 2021
        ("mbf", {"name": "mobilefacenet"}),
        ("mbf_large", {"name": "mobilefacenet_large"}),
        ("vit_t_dp005_mask0", {"name": "vit_t", "drop_path": 0.05, "mask_ratio": 0.0, "float32_attention": True}),
        ("vit_s", {"name": "vit_s", "drop_path": 0.1, "mask_ratio": 0.1, "float32_attention": True}),
        (
            "vit_b_dp005_mask_005",
            {"name": "vit_b", "drop_path": 0.05, "mask_ratio": 0.1, "float32_attention": True, "checkpoint_activations": True},
        ),
    ],
)
def test_networks_are_those_that_are_named(tmp_path, network, fields):
    imported = import_config(write(tmp_path, f"config = edict(network={network!r})\n"))
    assert {name.removeprefix("backbone."): value for name, value in imported.fields.items() if name.startswith("backbone.")} == fields | {
        "width": 512
    }
    recipe = tmp_path / "imported.py"
    recipe.write_text(recipe_source(imported, "a.py"))
    assert resolve(str(recipe)).backbone.name == fields["name"]
    assert ("mask_ratio: 0.1, which its script takes, not the 0.05 of the network's name" in imported.chosen) == ("mask_005" in network)


STEPS = "((epoch + 1) / (4 + 1)) ** 2 if epoch < config.warmup_epoch else 0.1 ** len([m for m in [8, 14] if m - 1 <= epoch])"


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("config.network = 'vit_h'", r"wf42m\.py sets config\.network to 'vit_h', which does not exist here: choose one of r18, r34, "),
        ("config.network = 'ir_101'", "sets config.network to 'ir_101', which does not exist here"),
        ("config.optimizer = 'lamb'", "sets config.optimizer to 'lamb', which does not exist here: choose one of sgd, adamw"),
        ("config.loss = 'adaface'", "sets config.loss to 'adaface', which arcface_torch does not have: set margin_list"),
        ("config.decay_epoch = 16", "sets config.decay_epoch to 16, but it must be a list of epochs"),
        ("config.lr_func = lambda e: 0.98 ** e", "a schedule of its own, which does not exist here"),
        ("config.lr = lr_of_the_day()", r"config\.lr is needed, but .*wf42m\.py:3: cannot read `lr_of_the_day\(\)` without running it"),
    ],
)
def test_what_would_train_otherwise_stops_the_import(tmp_path, lines, sentence):
    with pytest.raises(ValueError, match=sentence):
        import_config(write(tmp_path, f"config = edict()\nconfig.warmup_epoch = -1\n{lines}\n"))


@pytest.mark.parametrize(
    ("lines", "epochs"),
    [
        ("config.decay_epoch = [10, 16]", (10, 16)),
        (f"def f(epoch):\n    return {STEPS}\nconfig.lr_func = f", (7, 13)),
        ("config.lr_func = lambda e: 0.1 ** len([k for k in [2, 4] if k <= e])", (2, 4)),
        ("config.decay_epoch = []", ()),
    ],
)
def test_schedules_in_steps_and_the_rate_that_came_with_them(tmp_path, lines, epochs):
    said, config = chosen(tmp_path, f"config.lr = 0.1\nconfig.batch_size = 32\nconfig.warmup_epoch = -1\n{lines}")
    optimizer = config.optimizer
    assert optimizer.lr == pytest.approx(0.05)  # half of it: 8 GPUs x 32 images, where it was meant for 512
    assert (optimizer.schedule, optimizer.step_epochs, optimizer.step_factor) == ("steps" if epochs else "polynomial", epochs, 0.1)
    assert optimizer.power == (2.0 if epochs else 0.0)
    assert said["schedule"] == "in steps, and lr is scaled by the batch of a step over 512, as in scripts before 2022"


def test_options_that_nobody_needs_do_not_stop_the_import(tmp_path):
    lines = "config.output = f'{now()}'\nconfig.wandb_key = os.environ['NONE']\nconfig.num_image = 'forget'\nconfig['lr'] = 0.3\n"
    imported = import_config(write(tmp_path, f"import os\nconfig = edict()\n{lines}config.verbose = 1\nconfig.notes = unknown\n"))
    assert imported.fields["optimizer.lr"] == 0.3
    assert "evaluation.every_epochs" not in imported.fields
    assert "verbose: without num_image it cannot be told in epochs; set evaluation.every_epochs" in imported.unmapped
    assert "notes: logging goes to TensorBoard and metrics.jsonl" in imported.unmapped
    assert any(line.startswith("num_epoch: not set there") for line in imported.chosen)


def test_a_folder_of_identities_is_read_as_such(tmp_path):
    (tmp_path / "faces").mkdir()
    line = f"config.rec = {str(tmp_path / 'faces')!r}"
    assert import_config(write(tmp_path, f"config = edict()\n{line}\n")).fields["data.train"] == str(tmp_path / "faces")
    (tmp_path / "faces" / "train.rec").touch()
    assert import_config(write(tmp_path, f"config = edict()\n{line}\n")).fields["data.train"] == str(tmp_path / "faces" / "train.rec")


def test_the_classes_of_the_batch_alone(tmp_path):
    imported = import_config(write(tmp_path, "config = edict(sample_rate=0)\n"))
    assert 0 < imported.fields["classifier.sample_rate"] < 1e-6
    assert any(line.startswith("sample_rate: 0, the classes of the batch alone") for line in imported.chosen)


def test_all_official_configs_and_the_page_that_lists_them():
    found = import_all()
    assert len(found) == 43
    stopped = {name: result for name, result in found.items() if isinstance(result, str)}
    assert list(stopped) == ["wf42m_pfc02_vit_h"] and "'vit_h', which does not exist here" in stopped["wf42m_pfc02_vit_h"]
    assert found["wf42m_pfc03_32gpu_r200"].fields["backbone.name"] == "iresnet200"
    page = PAGE.read_text()
    assert page_with_table(page) == page, "run python -m tests.pipeline.interop.official_configs"


@pytest.mark.parametrize(
    "setting",
    [
        "batch_size = '64'",
        "lr = None",
        "margin_list = 0.5",
        "network = 50",
        "margin_list = (1.0, 0.5)",
        "margin_list = (1.0, 'a', 0.0)",
        "rec = 3",
    ],
)
def test_values_of_the_wrong_kind(tmp_path, setting):
    with pytest.raises(ValueError, match=rf"config\.{setting.split()[0]} to .*must be"):
        import_config(write(tmp_path, f"config = edict()\nconfig.{setting}\n"))


def test_recipe_source_gives_the_configuration_back(tmp_path):
    path = tmp_path / "imported.py"
    path.write_text(recipe_source(import_config(write(tmp_path, CONFIG)), "wf42m.py"))
    config = resolve(str(path))
    assert (config.run.batch, config.backbone.name, config.loss.margin) == (512, "iresnet100", 0.4)
    assert config.data.train == "/train_tmp/WebFace42M/train.rec"
    lines = path.read_text().splitlines()
    assert config.run.folder == str(tmp_path)  # wherever the folder is moved to
    assert "from dali_loaders.config import DataConfig" in lines and "from pipeline.config import RunConfig, TrainConfig" in lines


def test_recipe_source_is_python_whatever_the_values():
    source = recipe_source(ImportedConfig({"loss.name": "cosface", "data.train": "a\"\\'b"}, ['odd: """ \\'], ['choice: """']), 'c"""d.py')
    compile(source, "recipe", "exec")
