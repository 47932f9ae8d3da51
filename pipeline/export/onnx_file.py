"""A network as ONNX, as InsightFace's ArcFaceONNX takes it: RGB images [batch, 3, H, W], (x - 127.5) / 127.5, to features."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from dali_loaders.extras import extra, missing

FILE = "model.onnx"
BATCHES = (1, 7, 64)  # sizes by which it is compared with torch
MOST = 1e-5  # that a cosine may fall short of 1
LARGEST = 2_000_000_000  # bytes of weights in one file: protobuf ends at 2 GiB


def lacking() -> str | None:
    """What is to be installed before ONNX files can be made, in a sentence; None where all is there."""
    absent = [package for package in ("onnx", "onnxruntime", "onnxscript") if find_spec(package) is None]
    return str(missing("export", *absent)) if absent else None


def write(network: nn.Module, path: str, image_size: int) -> None:
    """Features are as the network gives them: not normalised, and without those of the mirror image. ValueError for a network that torch
    cannot turn into ONNX."""
    with extra("export"):
        import onnx
    size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    if size > LARGEST:
        raise ValueError(f"the network has {size / 1e9:.1f} GB of weights, and an ONNX file holds 2 at most: export with --no-onnx")
    images = torch.zeros(2, 3, image_size, image_size)  # 1 image would become a constant of the graph
    with _quiet():
        try:
            program = torch.onnx.export(
                network, (images,), dynamo=True, verbose=False, input_names=["images"], output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False,
            )  # fmt: skip
        except Exception as error:  # torch and onnxscript raise nearly anything
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"torch cannot turn this network into ONNX ({reason[0][:300]}): export with --no-onnx") from error
        assert program is not None
        model = program.model_proto
    _without_traces(model)
    onnx.save(model, path)


def worst_cosine(network: nn.Module, path: str, image_size: int, images: Tensor | None = None) -> float:
    """The smallest cosine between features of the ONNX file, run by onnxruntime on the CPU, and of the network, in batches of 1, 7 and 64.
    ValueError if it is further from 1 than 1e-5.

    images: float32 [n, 3, H, W]; 72 of random numbers if not given"""
    with extra("export"):
        import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    if images is None:
        images = torch.rand(sum(BATCHES), 3, image_size, image_size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sizes = [*BATCHES, *[BATCHES[-1]] * (len(images) // BATCHES[-1])]
    worst, start = 1.0, 0
    for size in sizes:
        batch = images[start : start + size]
        if not len(batch):
            break
        with torch.no_grad():
            wanted_bD = network(batch).double()
        found_bD = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]).double()
        worst = min(worst, float(cosine_similarity(wanted_bD, found_bD).min()))
        start += size
    if not worst >= 1 - MOST:  # NaN too
        raise ValueError(f"{FILE} gives other features than the network: a cosine between them is {worst:.7f}; export with --no-onnx")
    return worst


def _without_traces(model: Any) -> None:
    """Where in which file of this machine an operator was called is nobody's business."""
    graphs = [model.graph, *model.functions]
    for part in graphs:
        for node in part.node:
            del node.metadata_props[:]
            node.doc_string = ""
        for values in (part.value_info, getattr(part, "input", []), getattr(part, "output", []), getattr(part, "initializer", [])):
            for value in values:
                if hasattr(value, "metadata_props"):
                    del value.metadata_props[:]
    for holder in (model, *graphs):
        if hasattr(holder, "metadata_props"):
            del holder.metadata_props[:]


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx tells of packages that it would support, and of its own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
