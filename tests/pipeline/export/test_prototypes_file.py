"""Prototypes of a checkpoint in one file: the same numbers, in the memory of a piece."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from partial_fc.shards import ClassShard
from pipeline import checkpoint
from pipeline.export import prototypes_file
from pipeline.export.model_folder import export
from pipeline.train import train
from tests.pipeline.export.test_model_folder import ROOT
from tests.pipeline.runs import configuration


def test_prototypes_are_those_of_the_checkpoint(made):
    saved = checkpoint.locate(made.run)
    file = load_file(Path(made.folder) / "prototypes.safetensors")
    assert torch.equal(file["prototypes"], saved.whole("prototypes"))
    assert json.loads((Path(made.folder) / "identities.json").read_text()) == saved.identities()


def _trained(data: str, folder: str) -> torch.Tensor:
    """This rank's prototypes."""
    with torch.random.fork_rng():
        train(configuration(data, folder, 1))
    saved = checkpoint.locate(folder)
    shard = ClassShard.of_rank(13, dist.get_rank(), dist.get_world_size())
    part = torch.empty(shard.rows, 16)
    saved.fill("prototypes", part, shard.first * 16)
    return part


def test_prototypes_of_two_ranks_are_merged(made, tmp_path, ranks):
    parts = ranks(2).run(_trained, made.data, str(tmp_path / "run"))
    export(str(tmp_path / "run"), str(tmp_path / "model"), onnx=False, prototypes=True, say=lambda _: None)
    file = load_file(tmp_path / "model" / "prototypes.safetensors")["prototypes"]
    assert file.shape == (13, 16) and [len(part) for part in parts] == [7, 6] and torch.equal(file, torch.cat(parts))


class Generated:
    """A matrix that is nowhere in memory: element i is i modulo 1000."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        self.rows, self.width, self.type = rows, width, dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self.rows, self.width

    def dtype(self, name: str) -> torch.dtype:
        return self.type

    def fill(self, name: str, out: torch.Tensor, start: int = 0) -> None:
        out.copy_(torch.arange(start, start + out.numel()) % 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prototypes_are_written_in_pieces(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(prototypes_file, "PIECE", 1 << 10)  # so that pieces end inside rows
    assert prototypes_file.write(Generated(301, 7, dtype), str(tmp_path / "p.safetensors")) == (301, 7)
    wanted = (torch.arange(301 * 7) % 1000).to(dtype).view(301, 7)
    assert torch.equal(load_file(tmp_path / "p.safetensors")["prototypes"], wanted)


MEMORY = """
import resource, sys
sys.path[:0] = sys.argv[2:]
import torch
from pipeline.export import prototypes_file
from tests.pipeline.export.test_prototypes_file import Generated
torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
class Ones(Generated):
    def fill(self, name, out, start=0):
        out.fill_(1)
prototypes_file.write(Ones(300_000, 256, torch.float32), sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_prototypes_need_the_memory_of_a_piece(tmp_path):
    """307 MB of them, in pieces of 32 MB."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "p.safetensors"), str(ROOT), *sys.path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert os.path.getsize(tmp_path / "p.safetensors") > 307_000_000 and int(done.stdout) < 80_000  # KiB
