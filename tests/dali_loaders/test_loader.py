"""Batches do not depend on ranks or on where a run was stopped; unreadable images are replaced, named and counted."""

import itertools
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from pictures import picture, write_folder

from dali_loaders import AugmentConfig, DataConfig, GroupedOrder, TrainLoader, UniformOrder, evaluation_batches, open_source
from dali_loaders import loader as loader_module

pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")

ALL = AugmentConfig(rotate=10, zoom=0.1, shift=0.1, brightness=0.2, contrast=0.2)
CONFIG = DataConfig(image_size=32, threads=2, augment=ALL)
PLAIN = DataConfig(image_size=32, threads=2, augment=AugmentConfig(flip=False))
GROUPS = DataConfig(image_size=32, threads=2, augment=ALL, images_per_identity=3)


def take(source, count, config=CONFIG, **options):
    loader = TrainLoader(source, config, **{"seed": 5, "global_batch": 8} | options)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def joined(batches):
    """images, labels, indices of several batches in a row."""
    return torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches]), np.concatenate([b.indices for b in batches])


def same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and np.array_equal(a[2], b[2])


def test_batches_follow_the_order(folder):
    source = open_source(str(folder))
    images, labels, indices = joined(take(source, 7))
    assert images.shape == (56, 3, 32, 32)
    assert (images.dtype, labels.dtype, indices.dtype) == (torch.float32, torch.int64, np.int64)
    assert np.array_equal(indices, UniformOrder(24, 5).indices(0, 56))
    assert np.array_equal(labels.numpy(), source.labels[indices])
    assert images.abs().max() <= 1
    # A later batch does not overwrite an earlier one: the same image at two places of the stream has the same pixels.
    images, _, indices = joined(take(source, 7, PLAIN))
    for index in range(24):
        copies = images[indices == index]
        assert all(torch.equal(copy, copies[0]) for copy in copies)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_global_batch(folder, world_size):
    source = open_source(str(folder))
    alone = take(source, 5)
    ranks = [take(source, 5, rank=rank, world_size=world_size) for rank in range(world_size)]
    for batch, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        assert same(joined([batch]), joined(parts))


def test_resuming_goes_on_where_it_stopped(folder):
    source = open_source(str(folder))
    whole = joined(take(source, 9))
    for done in (1, 3, 8):
        rest = joined(take(source, 9 - done, consumed=done * 8))
        assert same([part[done * 8 :] for part in whole], rest)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_groups_are_whole_on_every_rank_and_after_a_stop(folder, world_size):
    source = open_source(str(folder))
    wanted = GroupedOrder(source, 3, 5).indices(0, 72)  # 2 epochs of 6 identities x 2 groups x 3 images
    alone = joined(take(source, 6, GROUPS, global_batch=12))
    assert np.array_equal(alone[2], wanted)
    ranks = [take(source, 4, GROUPS, global_batch=12, rank=rank, world_size=world_size, consumed=24) for rank in range(world_size)]
    for batch in itertools.chain(*ranks):
        assert (batch.labels.view(-1, 3) == batch.labels.view(-1, 3)[:, :1]).all()
    rest = joined([batch for batches in zip(*ranks, strict=True) for batch in batches])
    assert same([part[24:] for part in alone], rest)


def test_memory_format_and_type_are_as_asked(folder):
    source = open_source(str(folder))
    asked = {"channels_last": True, "dtype": torch.float16}
    indices = UniformOrder(24, 5).indices(0, 8)
    ((expected, *_),) = take(source, 1, PLAIN)
    ((trained, *_),) = take(source, 1, PLAIN, **asked)
    ((evaluated, *_),) = evaluation_batches(source, PLAIN, indices, 8, **asked)
    for images in (trained, evaluated):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, expected.half())


@pytest.mark.parametrize("decoder", ["auto", "cpu"])
def test_a_gpu_is_told_to_thread_and_decoder(monkeypatch, folder, decoder):
    """The number of the GPU comes from the thread that makes the loader, since the feeding thread has another current one."""
    told = []

    class OnCpu(loader_module.Decoder):
        def __init__(self, size, batch_size, threads, device, *, decoder, **layout):
            told.append((str(device), decoder, layout))
            super().__init__(size, batch_size, threads, torch.device("cpu"), **layout)
            self.device = torch.device("cuda", 2)

    monkeypatch.setattr(loader_module, "Decoder", OnCpu)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.append(str(device)))
    source, config = open_source(str(folder)), DataConfig(image_size=32, threads=2, decoder=decoder)
    take(source, 1, config, device="cuda")
    list(evaluation_batches(source, config, np.arange(4), 4, "cuda"))
    assert told == [("cuda", decoder, {"channels_last": False, "dtype": torch.float32}), "cuda:2"] * 2


@pytest.mark.parametrize("batch", [20, 9])
def test_every_rank_needs_a_whole_group(folder, batch):
    with pytest.raises(
        ValueError, match=rf"batch of {batch} does not divide among 4 ranks in groups of 3 images; .* multiple of 3 from 12"
    ):
        TrainLoader(open_source(str(folder)), GROUPS, seed=1, global_batch=batch, world_size=4)


def test_an_unreadable_image_of_a_group_is_replaced_within_its_identity(tmp_path):
    folder = write_folder(tmp_path / "set", identities=60, images=4)
    (folder / "person04" / "03.jpg").write_bytes(b"text")
    source = open_source(str(folder))
    ((_, labels, indices),) = take(source, 1, GROUPS, global_batch=360)
    wanted = GroupedOrder(source, 3, 5).indices(0, 360)
    assert np.array_equal(indices, np.where(wanted == 19, 16, wanted)) and 19 in wanted
    assert (labels.view(-1, 3) == labels.view(-1, 3)[:, :1]).all()


def test_groups_need_two_images_of_every_identity(folder):
    for name in ("01.jpg", "02.jpg", "03.jpg"):
        (folder / "person02" / name).unlink()
    with pytest.raises(ValueError, match=r"identity 'person02' has 1 image\(s\), but data.images_per_identity = 3"):
        TrainLoader(open_source(str(folder)), GROUPS, seed=1, global_batch=12)


def test_threads_and_prefetch_change_nothing(folder):
    source = open_source(str(folder))
    expected = joined(take(source, 4))
    for threads, prefetch in ((1, 1), (3, 4)):
        assert same(expected, joined(take(source, 4, DataConfig(image_size=32, threads=threads, prefetch=prefetch, augment=ALL))))


def test_a_batch_larger_than_the_set(folder):
    ((_, _, indices),) = take(open_source(str(folder)), 1, global_batch=60)
    assert np.array_equal(np.sort(indices[:24]), np.arange(24))
    assert len(indices) == 60


def test_a_busy_consumer_does_not_wait(folder):
    loader = TrainLoader(open_source(str(folder)), CONFIG, seed=1, global_batch=8)
    next(loader)
    waited = loader.wait_seconds
    for _ in range(10):
        time.sleep(0.05)
        next(loader)
    assert loader.wait_seconds - waited < 0.1
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)


def test_every_rank_needs_an_image(folder):
    with pytest.raises(ValueError, match="global batch of 3 does not divide among 4 ranks; choose at least 4"):
        TrainLoader(open_source(str(folder)), CONFIG, seed=1, global_batch=3, world_size=4)


def damages():
    png = picture(1, 32, ".png")
    return {
        "empty": b"",
        "text": b"this is not an image\n" * 20,
        "half a JPEG": picture(1)[: len(picture(1)) // 2],
        "JPEG without its end": picture(1)[:-2],
        "JPEG filled up with zeros": picture(1)[:-300] + bytes(300),
        "JPEG header": picture(1)[:100],
        "half a PNG": png[: len(png) // 2],
        "PNG without its end": png[:-12],
        "PNG with changed bytes": png[:200] + b"\x55\xaa\x55" + png[203:],
    }


@pytest.mark.parametrize("kind", damages())
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_unreadable_image_is_replaced_and_named(tmp_path, kind, world_size):
    folder = write_folder(tmp_path / "set", identities=30, images=4)
    (folder / "person04" / "03.jpg").write_bytes(damages()[kind])
    source = open_source(str(folder))
    listed = tmp_path / "runs" / "skipped.txt"
    found = []
    for rank in range(world_size):
        options = {"seed": 5, "global_batch": 20, "rank": rank, "world_size": world_size, "skipped_path": str(listed)}
        loader = TrainLoader(source, PLAIN, **options)
        found.append([next(loader) for _ in range(6)])
        time.sleep(0.2)
        loader.close()
        if world_size == 1:
            assert loader.skipped == [f"{folder}/person04/03.jpg"]
    images, labels, indices = joined([batch for batches in zip(*found, strict=True) for batch in batches])
    wanted = UniformOrder(120, 5).indices(0, 120)
    assert np.array_equal(indices, np.where(wanted == 19, 20, wanted))
    assert labels[wanted == 19].tolist() == [5]
    assert torch.equal(images[wanted == 19], images[wanted == 20])
    names, reasons = zip(*(line.split("\t") for line in listed.read_text().splitlines()), strict=True)
    assert set(names) == {f"{folder}/person04/03.jpg"} and all(reasons)


def test_neighbouring_and_last_unreadable_images(tmp_path):
    folder = write_folder(tmp_path / "set", identities=100, images=4)
    for name in ("person99/02.jpg", "person99/03.jpg", "person00/00.jpg"):
        (folder / name).write_bytes(b"text")
    ((_, labels, indices),) = take(open_source(str(folder)), 1, PLAIN, global_batch=400)
    wanted = UniformOrder(400, 5).indices(0, 400)
    assert np.array_equal(indices, np.where(np.isin(wanted, (398, 399, 0)), 1, wanted))
    assert labels[np.flatnonzero(wanted == 398)[0]] == 0


def test_a_file_that_vanishes_is_unreadable(tmp_path):
    folder = write_folder(tmp_path / "set", identities=30, images=4)
    source = open_source(str(folder))
    (folder / "person04" / "03.jpg").unlink()
    assert 19 not in take(source, 1, PLAIN, global_batch=120)[0].indices


@pytest.mark.parametrize("listed", [True, False])
def test_more_than_one_percent_ends_the_run(tmp_path, listed):
    folder = write_folder(tmp_path / "set", identities=30, images=4)
    for name in ("person04/03.jpg", "person20/00.jpg"):
        (folder / name).write_bytes(b"text")
    path = str(tmp_path / "skipped.txt") if listed else None
    with pytest.raises(ValueError, match=r"2 unreadable images among the first .* more than 1%") as error:
        take(open_source(str(folder)), 6, PLAIN, global_batch=20, skipped_path=path)
    assert (path or "person04/03.jpg") in str(error.value)


def test_nothing_readable_ends_the_run(tmp_path):
    (tmp_path / "set" / "anna").mkdir(parents=True)
    (tmp_path / "set" / "anna" / "1.jpg").write_bytes(b"text")
    with pytest.raises(ValueError, match="more than 1%"):
        take(open_source(str(tmp_path / "set")), 1)


def test_nothing_readable_ends_the_run_with_batches_of_one(tmp_path):
    folder = write_folder(tmp_path / "set", identities=60, images=4)
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"text")
    with pytest.raises(ValueError, match="more than 1%"):
        take(open_source(str(folder)), 1, global_batch=1)


def test_evaluation_gives_the_asked_images_unchanged(folder):
    source = open_source(str(folder))
    asked = np.array([5, 3, 23, 0, 5, 7, 11])
    batches = list(evaluation_batches(source, CONFIG, asked, 3, "cpu"))
    assert [len(batch.labels) for batch in batches] == [3, 3, 1]
    images, labels, indices = joined(batches)
    assert np.array_equal(indices, asked)
    assert np.array_equal(labels.numpy(), source.labels[asked])
    assert torch.equal(images[0], images[4])
    training, _, order = joined(take(source, 3, PLAIN))
    assert torch.equal(images[0], training[order == 5][0])
    assert list(evaluation_batches(source, CONFIG, asked[:0], 3)) == []


def test_evaluation_leaves_unreadable_images_out(folder, caplog):
    for name in ("person00/03.jpg", "person01/00.jpg", "person01/01.jpg", "person02/01.jpg"):
        (folder / name).write_bytes(b"text")
    batches = list(evaluation_batches(open_source(str(folder)), PLAIN, np.arange(12), 3))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2], [6, 7, 8], [10, 11]]
    assert all(len(batch.images) == len(batch.labels) == len(batch.indices) for batch in batches)
    assert "person02/01.jpg" in caplog.text


def test_a_process_ends_quietly_with_an_open_loader(folder):
    """DALI shuts its pipelines down at the end; the thread that feeds must have stopped before."""
    lines = [
        "from dali_loaders import DataConfig, TrainLoader, open_source",
        f"loader = TrainLoader(open_source({str(folder)!r}), DataConfig(image_size=32, threads=2), seed=1, global_batch=8)",
        "next(loader)",
    ]
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
