"""What `protoshard export` does: from a run or checkpoint to a folder that works by itself."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dali_loaders.extras import extra
from dali_loaders.packing.alignment import SIDE, TEMPLATE_52
from dali_loaders.progress import announce
from pipeline import checkpoint
from pipeline.checkpoint import Checkpoint
from pipeline.config import TrainConfig
from pipeline.distributed import join
from pipeline.evaluation import evaluate
from pipeline.evaluation.evaluate_checkpoint import load_backbone
from pipeline.evaluation.set_names import set_names
from pipeline.export import description, model_card, onnx_file, prototypes_file, thresholds
from pipeline.export.description import CONFIG, WEIGHTS, Description
from pipeline.export.loading import Model, digest_of, load
from pipeline.export.new_folder import new_folder

PROGRAM = "model.pt2"


def open_model(path: str, *, ema: bool = False, recipe: str | None = None, device: torch.device | str = "cpu") -> Model:
    """The model in an exported folder, or of a checkpoint or a run's newest one. ValueError where there is none."""
    if os.path.isfile(os.path.join(path, CONFIG)) or os.path.isfile(os.path.join(path, WEIGHTS)):
        if ema:
            raise ValueError(f"--ema chooses among the weights of a run, but {path} is an export: leave it out, or export with --ema")
        return load(path, device=device, recipe=recipe)
    saved = checkpoint.locate(path)
    network, config = load_backbone(saved, torch.device("cpu"), ema, recipe)
    about = describe(saved, config, network, ema)
    return Model(network.to(device), about, saved.path)


def describe(saved: Checkpoint, config: TrainConfig, network: nn.Module, ema: bool) -> Description:
    """Of the weights of a checkpoint, with the thresholds of the evaluation whose figures it carries."""
    evaluation, only = config.evaluation, None
    if not evaluation.flip:  # pair sets and other protocols add the mirror image nevertheless, so their thresholds are not for this model
        only = set_names([path for _, _, path in evaluation.sets()])[0] if evaluation.data else ""
    origin = {name: saved.info.get(name) for name in ("step", "epoch", "num_classes", "when")} | {"ema": ema}
    return Description(
        config.backbone,
        config.data.image_size,
        digest_of(network.state_dict()),
        flip=evaluation.flip,
        batch_size=evaluation.batch_size,
        thresholds=thresholds.of_figures(_figures(saved), ema, only),
        origin=origin,
    )


def export(
    path: str,
    out: str,
    *,
    ema: bool = False,
    recipe: str | None = None,
    data: str | None = None,
    faces: bool = False,
    onnx: bool | None = None,
    program: bool = False,
    prototypes: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Writes the folder `out`, which must not exist. ValueError where the checkpoint is not whole, or anything cannot be made.

    data: a labelled set on which thresholds are measured
    faces: images are faces brought to ArcFace's template
    onnx: also model.onnx; None: where the packages for it are installed
    program: also torch.export's; prototypes: also the classifier's"""
    with new_folder(out) as partial:  # first, so that an impossible place costs no time
        saved = checkpoint.locate(path)
        network, config = load_backbone(saved, torch.device("cpu"), ema, recipe)
        network.eval()
        weights = _finite(network, saved.path)
        about = describe(saved, config, network, ema)
        figures = {name: _text(value) for name, value in _figures(saved).items() if thresholds.is_of(name, ema)}
        if data:
            announce(f"measuring thresholds on {data}")
            about, figures = _measured(network, config, about, data)
        if faces:
            points = TEMPLATE_52 * (about.image_size / SIDE)
            about = replace(about, landmarks=tuple((float(x), float(y)) for x, y in points))
        files = {WEIGHTS: "weights and buffers", CONFIG: "the network, its input, thresholds"}
        _write_weights(weights, os.path.join(partial, WEIGHTS))
        if program:
            files[PROGRAM] = "the network as a program of torch.export: `torch.export.load(FILE).module()(images)`"
            _write_program(network, os.path.join(partial, PROGRAM), about.image_size)
        files |= _write_onnx(network, partial, about.image_size, onnx, say)
        if prototypes:
            files |= _write_prototypes(saved, partial, say)
        shown = {name: value for name, value in figures.items() if thresholds.NAME not in name}  # which have a table of their own
        _write(os.path.join(partial, model_card.FILE), model_card.text(about, saved.info, shown, files))
        _write(os.path.join(partial, CONFIG), about.as_json())  # last: without it nothing loads
        description.read(partial)
    said = "no thresholds (--data SET measures them)"
    if about.thresholds:
        if _trained_on(data or config.evaluation.data, config):
            say(
                f"{about.thresholds.set} is a set that the model was trained on: of identities that it has not seen its thresholds accept "
                "more than they say; measure them on such identities with --data SET"
            )
        said = f"thresholds at FAR {', '.join(about.thresholds.cosine_at_far)} of {about.thresholds.set}"
    say(f"{out}: {about.backbone.name} of step {saved.info.get('step')}, {said}")


def _measured(network: nn.Module, config: TrainConfig, about: Description, data: str) -> tuple[Description, dict[str, str]]:
    """The description with thresholds of the set `data`, and all figures of the set as texts."""
    if data.endswith(".bin") and not about.flip:
        raise ValueError(
            f"--data {data}: a pair set is compared with mirror images added, which this model does not add (evaluation.flip), so its "
            "thresholds would be wrong: name a labelled folder, .tar or .rec"
        )
    device = join().device
    report = evaluate(network.to(device), data, config.data, batch_size=about.batch_size, flip=about.flip, device=device)
    network.cpu()
    measured = thresholds.of_report(report, data)
    figures = {}
    for name, value in report.numbers().items():
        low, high = report.intervals.get(name, (None, None))
        figures[f"{measured.set}/{name}"] = _text(value) + (f" ({_text(low)} to {_text(high)})" if low is not None else "")
    return replace(about, thresholds=measured), figures


def _trained_on(data: str, config: TrainConfig) -> bool:
    """Whether that set is one of those that the model was trained on."""
    ours, theirs = ({os.path.realpath(path.strip()) for path in paths.split(",") if path} for paths in (data, config.data.train))
    return bool(ours & theirs)


def _figures(saved: Checkpoint) -> dict[str, Any]:
    found = saved.info.get("figures")
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str:
    return "unreached: too few pairs" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _write_onnx(network: nn.Module, folder: str, image_size: int, wanted: bool | None, say: Callable[[str], None]) -> dict[str, str]:
    """What was written. `wanted` None: where the packages for it are installed, and else it is said that it is left out."""
    lacking = None if wanted is False else onnx_file.lacking()
    if lacking and wanted:
        raise ValueError(lacking)
    if lacking:
        say(f"{onnx_file.FILE} is left out: {lacking}")
    if lacking or wanted is False:
        return {}
    announce(f"writing {onnx_file.FILE}, and comparing it with torch")
    file = os.path.join(folder, onnx_file.FILE)
    onnx_file.write(network, file, image_size)
    worst = onnx_file.worst_cosine(network, file, image_size)
    say(f"{onnx_file.FILE}: smallest cosine with torch {worst:.9f}, in batches of {', '.join(map(str, onnx_file.BATCHES))}")
    return {onnx_file.FILE: "the network as ONNX: images to features that are not normalised, without the mirror image"}


def _finite(network: nn.Module, path: str) -> dict[str, Tensor]:
    weights = dict(network.state_dict())
    bad = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ValueError(f"{path} holds weights that are not finite ({', '.join(bad[:3])}): export an earlier checkpoint")
    return weights


def _write_weights(weights: dict[str, Tensor], path: str) -> None:
    with extra("export"):
        from safetensors.torch import save
    # Clones, since the format has no tied weights: each name gets its own values.
    clones = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    _write_bytes(path, save(clones, {"format": "pt"}))


def _write_program(network: nn.Module, path: str, image_size: int) -> None:
    images = torch.zeros(2, 3, image_size, image_size)
    try:
        program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # whatever a network does that cannot be followed
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"torch.export cannot follow this network ({reason[0][:300]}): leave --torch-export out") from error
    content = io.BytesIO()
    torch.export.save(program, content)
    _write_bytes(path, content.getbuffer())


def _write_prototypes(saved: Checkpoint, folder: str, say: Callable[[str], None]) -> dict[str, str]:
    if "prototypes" not in saved:
        raise ValueError(f"{saved.path} holds no prototypes: leave --prototypes out")
    shape = prototypes_file.write(saved, os.path.join(folder, prototypes_file.FILE))
    say(f"{prototypes_file.FILE}: {shape[0]:,} x {shape[1]}")
    files = {prototypes_file.FILE: "prototypes, a row of each training identity, not normalised"}
    names = saved.identities()
    if names is not None:
        _write(os.path.join(folder, prototypes_file.IDENTITIES), json.dumps(names))
        files[prototypes_file.IDENTITIES] = "names of the training identities, by row of the prototypes"
    return files


def _write_bytes(path: str, content: bytes | memoryview) -> None:
    """Written here, because libraries tell of a full disk by errors of their own."""
    with open(path, "xb") as file:
        file.write(content)


def _write(path: str, content: str) -> None:
    with open(path, "x", encoding="utf-8", errors="surrogateescape") as file:
        file.write(content)
