"""A GPU's stand-in: the code for GPUs runs on the CPU, with DALI's graph on the CPU and a stream that is none, and calls are recorded."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from dali_loaders import image_graph


class Stream:
    cuda_stream = 0  # what DALI reads of torch's streams

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        pass


class TensorsStayOnCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.pin_memory:
            return args[0]
        if function is torch.Tensor.to:
            return args[0].clone()
        if getattr(kwargs.get("device"), "type", "") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@dataclass
class StandIn:
    pipelines: list[dict[str, Any]] = field(default_factory=list)  # arguments of image_pipeline
    outputs: list[dict[str, Any]] = field(default_factory=list)  # of Pipeline.outputs, as DALI's signature binds them
    copies: list[dict[str, Any]] = field(default_factory=list)  # of feed_ndarray


def install(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    from nvidia import dali
    from nvidia.dali.plugin import pytorch

    from dali_loaders import decode

    seen = StandIn()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    outputs, copy, image_pipeline = dali.Pipeline.outputs, pytorch.feed_ndarray, image_graph.image_pipeline

    def record_pipeline(image_size, batch_size, threads, device, **options):
        seen.pipelines.append({"device": device} | options)
        return image_pipeline(image_size, batch_size, threads, torch.device("cpu"), **options | {"decode_on": "cpu"})

    def record_outputs(*args, **kwargs):
        bound = inspect.signature(outputs).bind(*args, **kwargs).arguments
        seen.outputs.append(bound)
        return outputs(args[0])

    def record_copy(*args, **kwargs):
        bound = inspect.signature(copy).bind(*args, **kwargs).arguments
        seen.copies.append(bound)
        return copy(bound["dali_tensor"], bound["arr"])

    monkeypatch.setattr(decode, "image_pipeline", record_pipeline)
    monkeypatch.setattr(dali.Pipeline, "outputs", record_outputs)
    monkeypatch.setattr(pytorch, "feed_ndarray", record_copy)
    return seen
