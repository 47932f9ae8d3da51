"""The code in docs/checkpoints.md and docs/own_training_loop.md does what these pages say."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from partial_fc import PartialFC, RowSGD, losses
from tests.pipeline.checkpoint.states import matrix, save, shared
from tests.test_docs import python_block

CLASSES, WIDTH, BATCH, STEPS = 31, 8, 12, 8


def example(page):
    names = {}
    exec(compile(python_block(page), page, "exec"), names)
    return names


def test_a_checkpoint_is_read_by_hand(ranks, tmp_path):
    path = ranks(3).run(save, str(tmp_path))[0]
    read = example("checkpoints.md")["read"]
    for name, tensor in {**shared(), "prototypes": matrix(), "optimizer.weight.exp_avg": torch.arange(7.0)}.items():
        found = read(path, name)
        assert torch.equal(found, tensor) and found.dtype == tensor.dtype


def train(folder, stop):
    """Losses of the steps from the newest checkpoint on."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    names = example("own_training_loop.md")
    torch.manual_seed(0)
    backbone = nn.Linear(16, WIDTH)
    classifier = PartialFC(CLASSES, WIDTH, losses.build("uss", scale=16.0, margin=0.1), sample_rate=0.5)
    rows = RowSGD(classifier, lr=0.1, momentum=0.9, unsampled="lazy")
    found = []
    for step in range(names["load"](folder, backbone, classifier, rows), stop):
        generator = torch.Generator().manual_seed(step)
        inputs_BD, labels_B = torch.randn(BATCH, 16, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator)
        mine = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
        loss = classifier(backbone(inputs_BD[mine]), labels_B[mine])
        loss.backward()
        rows.step()
        rows.zero_grad()
        for parameter in backbone.parameters():
            if size > 1:
                dist.all_reduce(parameter.grad)
            parameter.data -= 0.1 * parameter.grad / size
            parameter.grad = None
        found.append(loss.item())
        if step + 1 == STEPS // 2:
            names["save"](folder, step + 1, backbone, classifier, rows)
    return found


def test_a_loop_of_ones_own_goes_on_with_other_ranks(ranks, tmp_path):
    whole = train(str(tmp_path / "whole"), STEPS)
    ranks(2).run(train, str(tmp_path / "parts"), STEPS // 2)
    (rest, *_) = ranks(3).run(train, str(tmp_path / "parts"), STEPS)
    np.testing.assert_allclose(rest, whole[STEPS // 2 :], rtol=1e-4)
