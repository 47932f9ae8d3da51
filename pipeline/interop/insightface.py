"""Coming from InsightFace's arcface_torch: its config files, backbone weights and per-rank classifier files, in this project's terms."""

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch

from pipeline import checkpoint
from pipeline.backbones import BackboneConfig, build
from pipeline.config import TrainConfig, as_dict
from pipeline.interop.plain_config import read_config
from pipeline.resolve import resolve

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
NETWORKS = {f"r{depth}": f"iresnet{depth}" for depth in (18, 34, 50, 100)}

# What arcface_torch's configs/base.py sets where a config file does not.
BASE: dict[str, Any] = {
    "margin_list": (1.0, 0.5, 0.0),
    "network": "r50",
    "output": None,
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
    "output": "run.folder",
}

CHANGED = ("margin_list", "loss", "network", "batch_size", "rec", "val_targets", "verbose", "fp16")  # by import_config

KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(("batch_size", "gradient_acc", "embedding_size", "verbose", "frequent", "seed", "num_image"), (int, "a whole number")),
    **dict.fromkeys(("lr", "momentum", "weight_decay", "sample_rate", "num_epoch", "warmup_epoch"), ((int, float), "a number")),
    **dict.fromkeys(("network", "optimizer"), (str, "a text")),
    **dict.fromkeys(("rec", "output", "loss"), ((str, type(None)), "a text")),
    **dict.fromkeys(("margin_list", "val_targets"), ((list, tuple), "a list")),
}

NO_COUNTERPART = {
    "num_classes": "the identities are counted in the data",
    "num_image": "the images are counted in the data",
    "resume": "say `--resume auto` on the command line",
    "save_all_states": "checkpoints always hold everything a run needs to go on",
    "dali": "images are always decoded with DALI",
    "dali_aug": "set the augmentations you want under data.augment",
    "num_workers": "DALI's threads are chosen automatically (data.threads)",
    "interclass_filtering_threshold": "non-target cosines are not filtered",
}


@dataclass(frozen=True)
class ImportedConfig:
    """What a config file says.

    fields: value by dotted name of this project's configuration.
    unmapped: "option: reason" for everything that is not taken over.
    chosen: what was decided where the file, or arcface_torch's versions, leave a choice, and how to decide otherwise.
    """

    fields: dict[str, Any]
    unmapped: list[str]
    chosen: list[str]


def import_config(path: str | Path, ranks: int = 8) -> ImportedConfig:
    """An arcface_torch config file, option by option; `ranks` is the number of GPUs it was meant for, since its batch size is per GPU.

    Raises ValueError, with file and line, for anything but assignments of plain values, and for a value of the wrong kind.
    """
    given = read_config(path)
    options = BASE | given
    for name, (kind, words) in KINDS.items():
        if name in options and not isinstance(options[name], kind):
            raise ValueError(f"{path} sets config.{name} to {options[name]!r}, but it must be {words}.")
    unmapped = [f"{name}: {_reason(name)}" for name in given if name not in RENAMED and name not in CHANGED]
    fields = FIXED | {dotted: options[name] for name, dotted in RENAMED.items() if options.get(name) is not None}
    fields["run.batch"] = options["batch_size"] * ranks * options["gradient_acc"]
    fields["optimizer.warmup_epochs"] = max(0, options.get("warmup_epoch", 0))
    fields["optimizer.classifier"] = options["optimizer"]  # one for both there
    fields["backbone.name"] = NETWORKS.get(options["network"], options["network"])  # an unknown one is refused by the run, not replaced
    if options["network"] not in NETWORKS:
        unmapped.append(f"network: {options['network']!r} does not exist here; choose another, as in --set backbone.name=iresnet100")

    name, margins, remarks = _margin(options)
    fields |= {"loss.name": name, **{f"loss.{field}": value for field, value in margins.items()}}
    unmapped += remarks

    folder = options.get("rec")
    if folder == "synthetic":
        unmapped.append("rec: 'synthetic' data does not exist here; make some with `protoshard data faces`")
    elif folder:
        fields["data.train"] = f"{folder.rstrip('/')}/train.rec"
        fields["evaluation.pairs"] = tuple(f"{folder.rstrip('/')}/{name}.bin" for name in options.get("val_targets", ()))
    if options.get("num_image"):  # arcface_torch counts micro-batches between evaluations, this project epochs
        fields["evaluation.every_epochs"] = round(options["verbose"] * options["batch_size"] * ranks / options["num_image"], 3)
    fields["engine.precision"], fields["classifier.dtype"] = ("auto", "bfloat16") if options.get("fp16") else ("float32", "float32")
    return ImportedConfig(fields, unmapped, _choices(options, name))


def recipe_source(imported: ImportedConfig, origin: str) -> str:
    """A recipe file (for `protoshard train FILE.py`) with the imported fields; its docstring says what of `origin` was not taken over, and
    what was chosen."""
    sections: dict[str, dict[str, Any]] = {}
    for dotted, value in imported.fields.items():
        section, _, name = dotted.partition(".")
        sections.setdefault(section, {})[name] = value
    loss_name = sections["loss"].pop("name")
    kinds = get_type_hints(TrainConfig)
    builders = {section: f"{kinds[section].__name__}(" for section in sections} | {"loss": f"losses.build({loss_name!r}, "}
    calls = [
        f"        {s}={builders[s]}{', '.join(f'{name}={value!r}' for name, value in part.items())}),\n" for s, part in sections.items()
    ]
    remarks, choices = ("".join(f"  {line}\n" for line in part) or "  nothing\n" for part in (imported.unmapped, imported.chosen))
    names = {"partial_fc": {"losses"}, TrainConfig.__module__: {"TrainConfig"}}
    for section in sections.keys() - {"loss"}:
        names.setdefault(kinds[section].__module__, set()).add(kinds[section].__name__)
    imports = "".join(f"from {module} import {', '.join(sorted(names[module]))}\n" for module in sorted(names))
    heading = f"Imported from {origin}. Not taken over:\n{remarks}Chosen:\n{choices}".replace("\\", "/").replace('"', "'")
    return f'"""{heading}"""\n\n{imports}\n\ndef recipe() -> TrainConfig:\n    return TrainConfig(\n{"".join(calls)}    )\n'


def load_backbone(path: str | Path, network: str, width: int = 512, image_size: int = 112) -> dict[str, torch.Tensor]:
    """The backbone's state dict in a model.pt or checkpoint_gpu_*.pt file, float32, fit for our IResNet's load_state_dict.

    `network` is arcface_torch's name ("r50") or ours. Raises ValueError naming the first parameter that is missing, unknown or misshapen.
    """
    with torch.device("meta"):
        expected = build(BackboneConfig(NETWORKS.get(network, network), width), image_size).state_dict()
    loaded = _load(path)
    loaded = loaded.get("state_dict_backbone", loaded)
    found = {name.removeprefix("module."): tensor for name, tensor in loaded.items()}
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(
                f"{path} has no parameter {name}, which {network} needs with the shape {tuple(tensor.shape)}: is it another network?"
            )
        shape = tuple(found[name].shape) if isinstance(found[name], torch.Tensor) else type(found[name]).__name__
        if shape != tuple(tensor.shape):
            raise ValueError(f"parameter {name} in {path} is {shape}, but {network} of width {width} expects {tuple(tensor.shape)}.")
    for name in found:
        if name not in expected:
            raise ValueError(f"{path} has a parameter {name} that {network} lacks: is it another network?")
    return {name: found[name].to(tensor.dtype) for name, tensor in expected.items()}


def merge_classifier(parts: Sequence[str | Path | Mapping[str, Any]], num_classes: int | None = None) -> torch.Tensor:
    """The prototypes [C, width], float32, of all ranks' checkpoint_gpu_{rank}.pt files, in any order, or of what they hold.

    Rank r of n holds C // n + (r < C % n) classes. Raises ValueError for a file without a classifier and where the rows do not fit
    together; only `num_classes` tells that the last ranks' files are missing.
    """
    if not parts:
        raise ValueError("there is no classifier file to merge: name all checkpoint_gpu_*.pt files of a run.")
    weights = [_classifier_rows(part) for part in _in_rank_order(parts)]
    rows, width = sum(len(weight) for weight in weights), weights[0].shape[1]
    if num_classes is not None and rows != num_classes:
        raise ValueError(
            f"the {len(parts)} classifier files hold {rows} classes together, but {num_classes} are expected: is a rank missing?"
        )
    for rank, weight in enumerate(weights):
        shape = (rows // len(parts) + (rank < rows % len(parts)), width)
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"the classifier of rank {rank} is {tuple(weight.shape)}, but {shape} is its part of {rows} classes: is a rank missing?"
            )
    return torch.cat(weights).float()


def _reason(name: str) -> str:
    return NO_COUNTERPART.get(name, "logging goes to TensorBoard and metrics.jsonl" if "wandb" in name else "there is no such option here")


def _choices(options: Mapping[str, Any], loss: str) -> list[str]:
    if options.get("fp16"):
        precision = (
            "fp16 becomes bfloat16, which needs no loss scaling, in the backbone where the hardware has it (engine.precision=auto) and in "
            "the classifier's products (classifier.dtype=bfloat16), which arcface_torch computes in float32 since April 2023, in float16 "
            "before"
        )
    else:
        precision = "float32 in backbone and classifier, as without fp16"
    chosen = [
        f"precision: {precision}",
        "schedule: the rate decays with power 2, as in arcface_torch's published runs; its script has power 1 since April 2023, which is "
        "--set optimizer.power=1",
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
    return chosen


def _margin(options: Mapping[str, Any]) -> tuple[str, dict[str, float], list[str]]:
    """Loss name, its margins, and a remark where arcface_torch's own code does not do what the config says."""
    if "loss" in options:  # before margin_list existed
        name = str(options["loss"]).lower()
        if name not in ("arcface", "cosface"):
            return "arcface", {"margin": 0.5}, [f"loss: {options['loss']!r} does not exist in arcface_torch; its ArcFace takes its place"]
        return name, {"margin": 0.5 if name == "arcface" else 0.4}, []
    if len(options["margin_list"]) != 3:
        raise ValueError(f"config.margin_list is {options['margin_list']}, but must be three numbers, as in (1.0, 0.5, 0.0) for ArcFace.")
    m1, m2, m3 = options["margin_list"]
    if (m1, m3) == (1.0, 0.0):
        return "arcface", {"margin": m2}, []
    if (m1, m2) == (1.0, 0.0):
        return "cosface", {"margin": m3}, []
    # losses.CombinedMarginLoss of arcface_torch is CosFace whenever m3 > 0, ArcFace if m1 = 1 and m3 = 0, else an exception.
    theirs = f"trains with {m3} alone, which is --set loss=cosface loss.margin={m3}" if m3 > 0 else "refuses them"
    remark = f"margin_list: {(m1, m2, m3)} are all used, cos({m1} angle + {m2}) - {m3}; arcface_torch's own code {theirs}"
    return "combined", {"angle_factor": m1, "angle_margin": m2, "margin": m3}, [remark]


def _load(path: str | Path) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}.") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is not a file of weights written by torch.save, or holds more than weights: export its state dict."
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a state dict: save model.state_dict() instead.")
    return loaded


def _in_rank_order(parts: Sequence[str | Path | Mapping[str, Any]]) -> list[str | Path | Mapping[str, Any]]:
    """Files named checkpoint_gpu_{rank}.pt by their number, so that a shell's gpu_10 before gpu_2 does no harm; others as given."""
    matches = [None if isinstance(part, Mapping) else re.fullmatch(r"checkpoint_gpu_(\d+)\.pt", Path(part).name) for part in parts]
    numbers = [int(match[1]) for match in matches if match]
    if len(numbers) < len(parts):
        return list(parts)
    for rank, number in enumerate(sorted(numbers)):
        if rank != number:
            raise ValueError(f"of the {len(parts)} classifier files, checkpoint_gpu_{rank}.pt is missing or another one is named twice.")
    return [part for _, part in sorted(zip(numbers, parts, strict=True), key=lambda pair: pair[0])]


def _classifier_rows(part: str | Path | Mapping[str, Any]) -> torch.Tensor:
    name, loaded = ("the given state dict", part) if isinstance(part, Mapping) else (str(part), _load(part))
    weight = loaded.get("state_dict_softmax_fc", loaded).get("weight")
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise ValueError(
            f"{name} holds no classifier (state_dict_softmax_fc -> weight [classes, width]): train with save_all_states = True."
        )
    return weight


def import_run(config: str, models: Sequence[str], out: str, gpus: int) -> str:
    """Writes OUT/recipe.py and, from model files, the start checkpoint OUT/checkpoints/step-00000000; returns what to do with them.

    One model file may be a bare backbone (model.pt); several must be all the checkpoint_gpu_*.pt of a run, which hold its classifier too.
    """
    imported = import_config(config, gpus)
    lines = [f"not taken over: {line}" for line in imported.unmapped] + [f"chosen: {line}" for line in imported.chosen]
    state: dict[str, torch.Tensor] = {}
    info: dict[str, Any] = {"consumed": 0, "num_classes": None}
    if models:
        if imported.fields["backbone.name"] not in NETWORKS.values():
            raise ValueError(f"{config} trains a network that does not exist here, so the weights in {models[0]} cannot be used")
        network, width = imported.fields["backbone.name"], imported.fields["backbone.width"]
        state = {f"backbone.{name}": value for name, value in load_backbone(models[0], network, width).items()}
        if len(models) > 1 or "state_dict_softmax_fc" in _load(models[0]):
            state["prototypes"] = merge_classifier(models, read_config(config).get("num_classes"))
            info["num_classes"] = len(state["prototypes"])
        info |= {"width": width, "backbone": network, "image_size": 112}

    os.makedirs(out, exist_ok=True)
    recipe = os.path.join(out, "recipe.py")
    # The run goes on in OUT, so that --resume auto finds the start checkpoint first and the run's own ones later.
    imported.fields["run.folder"] = out
    Path(recipe).write_text(recipe_source(imported, config))
    lines.insert(0, f"recipe: {recipe}")
    command = f"protoshard train {recipe}"
    if models:
        info["config"] = as_dict(resolve(recipe))
        path = checkpoint.save(os.path.join(out, "checkpoints"), 0, state, info, keep=1)
        parts = f"backbone and {info['num_classes']} prototypes" if info["num_classes"] else "backbone alone"
        lines.append(f"start checkpoint: {path} ({parts}, no optimizer state)")
    return "\n".join([*lines, f"start with: {command}"])
