"""Config files of InsightFace's arcface_torch in this project's terms. Options that it reads are taken over, or named with a reason; what
would train another network, loss or schedule stops the import."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dali_loaders.names import printable
from pipeline.interop.plain_config import read_config
from pipeline.interop.step_function import Steps, recognise

# What arcface_torch's training script fixes without an option: 112 x 112 images of all identities, DDP on GPUs, one schedule. The power is
# that of its script until April 2023, which the published results are of (their logs show it); `_choices` says so.
FIXED: dict[str, Any] = {
    "loss.scale": 64.0,
    "optimizer.clip": 5.0,
    "optimizer.schedule": "polynomial",
    "optimizer.power": 2.0,
    "data.image_size": 112,
    "data.min_images": 1,
    "engine.name": "ddp",
    "engine.device": "cuda",
}
MOMENTUM = 0.9  # its script's, whatever config.momentum says


def _vit(size: str, drop_path: float, mask_ratio: float, **options: Any) -> dict[str, Any]:
    return {"name": f"vit_{size}", "drop_path": drop_path, "mask_ratio": mask_ratio, "float32_attention": True, **options}


# Its script masks a tenth of the patches whatever part a network's name says, unless that is none.
MASKED = 0.1
NETWORKS: dict[str, dict[str, Any]] = {
    **{f"{prefix}{depth}": {"name": f"iresnet{depth}"} for prefix in ("r", "iresnet") for depth in (18, 34, 50, 100, 200)},
    "mbf": {"name": "mobilefacenet"},
    "mbf_large": {"name": "mobilefacenet_large"},
    "vit_t": _vit("t", 0.1, MASKED),
    "vit_t_dp005_mask0": _vit("t", 0.05, 0.0),
    "vit_s": _vit("s", 0.1, MASKED),
    "vit_s_dp005_mask_0": _vit("s", 0.05, 0.0),
    "vit_b": _vit("b", 0.1, MASKED, checkpoint_activations=True),
    "vit_b_dp005_mask_005": _vit("b", 0.05, MASKED, checkpoint_activations=True),
    "vit_l_dp005_mask_005": _vit("l", 0.05, MASKED, checkpoint_activations=True),
}
LOSSES = {"arcface": 0.5, "cosface": 0.4}  # of configs before margin_list, with their margins

# What arcface_torch's configs/base.py sets where a config file does not.
BASE: dict[str, Any] = {
    "margin_list": (1.0, 0.5, 0.0),
    "network": "r50",
    "embedding_size": 512,
    "sample_rate": 1.0,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "verbose": 2000,
    "frequent": 10,
    "gradient_acc": 1,
    "seed": 2048,
}

# Options that keep their value under another name.
RENAMED = {
    "embedding_size": "backbone.width",
    "sample_rate": "classifier.sample_rate",
    "optimizer": "optimizer.name",
    "lr": "optimizer.lr",
    "momentum": "optimizer.momentum",
    "weight_decay": "optimizer.weight_decay",
    "warmup_epoch": "optimizer.warmup_epochs",
    "num_epoch": "run.epochs",
    "gradient_acc": "run.accumulation",
    "frequent": "run.log_every",
    "seed": "run.seed",
}

# By import_config.
CHANGED = ("margin_list", "loss", "network", "batch_size", "rec", "val_targets", "verbose", "fp16", "decay_epoch", "lr_func")

KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(("batch_size", "gradient_acc", "embedding_size", "verbose", "frequent", "seed"), (int, "a whole number")),
    **dict.fromkeys(("lr", "momentum", "weight_decay", "sample_rate", "num_epoch", "warmup_epoch"), ((int, float), "a number")),
    **dict.fromkeys(("network", "optimizer"), (str, "a text")),
    "rec": ((str, type(None)), "a text"),
    "val_targets": ((list, tuple), "a list"),
}

LOGGING = ("suffix_run_name", "notes", "save_artifacts")
NO_COUNTERPART = {
    "num_classes": "the identities are counted in the data",
    "num_image": "the images are counted in the data",
    "resume": "say `--resume auto` on the command line",
    "output": "the folder of the run is --out of the import",
    "save_all_states": "checkpoints always hold everything a run needs to go on",
    "dali": "images are always decoded with DALI",
    "dali_aug": "set the augmentations you want under data.augment",
    "num_workers": "DALI's threads are chosen automatically (data.threads)",
    "interclass_filtering_threshold": "its script sets non-target cosines above it to 0; here they count",
}
NEEDLESS = ("output", "dali_aug", "interclass_filtering_threshold")  # nothing is lost where they are off
LR_BATCH = 512  # images per step that lr is meant for in scripts before 2022, which scale it by their own
FEWEST = 1e-9  # for a sample_rate of 0, which classifier.sample_rate cannot be: one class of a thousand million


@dataclass(frozen=True)
class ImportedConfig:
    """What a config file says.

    fields: value by dotted name of this project's configuration.
    unmapped: "option: reason" for everything that is not taken over.
    chosen: what was decided where the file, or arcface_torch's versions, leave a choice, and how to decide otherwise.
    num_classes: of the run, where the file says it.
    """

    fields: dict[str, Any]
    unmapped: list[str]
    chosen: list[str]
    num_classes: int | None = None


def import_config(path: str | Path, ranks: int = 8) -> ImportedConfig:
    """An arcface_torch config file, option by option; `ranks` is the number of GPUs it was meant for, since its batch size is per GPU.

    Raises ValueError for an option that is needed and cannot be read, for a value of the wrong kind, and for a network, loss, optimizer or
    schedule that does not exist here.
    """
    given = read_config(path)
    options = BASE | {name: given[name] for name in KINDS if name in given}
    for name, (kind, words) in KINDS.items():
        if name in options and not isinstance(options[name], kind):
            raise ValueError(f"{path} sets config.{name} to {options[name]!r}, but it must be {words}.")
    for name, known in (("network", NETWORKS), ("optimizer", ("sgd", "adamw"))):
        if options[name] not in known:
            raise ValueError(
                f"{path} sets config.{name} to {options[name]!r}, which does not exist here: choose one of {', '.join(known)}."
            )
    steps = _steps(given, path)
    optional = dict(given)  # does not stop at what cannot be read
    lost = [name for name in given if name not in RENAMED and name not in CHANGED and (name not in NEEDLESS or optional[name])]
    unmapped = [f"{printable(str(name))}: {_reason(str(name))}" for name in lost]
    fields = FIXED | {dotted: options[name] for name, dotted in RENAMED.items() if name in options}
    fields |= {f"backbone.{name}": value for name, value in NETWORKS[options["network"]].items()}
    fields["run.batch"] = options["batch_size"] * ranks * options["gradient_acc"]
    fields["optimizer.warmup_epochs"] = max(0, options.get("warmup_epoch", 0))
    fields["optimizer.classifier"] = options["optimizer"]  # one for both there
    if steps and steps.epochs:
        fields |= {"optimizer.schedule": "steps", "optimizer.step_epochs": steps.epochs, "optimizer.step_factor": steps.factor}
    elif steps:
        fields["optimizer.power"] = 0.0  # the rate stays
    if steps:
        fields["optimizer.lr"] = options["lr"] / LR_BATCH * options["batch_size"] * ranks
    fields["classifier.sample_rate"] = options["sample_rate"] or FEWEST

    loss, margins, remarks = _margin(given, path)
    fields |= {"loss.name": loss, **{f"loss.{field}": value for field, value in margins.items()}}
    unmapped += remarks

    folder = options.get("rec")
    if folder == "synthetic":
        unmapped.append("rec: 'synthetic' data does not exist here; make some with `protoshard data faces`")
    elif folder:
        records = os.path.join(folder, "train.rec")
        # Without records its script reads a folder of identities.
        fields["data.train"] = folder if os.path.isdir(folder) and not os.path.exists(records) else records
        fields["evaluation.pairs"] = tuple(os.path.join(folder, f"{name}.bin") for name in options.get("val_targets", ()))
    images = optional.get("num_image")
    if isinstance(images, int) and images > 0:  # arcface_torch counts micro-batches between evaluations, this project epochs
        fields["evaluation.every_epochs"] = round(options["verbose"] * options["batch_size"] * ranks / images, 3)
    elif "verbose" in given:
        unmapped.append("verbose: without num_image it cannot be told in epochs; set evaluation.every_epochs")
    fp16 = bool(given.get("fp16", False))
    fields["engine.precision"], fields["classifier.dtype"] = ("auto", "bfloat16") if fp16 else ("float32", "float32")
    num_classes = optional.get("num_classes")
    return ImportedConfig(fields, unmapped, _choices(options, loss, fp16, steps), num_classes if isinstance(num_classes, int) else None)


def _steps(given: Mapping[str, Any], path: str | Path) -> Steps | None:
    """The schedule of scripts before 2022; None for the later ones, which is that of FIXED."""
    if "decay_epoch" in given:
        epochs = given["decay_epoch"]
        if not isinstance(epochs, list | tuple) or not all(isinstance(epoch, int | float) for epoch in epochs):
            raise ValueError(f"{path} sets config.decay_epoch to {epochs!r}, but it must be a list of epochs.")
        return Steps(tuple(epochs))
    if "lr_func" not in given:
        return None
    steps = recognise(given["lr_func"])
    if steps is None:
        raise ValueError(
            f"{path} sets config.lr_func to a schedule of its own, which does not exist here: without it, the rate falls as a polynomial."
        )
    return steps


def _reason(name: str) -> str:
    logged = "wandb" in name or name in LOGGING
    return NO_COUNTERPART.get(name, "logging goes to TensorBoard and metrics.jsonl" if logged else "there is no such option here")


def _choices(options: Mapping[str, Any], loss: str, fp16: bool, steps: Steps | None) -> list[str]:
    if fp16:
        precision = (
            "fp16 becomes bfloat16, which needs no loss scaling, in the backbone where the hardware has it (engine.precision=auto) and in "
            "the classifier's products (classifier.dtype=bfloat16), which arcface_torch computes in float32 since April 2023, in float16 "
            "before"
        )
    else:
        precision = "float32 in backbone and classifier, as without fp16"
    chosen = [
        f"precision: {precision}",
        _schedule(steps),
        "device: GPUs with DDP, as its script; without a GPU, --set engine.device=cpu",
    ]
    if loss == "arcface":
        chosen.append(
            "slope: ArcFace's exact derivative, as in its published runs; its script replaces it by 1 since December 2022, which is --set "
            "loss.slope=straight_through"
        )
    if options["gradient_acc"] > 1:
        chosen.append(
            f"gradient_acc: gradients of {options['gradient_acc']} micro-batches are averaged; its script adds them up, which with SGD is "
            f"{options['gradient_acc']} times this optimizer.lr"
        )
    if options["momentum"] != MOMENTUM:
        chosen.append(f"momentum: {options['momentum']}, as written; its script takes {MOMENTUM} whatever is written")
    if options["sample_rate"] == 0:
        chosen.append(f"sample_rate: 0, the classes of the batch alone, becomes {FEWEST}, which adds none")
    if options["network"].startswith("vit"):
        chosen.append(
            "network: products between tokens are in float32, as in its script; --set backbone.float32_attention=false is faster"
            + ("" if fp16 else ". Its script computes blocks in float16 even without fp16")
        )
    if "mask_005" in options["network"]:
        chosen.append(f"mask_ratio: {MASKED}, which its script takes, not the 0.05 of the network's name")
    if "num_epoch" not in options:
        chosen.append("num_epoch: not set there, so run.epochs is what this project has by default")
    return chosen


def _schedule(steps: Steps | None) -> str:
    if steps is None:
        return (
            "schedule: the rate decays with power 2, as in arcface_torch's published runs; its script has power 1 since April 2023, which "
            "is --set optimizer.power=1"
        )
    warmup = ". It warms up linearly here, with the square of the epoch there" if steps.warmup else ""
    return f"schedule: in steps, and lr is scaled by the batch of a step over {LR_BATCH}, as in scripts before 2022{warmup}"


def _margin(given: Mapping[str, Any], path: str | Path) -> tuple[str, dict[str, float], list[str]]:
    """Loss name, its margins, and a remark where arcface_torch's own code does not do what the config says."""
    if "loss" in given and "margin_list" not in given:  # before margin_list existed
        loss = str(given["loss"]).lower()
        if loss not in LOSSES:
            raise ValueError(
                f"{path} sets config.loss to {given['loss']!r}, which arcface_torch does not have: set margin_list instead, and choose the "
                "loss when you train, with --set loss=NAME."
            )
        return loss, {"margin": LOSSES[loss]}, []
    margins = given.get("margin_list", BASE["margin_list"])
    if not (isinstance(margins, list | tuple) and len(margins) == 3 and all(isinstance(margin, int | float) for margin in margins)):
        raise ValueError(f"{path} sets config.margin_list to {margins!r}, but it must be three numbers, as in (1.0, 0.5, 0.0) for ArcFace.")
    m1, m2, m3 = margins
    remarks = ["loss: arcface_torch takes margin_list, where there is one"] if "loss" in given else []
    if (m1, m3) == (1.0, 0.0):
        return "arcface", {"margin": m2}, remarks
    if (m1, m2) == (1.0, 0.0):
        return "cosface", {"margin": m3}, remarks
    # losses.CombinedMarginLoss of arcface_torch is CosFace whenever m3 > 0, ArcFace if m1 = 1 and m3 = 0, else an exception.
    theirs = f"trains with {m3} alone, which is --set loss=cosface loss.margin={m3}" if m3 > 0 else "refuses them"
    remark = f"margin_list: {(m1, m2, m3)} are all used, cos({m1} angle + {m2}) - {m3}; arcface_torch's own code {theirs}"
    return "combined", {"angle_factor": m1, "angle_margin": m2, "margin": m3}, [*remarks, remark]
