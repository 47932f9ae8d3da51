"""A training step of InsightFace's arcface_torch, made of its own modules, which are read from a checkout outside this repository.

Order of operations as in its train_v2.py; left out on both sides: DDP, the learning rate's schedule and what it prints."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.classifier import MARGIN, MOMENTUM, SCALE, WEIGHT_DECAY

FILES = ("backbones/__init__.py", "partial_fc_v2.py", "losses.py")
CLIP = 5.0


def check(path: str) -> None:
    """ValueError where `path` is no checkout of recognition/arcface_torch."""
    for file in FILES:
        if not os.path.isfile(os.path.join(path, file)):
            raise ValueError(f"{path} has no {file}: give the folder recognition/arcface_torch of a checkout of InsightFace")


def load(path: str) -> dict[str, Any]:
    """Its modules `backbones`, `partial_fc_v2` and `losses`. Raises what `check` does."""
    check(path)
    sys.path.insert(0, path)
    try:
        return {name: importlib.import_module(name) for name in ("backbones", "partial_fc_v2", "losses")}
    finally:
        sys.path.remove(path)


class PeerStep:
    """CosFace with its PartialFC_V2, which needs a process group, and one SGD for everything. On a GPU float16 with its gradient scaler,
    on a CPU float32, because its autocast knows only CUDA. `weights` and `prototypes_CD` are what both sides start from."""

    def __init__(
        self,
        path: str,
        network: str,
        weights: dict[str, Tensor],
        prototypes_CD: Tensor,
        lr: float,
        device: torch.device,
    ) -> None:
        modules = load(path)
        self.device, on_gpu = device, device.type == "cuda"
        classes, width = prototypes_CD.shape
        if not network.startswith("iresnet"):
            raise ValueError(f"arcface_torch is measured with its IResNets: leave out --peer, or take one in place of {network}")
        depth = network.removeprefix("iresnet")
        self.backbone = modules["backbones"].get_model(f"r{depth}", dropout=0.0, fp16=on_gpu, num_features=width).to(device)
        if self.backbone.fc.weight.shape != weights["fc.weight"].shape:
            raise ValueError(f"arcface_torch's {network} takes images of 112 pixels only: leave out --image-size, or --peer")
        self.backbone.load_state_dict(weights)
        loss = modules["losses"].CombinedMarginLoss(SCALE, 1.0, 0.0, MARGIN)
        self.classifier = modules["partial_fc_v2"].PartialFC_V2(loss, width, classes, 1.0, False).to(device)
        with torch.no_grad():
            self.classifier.weight.copy_(prototypes_CD)
        groups = [{"params": self.backbone.parameters()}, {"params": self.classifier.parameters()}]
        self.optimizer = torch.optim.SGD(groups, lr, MOMENTUM, weight_decay=WEIGHT_DECAY)
        self.scaler = torch.amp.GradScaler("cuda", growth_interval=100, enabled=on_gpu)
        warnings.filterwarnings("ignore", r"`torch.cuda.amp.*` is deprecated", FutureWarning)  # its own calls
        warnings.filterwarnings("ignore", ".*CUDA is not available", UserWarning)

    def __call__(self, images_bCHW: Tensor, labels_b: Tensor) -> Tensor:
        """One step; like its loop, it reads the loss on the host."""
        with self._on_device():
            loss = self.classifier(self.backbone(images_bCHW), labels_b)
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.backbone.parameters(), CLIP)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            loss.item()
        return loss.detach()

    def _on_device(self) -> AbstractContextManager[Any]:
        """Its modules call `.cuda()` on what they make: on a CPU these calls return the tensor itself."""
        return nullcontext() if self.device.type == "cuda" else mock.patch.object(Tensor, "cuda", lambda tensor: tensor)
