"""`protoshard bench loader` at a size that takes no time, and that all its sides give the same images."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch

from benchmarks import loader, loader_peers
from benchmarks.loader_peers import Setting
from pipeline.cli import main

pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")

CPU = torch.device("cpu")
TINY = ["--images", "40", "--batch", "8", "--image-size", "32", "--threads", "1", "--rounds", "1", "--seconds", "0.05"]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(loader, "_PAUSE", 0)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return loader._write_set(str(tmp_path_factory.mktemp("set")), None, 40, Setting(8, image_size=112, device=CPU))


def test_the_sides_in_one_process(monkeypatch, capsys, tmp_path):
    """And one that cannot be measured says what it needs."""

    def missing(found, setting):
        raise ImportError(name="mxnet")

    monkeypatch.setattr(loader_peers, "MAKERS", {loader_peers.DALI: loader_peers.dali, "DataLoader, mxnet + cv2": missing})
    path = tmp_path / "loader.csv"
    assert main(["bench", "loader", *TINY, "--ranks", "1", "--json", "--csv", str(path)]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["side"] for row in rows] == [loader.OURS, loader.FEED, loader_peers.DALI, "DataLoader, mxnet + cv2"]
    assert all(row["images_per_s"] > 0 for row in rows[:3])
    assert [row["ours_over_this"] is None for row in rows] == [True, True, False, True]
    assert rows[3]["note"] == "not measured: needs mxnet"
    with path.open() as file:
        assert [row["side"] for row in csv.DictReader(file)] == [row["side"] for row in rows]


@pytest.mark.slow
def test_feeds_of_two_processes_and_data_of_ones_own(capsys, tmp_path):
    """Images that cannot be read are left out; InsightFace's header records too."""
    folder = tmp_path / "set"
    assert main(["data", "faces", str(tmp_path / "faces.rec"), "--identities", "4", "--images", "4", "--size", "32"]) == 0
    capsys.readouterr()
    arguments = [*TINY, "--data", str(tmp_path / "faces.rec"), "--ranks", "2", "--feed-only", "--csv", str(folder / "loader.csv")]
    assert main(["bench", "loader", *arguments]) == 0
    alone, two = capsys.readouterr().out.splitlines()
    assert alone.startswith("16 images of") and f"{loader.FEED}:" in alone and "a core" in alone
    assert f"{loader.FEED}, 2 ranks:" in two and "a core" in two


def test_too_few_images(capsys):
    assert main(["bench", "loader", *TINY, "--images", "3"]) == 2
    assert "3 readable images; a batch of 8 needs as many" in capsys.readouterr().err


def test_all_sides_give_the_same_images(found):
    """Up to mirroring, and to how decoders round."""
    setting = Setting(40, image_size=112, device=CPU)
    images = {how: loader_peers.Images(found, 112, how) for how in ("cv2", "pil")}
    by_mean = {how: np.sort([float(images[how][n].mean()) for n in range(40)]) for how in images}
    for make in (loader._ours, loader_peers.dali):
        batches = make(found, setting)
        batch = next(batches)
        batches.close()
        assert (batch.shape, batch.dtype) == ((40, 3, 112, 112), torch.float32)
        by_mean[make.__name__] = np.sort(batch.mean(dim=(1, 2, 3)).numpy())
    for means in by_mean.values():
        assert np.abs(means - by_mean["_ours"]).max() < 0.005


def test_the_feed_without_decoding_hands_over_every_byte(found):
    batches = loader._feed(found, Setting(40, image_size=112, device=CPU))
    lengths = next(batches)[:, 0].numpy()
    batches.close()
    assert found.kilobytes - 0.1 < lengths.mean() / 1000 < found.kilobytes + 0.1
