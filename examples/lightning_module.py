"""The classifier in a LightningModule: a small network, random data, checkpoints that hold the classifier of every rank.
Any number of ranks that divides the batch prints the same losses: python examples/lightning_module.py RANKS [CHECKPOINT]"""

import os
import sys
from typing import Any
from uuid import uuid4

import lightning
import torch
import torch.distributed.nn  # imported later, it would keep the process group, and threads with it: docs/own_training_loop.md
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from partial_fc import PartialFC, RowSGD, keep_out_of_ddp, losses

IDENTITIES, BATCH, EPOCHS = 200, 64, 4


class Recogniser(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))
        self.saved_rows: dict[str, Any] | None = None

    def configure_model(self) -> None:
        """Once the ranks have joined, because each of them makes its own share of the prototypes, and before DDP sees the module."""
        if not hasattr(self, "classifier"):  # `fit` after `validate` calls it again
            self.classifier = PartialFC(IDENTITIES, 64, losses.build("cosface", scale=16.0, margin=0.2), sample_rate=0.5)
            keep_out_of_ddp(self)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        inputs_bD, labels_b = batch
        loss = self.classifier(self.backbone(inputs_bD), labels_b)  # the mean over the global batch, equal on every rank
        self.log("loss", loss)
        return loss

    def on_train_epoch_end(self) -> None:
        self.print(f"epoch {self.current_epoch} loss {self.trainer.callback_metrics['loss']:.6f}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Lightning steps one optimizer by itself, the backbone's. `on_before_optimizer_step` steps the prototypes'."""
        if self.trainer.precision == "16-mixed":
            raise ValueError("Lightning would scale the prototypes' gradient, which nothing divides again: use bf16-mixed")
        self.rows = RowSGD(self.classifier, lr=0.1, momentum=0.9, weight_decay=5e-4)
        if self.saved_rows:
            self.rows.load_state_dict(self.saved_rows)
        return torch.optim.SGD(self.backbone.parameters(), lr=0.1, momentum=0.9)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.rows.step()  # raises if features were not finite, before anything is changed
        self.rows.zero_grad()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning writes what rank 0 has. The classifier is another one on every rank, so each writes its own. Nothing deletes them."""
        folder = self.trainer.strategy.broadcast(f"{self.trainer.default_root_dir}/classifier-{uuid4().hex[:12]}")
        os.makedirs(folder, exist_ok=True)
        mine = {name: checkpoint["state_dict"].pop(name) for name in list(checkpoint["state_dict"]) if name.startswith("classifier.")}
        torch.save({"classifier": mine, "rows": self.rows.state_dict()}, f"{folder}/rank-{self.global_rank}.pt")
        checkpoint["classifier"] = folder

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = torch.load(f"{checkpoint['classifier']}/rank-{self.global_rank}.pt", map_location="cpu", weights_only=True)
        checkpoint["state_dict"].update(saved["classifier"])
        self.saved_rows = saved["rows"]


def main(ranks: str = "1", checkpoint: str | None = None) -> None:
    lightning.seed_everything(0)  # the same data, backbone and order on every rank
    labels_N = torch.arange(IDENTITIES).repeat_interleave(8)
    inputs_ND = torch.randn(IDENTITIES, 32)[labels_N] + 0.3 * torch.randn(len(labels_N), 32)  # noise around the mean of an identity
    loader = DataLoader(TensorDataset(inputs_ND, labels_N), BATCH // int(ranks), shuffle=True, drop_last=True)
    trainer = lightning.Trainer(strategy="ddp", devices=int(ranks), max_epochs=EPOCHS)
    trainer.fit(Recogniser(), loader, ckpt_path=checkpoint)
    torch.distributed.destroy_process_group()  # Lightning leaves it to the end of the interpreter, where gloo aborts some processes


if __name__ == "__main__":
    main(*sys.argv[1:])
