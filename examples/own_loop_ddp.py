"""The classifier in a training loop of your own: a small network under plain DDP, random data, and nothing else of this project.

    torchrun --nproc-per-node 2 examples/own_loop_ddp.py

Any number of processes that divides the batch prints the same losses.
"""

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, it would keep the process group, and threads with it: docs/own_training_loop.md
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from partial_fc import PartialFC, RowSGD, losses

IDENTITIES, BATCH, STEPS = 200, 60, 61


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train()
    dist.barrier()  # no rank leaves while another still sends
    dist.destroy_process_group()  # DDP has to be gone before its group: it would wait for threads of gloo that may be waiting for it


def train() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")

    torch.manual_seed(0)  # the same backbone on every rank
    backbone = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64)).to(device)
    parallel = DistributedDataParallel(backbone, [device] if device.type == "cuda" else None)
    backbone_optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)

    # This rank's share of the prototypes. It stays outside DDP, which would average it over ranks.
    loss_function = losses.build("cosface", scale=16.0, margin=0.2)
    classifier = PartialFC(IDENTITIES, width=64, loss=loss_function, sample_rate=0.5, device=device)
    classifier_optimizer = RowSGD(classifier, lr=0.1, momentum=0.9, weight_decay=5e-4)

    means_CD = torch.randn(IDENTITIES, 32, generator=torch.Generator().manual_seed(1))
    for step in range(STEPS):
        inputs_BD, labels_B = draw_batch(means_CD, step)
        mine = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)

        features_bD = parallel(inputs_BD[mine].to(device))
        loss = classifier(features_bD, labels_B[mine].to(device))  # the mean over the global batch, equal on every rank
        loss.backward()
        classifier_optimizer.step()  # raises if features were not finite, before anything is changed
        classifier_optimizer.zero_grad()
        backbone_optimizer.step()
        backbone_optimizer.zero_grad()
        if rank == 0 and step % 20 == 0:
            print(f"step {step} loss {loss.item():.4f}")


def draw_batch(means_CD: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same global batch on every rank: noise around the mean of each sample's identity."""
    generator = torch.Generator().manual_seed(step)
    labels_B = torch.randint(0, IDENTITIES, (BATCH,), generator=generator)
    return means_CD[labels_B] + 0.3 * torch.randn(BATCH, 32, generator=generator), labels_B


if __name__ == "__main__":
    main()
