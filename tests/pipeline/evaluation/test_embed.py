"""embed with a stand-in for the image decoder: order, mirror images, modes, unreadable images, and several ranks against one."""

import logging
import os
import sys
import types
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pipeline.evaluation.all_pairs import all_pairs
from pipeline.evaluation.embed import embed

SIDE = 4
SETTINGS = {"batch_size": 3, "device": "cpu"}


class FakeBatch(NamedTuple):
    images: torch.Tensor
    labels: torch.Tensor
    indices: np.ndarray


class PixelSource:
    """Images whose bytes are their float32 pixels; `broken` ones cannot be decoded."""

    path = "pixels"

    def __init__(self, number: int, broken: tuple[int, ...] = ()) -> None:
        self.labels = np.arange(number, dtype=np.int64) // 2
        self.identities = [f"id{i}" for i in range(number)]
        self.pixels = np.random.default_rng(0).normal(size=(number, 3, SIDE, SIDE)).astype(np.float32)
        self.broken = broken

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        return b"" if index in self.broken else self.pixels[index].tobytes()

    def name(self, index: int) -> str:
        return f"pixels:{index}.jpg"


def fake_batches(source, config, indices, batch_size, device, **layout):
    for start in range(0, len(indices), batch_size):
        chosen = [i for i in indices[start : start + batch_size] if source.read(i)]
        pixels = [np.frombuffer(source.read(i), np.float32).reshape(3, SIDE, SIDE) for i in chosen]
        images = torch.from_numpy(np.stack(pixels)) if pixels else torch.zeros(0, 3, SIDE, SIDE)
        yield FakeBatch(images, torch.from_numpy(source.labels[chosen]), np.array(chosen, dtype=np.int64))


def use_fake_batches() -> None:
    sys.modules["dali_loaders.loader"] = types.SimpleNamespace(evaluation_batches=fake_batches)


@pytest.fixture(autouse=True)
def fake_loader(monkeypatch):
    monkeypatch.setitem(sys.modules, "dali_loaders.loader", types.SimpleNamespace(evaluation_batches=fake_batches))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))


def test_unit_features_in_dataset_order():
    source, model = PixelSource(10), network()
    embeddings, numbers = embed(model, source, None, flip=False, **SETTINGS)
    want = model.eval()(torch.from_numpy(source.pixels)).detach()
    torch.testing.assert_close(embeddings, want / want.norm(dim=1, keepdim=True))
    assert embeddings.dtype == torch.float32 and not embeddings.requires_grad
    assert numbers.dtype == np.int64 and numbers.tolist() == list(range(10))


def test_flip_adds_features_of_the_mirror_image_before_normalising():
    source, model = PixelSource(5), network()
    embeddings, _ = embed(model, source, None, flip=True, **SETTINGS)
    images = torch.from_numpy(source.pixels)
    model.eval()
    want = (model(images) + model(images[..., range(SIDE - 1, -1, -1)])).detach()
    torch.testing.assert_close(embeddings, want / want.norm(dim=1, keepdim=True))


def test_modes_and_statistics_of_the_model_are_left_as_they_were():
    model = network().train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    embed(model, PixelSource(6), None, flip=True, **SETTINGS)
    assert [module.training for module in model] == [True, True, False, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_modes_come_back_when_the_model_fails():
    model = nn.Sequential(nn.Linear(1, 1)).train()
    with pytest.raises(RuntimeError):
        embed(model, PixelSource(6), None, flip=False, **SETTINGS)
    assert model.training and model[0].training


def test_a_plain_function_is_a_model():
    embeddings, _ = embed(lambda images: images.flatten(1), PixelSource(4), None, flip=False, **SETTINGS)
    assert embeddings.shape == (4, 3 * SIDE * SIDE)


def test_unreadable_images_are_left_out_and_named(caplog):
    source = PixelSource(20, broken=(0, 3, 4, 5, 9, 11, 19))
    with caplog.at_level(logging.WARNING):
        embeddings, numbers = embed(network(), source, None, flip=False, **SETTINGS)
    readable = np.delete(np.arange(20), source.broken)
    assert numbers.tolist() == readable.tolist() and len(embeddings) == 13
    assert "7 of 20 images cannot be decoded" in caplog.text
    assert "pixels:0.jpg, pixels:3.jpg" in caplog.text and "and 2 more" in caplog.text


def test_no_readable_image_ends_in_a_sentence():
    with pytest.raises(ValueError, match=r"pixels: none of its 4 images can be decoded \(pixels:0.jpg"):
        embed(network(), PixelSource(4, broken=(0, 1, 2, 3)), None, flip=False, **SETTINGS)


def rounded_by_batch(images):
    """A network whose features depend on the size of a batch, as the last bits of real ones do."""
    return images.flatten(1) + len(images)


RANKS = 3
# Shares of 10 images over 3 ranks are uneven; of 2 images one rank has none; with the first three broken, rank 0 has nothing readable.
CASES = [(10, ()), (2, ()), (10, (0, 1, 2)), (9, (8,))]


def results_of_a_rank(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    use_fake_batches()
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    ranks = {"rank": rank, "world_size": RANKS}
    results = [embed(network(), PixelSource(number, broken), None, flip=True, **SETTINGS, **ranks) for number, broken in CASES]
    embeddings, numbers = results[0]
    report = all_pairs(embeddings, PixelSource(10).labels[numbers], **ranks)
    results.append(embed(rounded_by_batch, PixelSource(10), None, flip=True, **SETTINGS, **ranks))
    distributed = nn.parallel.DistributedDataParallel(network())
    unwrapped, _ = embed(distributed, PixelSource(10), None, flip=True, **SETTINGS, **ranks)
    torch.save((results, report, unwrapped), f"{out}.{rank}")
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends while a peer still closes its connections


@pytest.mark.timeout(120)
def test_ranks_agree_with_one_process(tmp_path):
    children = mp.start_processes(
        results_of_a_rank, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=RANKS, join=False, start_method="spawn"
    )
    try:
        for child in children.processes:
            child.join(timeout=90)
        assert children.join(timeout=1), "the ranks did not end within 90 seconds"
    finally:
        for child in children.processes:
            if child.is_alive():
                child.kill()
    want = [embed(network(), PixelSource(number, broken), None, flip=True, **SETTINGS) for number, broken in CASES]
    want.append(embed(rounded_by_batch, PixelSource(10), None, flip=True, **SETTINGS))
    want_report = all_pairs(want[0][0], PixelSource(10).labels[want[0][1]])
    for rank in range(RANKS):
        results, report, unwrapped = torch.load(tmp_path / f"out.{rank}", weights_only=False)
        for (embeddings, numbers), (want_embeddings, want_numbers) in zip(results, want, strict=True):
            assert torch.equal(embeddings, want_embeddings)
            assert numbers.tolist() == want_numbers.tolist()
        torch.testing.assert_close(unwrapped, want[0][0])
        assert report.as_dict() == want_report.as_dict()


def test_features_that_have_exploded_are_no_zeros():
    """Their squares are infinite in float32."""
    source = PixelSource(6)
    embeddings, numbers = embed(lambda images: 1e25 * images.flatten(1), source, None, flip=False, **SETTINGS)
    with pytest.raises(ValueError, match="not finite; the model has diverged"):
        all_pairs(embeddings, source.labels[numbers])
