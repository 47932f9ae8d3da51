"""`protoshard import`: makes the folder of a new run from the files of another project, all of it or nothing."""

import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dali_loaders.config import DataConfig
from dali_loaders.outputs import check_folder
from partial_fc import losses
from pipeline import checkpoint
from pipeline.backbones import BackboneConfig, build
from pipeline.config import RunConfig, TrainConfig, as_dict
from pipeline.interop.classifier_files import has_classifier, is_classifier_file, merge_classifier
from pipeline.interop.insightface import import_config
from pipeline.interop.ir_files import colors_beside, network_of, with_rgb
from pipeline.interop.recipe_file import recipe_source
from pipeline.interop.weights import fit, read_file, read_weights, state_dict_of
from pipeline.resolve import resolve

WORKPLACE = ".importing"


def import_run(config: str, models: Sequence[str], out: str, gpus: int) -> str:
    """Writes OUT/recipe.py and, from model files, the start checkpoint OUT/checkpoints/step-00000000; returns what to do with them.

    Models may be a bare backbone (model.pt), which files of the classifier alone may follow (softmax_fc_gpu_*.pt), or all the
    checkpoint_gpu_*.pt of a run, which hold both. OUT must not exist or be empty.
    """
    imported = import_config(config, gpus)
    lines = [f"not taken over: {line}" for line in imported.unmapped] + [f"chosen: {line}" for line in imported.chosen]
    recipe = os.path.join(out, "recipe.py")
    with _new_folder(out) as folder:
        written = Path(folder, "recipe.py")
        written.write_text(recipe_source(imported, config), encoding="utf-8")
        resolved = resolve(str(written), [f"run.folder={os.path.abspath(out)}"])  # also checks every value
        if models:
            state = _states(models, resolved.backbone, resolved.data.image_size, imported.num_classes)
            prototypes = state.get("prototypes")
            parts = "backbone alone" if prototypes is None else f"backbone and {len(prototypes)} prototypes"
            lines.append(f"{_save(folder, out, state, resolved)} ({parts}, no optimizer state)")
    return "\n".join([f"recipe: {recipe}", *lines, f"start with: protoshard train {shlex.quote(recipe)}"])


def import_weights(path: str, out: str, colors: str | None) -> str:
    """Writes the start checkpoint OUT/checkpoints/step-00000000 from a checkpoint of AdaFace or CVLface; returns what to do with it.

    colors: "rgb" or "bgr", what the network takes; None where CVLface's configuration beside the file is to say it.
    """
    check_folder(out, "--out")
    found = read_weights(path)
    backbone, image_size, prefix = network_of(found, path)
    others = [name for name in found if not name.startswith(prefix)]
    known = colors or colors_beside(path)
    lines = [f"network: {backbone.name}, features of {backbone.width} numbers, images of {image_size} pixels"]
    lines += [f"not taken over: {len(others)} tensors that are not the network's ({', '.join(others[:3])})"] if others else []
    lines += ["chosen: rgb, since no configuration beside the file says color_space; --colors=bgr says otherwise"] if known is None else []
    if known == "bgr":
        found = with_rgb(found, prefix)
        lines.append(
            "chosen: the network takes blue, green, red; here the inputs of its first convolution are exchanged, for red, green, blue"
        )
    run, data = RunConfig(folder=os.path.abspath(out)), DataConfig(image_size=image_size)
    config = TrainConfig(run=run, data=data, backbone=backbone, loss=losses.build("adaface"))
    state = {f"backbone.{name}": tensor for name, tensor in load_backbone(found, path, backbone, image_size).items()}
    with _new_folder(out) as folder:
        lines.insert(0, f"{_save(folder, out, state, config)} (backbone alone)")
    start = f"--from {shlex.quote(out)} --set backbone.name={backbone.name} backbone.width={backbone.width} data.image_size={image_size}"
    evaluate = f"evaluate with: protoshard eval {shlex.quote(out)} --data PATH"
    return "\n".join([*lines, evaluate, f"fine-tune with: protoshard train RECIPE {start}"])


def load_backbone(found: dict[str, Tensor], path: str, backbone: BackboneConfig, image_size: int) -> dict[str, Tensor]:
    """The state dict of a network, from weights that `read_weights` gave. Raises what `build` and `fit` do."""
    with torch.device("meta"):
        expected = build(backbone, image_size)
    return fit(found, expected, path, f"{backbone.name} of width {backbone.width}")


def _states(models: Sequence[str], backbone: BackboneConfig, image_size: int, num_classes: int | None) -> dict[str, Tensor]:
    """What a checkpoint holds: the backbone, and the prototypes where the files have a classifier."""
    networks = [path for path in models if not is_classifier_file(path)]
    if not networks:
        raise ValueError(f"{models[0]} holds a part of a classifier, and no backbone: name model.pt too.")
    first = read_file(networks[0])
    parts = [path for path in models if is_classifier_file(path)]
    if parts and len(networks) > 1:
        raise ValueError(f"{networks[0]} and {networks[1]} both stand for the backbone: name one of them.")
    if not parts and (len(networks) > 1 or has_classifier(first)):
        parts = networks
    weights = load_backbone(state_dict_of(first, networks[0]), networks[0], backbone, image_size)
    state = {f"backbone.{name}": tensor for name, tensor in weights.items()}
    if parts:
        state["prototypes"] = merge_classifier(parts, num_classes)
        if state["prototypes"].shape[1] != backbone.width:
            raise ValueError(
                f"the classifier has prototypes of {state['prototypes'].shape[1]} numbers, but the backbone's width is {backbone.width}."
            )
    return state


def _save(folder: str, out: str, state: dict[str, Tensor], config: TrainConfig) -> str:
    classes = len(state["prototypes"]) if "prototypes" in state else None
    info: dict[str, Any] = {"consumed": 0, "num_classes": classes, "width": config.backbone.width, "backbone": config.backbone.name}
    parts = {name: checkpoint.whole(tensor) for name, tensor in state.items()}
    path = checkpoint.save(
        os.path.join(folder, "checkpoints"), 0, parts, info | {"image_size": config.data.image_size, "config": as_dict(config)}, keep=1
    )
    return f"start checkpoint: {os.path.join(out, os.path.relpath(path, folder))}"


@contextmanager
def _new_folder(out: str) -> Iterator[str]:
    """A folder in OUT to write to, whose contents move up into OUT at the end. ValueError where OUT holds anything: an import starts a new
    run, and nothing of an earlier one may be lost. If anything fails, OUT is as it was."""
    check_folder(out, "--out")
    is_new = not os.path.isdir(out)
    work = os.path.join(out, WORKPLACE)
    try:
        os.makedirs(out, exist_ok=True)
        os.mkdir(work)  # also keeps a second import out
    except FileExistsError:
        raise ValueError(_occupied(out)) from None
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written ({error.strerror}): give another folder.") from None
    try:
        if os.listdir(out) != [WORKPLACE]:
            raise ValueError(_occupied(out))
        yield work
        for name in ("checkpoints", "recipe.py"):  # in this order: a recipe alone would start from random weights
            if os.path.exists(os.path.join(work, name)):
                os.rename(os.path.join(work, name), os.path.join(out, name))
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if is_new and not os.listdir(out):
            os.rmdir(out)


def _occupied(out: str) -> str:
    return f"{out} holds something already, such as an earlier run: give another --out, or move it away. Nothing there was changed."
