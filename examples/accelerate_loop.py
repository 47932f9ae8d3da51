"""The classifier in a loop with Hugging Face Accelerate: a small network, random data, checkpoints.

    torchrun --nproc-per-node 2 examples/accelerate_loop.py          # or, with GPUs, accelerate launch --num_processes 2

Any number of processes that divides the batch prints the same losses. A run that is started again goes on where its checkpoint is.
"""

import sys
from pathlib import Path

import torch
import torch.distributed.nn  # imported later, it would keep the process group, and threads with it: docs/own_training_loop.md
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from partial_fc import PartialFC, RowSGD, losses

IDENTITIES, BATCH, EPOCHS = 200, 64, 4


def main(folder: str = "runs/accelerate_loop") -> None:
    # BATCH is that of all processes together, and drawn in the same order on any number of them.
    batches = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), dataloader_config=batches)  # without a GPU it joins nobody unasked
    if accelerator.scaler is not None:
        raise ValueError("accelerator.backward would scale the prototypes' gradient, which nothing divides again: use bf16")
    train(accelerator, folder)
    accelerator.free_memory()  # lets DDP go before its group, as it must
    accelerator.end_training()


def train(accelerator: Accelerator, folder: str) -> None:
    set_seed(0)  # the same data and backbone on every process
    labels_N = torch.arange(IDENTITIES).repeat_interleave(8)
    inputs_ND = torch.randn(IDENTITIES, 32)[labels_N] + 0.3 * torch.randn(len(labels_N), 32)  # noise around the mean of an identity
    loader = DataLoader(TensorDataset(inputs_ND, labels_N), BATCH, shuffle=True, drop_last=True)
    backbone = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    backbone, optimizer, loader = accelerator.prepare(backbone, optimizer, loader)

    # This process's share of the prototypes: made once the processes have joined, which Accelerator() does, and never prepared.
    cosface = losses.build("cosface", scale=16.0, margin=0.2)
    classifier = PartialFC(IDENTITIES, width=64, loss=cosface, sample_rate=0.5, device=accelerator.device)
    rows = RowSGD(classifier, lr=0.1, momentum=0.9, weight_decay=5e-4)

    # save_state and register_for_checkpointing write what process 0 has. The classifier is another one on every process.
    own_file = f"classifier-{accelerator.process_index}.pt"

    def save(models: list[nn.Module], weights: list[dict], output: str) -> None:
        torch.save({"classifier": classifier.state_dict(), "rows": rows.state_dict()}, Path(output, own_file))

    def load(models: list[nn.Module], output: str) -> None:
        saved = torch.load(Path(output, own_file), map_location="cpu", weights_only=True)
        classifier.load_state_dict(saved["classifier"])
        rows.load_state_dict(saved["rows"])

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    checkpoints = sorted(Path(folder).glob("epoch-*"))
    if checkpoints:
        accelerator.load_state(str(checkpoints[-1]))
    for epoch in range(len(checkpoints), EPOCHS):
        loader.set_epoch(epoch)
        for inputs_bD, labels_b in loader:
            loss = classifier(backbone(inputs_bD), labels_b)  # the mean over the global batch, equal on every process
            accelerator.backward(loss)
            rows.step()  # raises if features were not finite, before anything is changed
            rows.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch} loss {loss.item():.6f}")
        accelerator.save_state(f"{folder}/epoch-{epoch:03}")


if __name__ == "__main__":
    main(*sys.argv[1:])
