"""The GPU recipes against what arcface_torch's config files, its script of 2022 and its README say, field by field."""

from __future__ import annotations

import os
from dataclasses import asdict

import pytest

from dali_loaders.config import AugmentConfig
from pipeline.backbones import BackboneConfig
from pipeline.config import as_dict
from pipeline.interop import insightface
from pipeline.recipes import RECIPES
from pipeline.resolve import resolve

# Read from configs/NAME.py, and from configs/base.py where that sets nothing (optimizer, momentum); the images and identities of a set are
# counted in our data, so num_image only turns steps into epochs.
OFFICIAL = {
    "ms1mv3_iresnet50_arcface_8gpu": {
        "config": "ms1mv3_r50",
        "gpus": 8,
        "published": "MFR-ALL 79.14, IJB-C 96.37",
        "options": {
            "margin_list": (1.0, 0.5, 0.0), "network": "r50", "embedding_size": 512, "sample_rate": 1.0, "fp16": True, "momentum": 0.9,
            "weight_decay": 5e-4, "batch_size": 128, "lr": 0.1, "verbose": 2000, "num_classes": 93431, "num_image": 5179510,
            "num_epoch": 20, "warmup_epoch": 0, "val_targets": ["lfw", "cfp_fp", "agedb_30"],
        },
    },
    "glint360k_iresnet100_cosface_8gpu": {
        "config": "glint360k_r100",
        "gpus": 8,
        "published": "MFR-ALL 89.52, IJB-C 97.55",
        "options": {
            "margin_list": (1.0, 0.0, 0.4), "network": "r100", "embedding_size": 512, "sample_rate": 1.0, "fp16": True, "momentum": 0.9,
            "weight_decay": 1e-4, "batch_size": 128, "lr": 0.1, "verbose": 2000, "num_classes": 360232, "num_image": 17091657,
            "num_epoch": 20, "warmup_epoch": 0, "val_targets": ["lfw", "cfp_fp", "agedb_30"],
        },
    },
    "ms1mv3_mobilefacenet_arcface_8gpu": {
        "config": "ms1mv3_mbf",
        "gpus": 8,
        "published": "MFR-ALL 63.78, IJB-C 94.23",
        "options": {
            "margin_list": (1.0, 0.5, 0.0), "network": "mbf", "embedding_size": 512, "sample_rate": 1.0, "fp16": True, "momentum": 0.9,
            "weight_decay": 1e-4, "batch_size": 128, "lr": 0.1, "verbose": 2000, "num_classes": 93431, "num_image": 5179510,
            "num_epoch": 40, "warmup_epoch": 0, "val_targets": ["lfw", "cfp_fp", "agedb_30"],
        },
    },
    "glint360k_mobilefacenet_cosface_8gpu": {
        "config": "glint360k_mbf",
        "gpus": 8,
        "published": "MFR-ALL 70.18, IJB-C 95.04",
        "options": {
            "margin_list": (1.0, 0.0, 0.4), "network": "mbf", "embedding_size": 512, "sample_rate": 1.0, "fp16": True, "momentum": 0.9,
            "weight_decay": 1e-4, "batch_size": 128, "lr": 0.1, "verbose": 2000, "num_classes": 360232, "num_image": 17091657,
            "num_epoch": 20, "warmup_epoch": 0, "val_targets": ["lfw", "cfp_fp", "agedb_30"],
        },
    },
    "webface42m_vit_t_64gpu": {
        "config": "wf42m_pfc03_40epoch_64gpu_vit_t",
        "gpus": 64,
        "published": "MFR-ALL 92.24, IJB-C 97.31",
        "options": {
            "margin_list": (1.0, 0.0, 0.4), "network": "vit_t_dp005_mask0", "embedding_size": 512, "sample_rate": 0.3, "fp16": True,
            "weight_decay": 0.1, "batch_size": 384, "optimizer": "adamw", "lr": 0.001, "verbose": 2000, "num_classes": 2059906,
            "num_image": 42474557, "num_epoch": 40, "warmup_epoch": 4, "val_targets": [],
        },
    },
    "webface42m_vit_b_64gpu": {
        "config": "wf42m_pfc03_40epoch_64gpu_vit_b",
        "gpus": 64,
        "published": "MFR-ALL 97.42, IJB-C 97.90",
        "options": {
            "margin_list": (1.0, 0.0, 0.4), "network": "vit_b_dp005_mask_005", "embedding_size": 512, "sample_rate": 0.3, "fp16": True,
            "weight_decay": 0.1, "batch_size": 384, "optimizer": "adamw", "lr": 0.001, "verbose": 2000, "num_classes": 2059906,
            "num_image": 42474557, "num_epoch": 40, "warmup_epoch": 4, "val_targets": [],
        },
    },
    "webface42m_iresnet100_cosface_32gpu": {
        "config": "wf42m_pfc02_r100_32gpus",
        "gpus": 32,
        "published": "MFR-ALL 96.57, IJB-C 97.83",
        "options": {
            "margin_list": (1.0, 0.0, 0.4), "network": "r100", "embedding_size": 512, "sample_rate": 0.2, "fp16": True, "momentum": 0.9,
            "weight_decay": 5e-4, "batch_size": 128, "lr": 0.4, "verbose": 10000, "num_classes": 2059906, "num_image": 42474557,
            "num_epoch": 20, "warmup_epoch": 2, "val_targets": ["lfw", "cfp_fp", "agedb_30"],
        },
    },
}  # fmt: skip

# What its script fixes without an option: scale, clipping, the polynomial's power (of 2022), no dropout, flips as the only augmentation,
# identities of one image admitted, one rate for backbone and classifier.
SCRIPT = {
    "loss.scale": 64.0,
    "optimizer.clip": 5.0,
    "optimizer.schedule": "polynomial",
    "optimizer.power": 2.0,
    "optimizer.classifier_lr": 0.0,
    "data.image_size": 112,
    "data.min_images": 1,
    "data.images_per_identity": 1,
    "data.augment": asdict(AugmentConfig.named("flip")),
    "run.accumulation": 1,
    "run.margin_warmup": 0.0,
    "evaluation.flip": True,
    "classifier.correct_rate": False,
    "classifier.hard_negatives": 0,
    "classifier.substitution_rate": 0.0,
}
# What its networks are here. The ViT's last number is not what they do: arcface_torch masks 0.1 wherever it is not 0. Their attention is in
# float32 whatever fp16 is, and the larger ones compute activations again.
NETWORKS = {
    "r50": {"name": "iresnet50"},
    "r100": {"name": "iresnet100"},
    "mbf": {"name": "mobilefacenet"},
    "vit_t_dp005_mask0": {"name": "vit_t", "drop_path": 0.05, "float32_attention": True},
    "vit_b_dp005_mask_005": {
        "name": "vit_b", "drop_path": 0.05, "mask_ratio": 0.1, "float32_attention": True, "checkpoint_activations": True,
    },
}  # fmt: skip


def value(config, dotted):
    part = as_dict(config)
    for name in dotted.split("."):
        part = part[name]
    return part


def test_every_recipe_of_the_faces_is_in_the_table():
    assert {name for name in RECIPES if name.endswith("gpu")} == set(OFFICIAL)


@pytest.mark.parametrize("name", OFFICIAL)
def test_recipe_has_the_official_settings(name):
    config, official = resolve(name), OFFICIAL[name]["options"]
    arcface, margin = official["margin_list"][2] == 0, max(official["margin_list"][1:])
    expected = SCRIPT | {
        "loss.name": "arcface" if arcface else "cosface",
        "loss.margin": margin,
        "backbone": {**asdict(BackboneConfig(**NETWORKS[official["network"]])), "width": official["embedding_size"]},
        "classifier.sample_rate": official["sample_rate"],
        "optimizer.name": official.get("optimizer", "sgd"),
        "optimizer.classifier": official.get("optimizer", "sgd"),  # one for both
        "optimizer.lr": official["lr"],
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": official["weight_decay"],
        "optimizer.warmup_epochs": official["warmup_epoch"],
        "run.batch": official["batch_size"] * OFFICIAL[name]["gpus"],
        "run.epochs": official["num_epoch"],
    }
    if arcface:
        expected["loss.slope"] = "exact"  # as in its script until December 2022
    assert {dotted: value(config, dotted) for dotted in expected} == expected
    assert [os.path.basename(path) for path in config.evaluation.pairs] == [f"{target}.bin" for target in official["val_targets"]]


@pytest.mark.parametrize("name", OFFICIAL)
def test_recipe_runs_on_gpus_with_the_kernel_for_them(name):
    config = resolve(name)
    assert (config.engine.name, config.engine.device, config.engine.precision) == ("ddp", "cuda", "auto")
    assert config.classifier.dtype == "bfloat16"  # the only dtype for which kernel "auto" takes Triton


@pytest.mark.parametrize("name", OFFICIAL)
def test_docstring_has_the_published_figures_of_that_config(name):
    text = " ".join((RECIPES[name].__doc__ or "").split())
    official = OFFICIAL[name]
    assert f"(configs/{official['config']}.py): {official['published']} at FAR 1e-4" in text
    assert f"{official['gpus']} x {official['options']['batch_size']} images" in text
    assert f"{official['options']['num_classes']:,} identities, {official['options']['num_image'] / 1e6:.1f}M images" in text


@pytest.mark.parametrize("name", [name for name, official in OFFICIAL.items() if official["options"]["network"] in insightface.NETWORKS])
def test_import_of_the_official_file_gives_the_recipe(name, tmp_path):
    """But for what the recipes do otherwise on purpose, and what is a matter of the machine."""
    path = tmp_path / "official.py"
    path.write_text("config = edict()\n" + "".join(f"config.{key} = {item!r}\n" for key, item in OFFICIAL[name]["options"].items()))
    imported, config = insightface.import_config(path, OFFICIAL[name]["gpus"]).fields, resolve(name)
    differing = {dotted for dotted, item in imported.items() if value(config, dotted) != item}
    assert differing <= {"run.log_every", "run.seed", "evaluation.every_epochs"}
