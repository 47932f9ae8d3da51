"""What was saved is read back: any shapes, types and layouts, from parts of any number of ranks, in any ranges; and no more of a file is
read than that takes."""

from __future__ import annotations

import math
import tracemalloc
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import checkpoint
from pipeline.checkpoint import Held, data_file, manifest, reading
from pipeline.checkpoint.stores import LocalStore
from tests.pipeline.checkpoint.threads import on_threads

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
LAYOUTS = st.sampled_from(["plain", "transposed", "every second", "channels last"])


@st.composite
def tensors(draw):
    shape, dtype = draw(SHAPES), draw(st.sampled_from(list(data_file.NAMES)))
    size = math.prod(shape)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tensor = torch.randint(0, 2 if dtype == torch.bool else 100, (2 * size,), generator=generator).to(dtype)[:size].view(shape)
    layout = draw(LAYOUTS)
    if layout == "transposed" and tensor.ndim > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every second" and tensor.ndim:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if layout == "channels last" and tensor.ndim == 4:
        return tensor.to(memory_format=torch.channels_last)
    return tensor


def part_of(tensor, cuts, rank):
    """The range between two cuts, as an engine that shards flat tensors has it."""
    flat = tensor.reshape(-1)
    return checkpoint.Part(flat[cuts[rank] : cuts[rank + 1]], tuple(tensor.shape), cuts[rank])


@settings(max_examples=80, deadline=None)
@given(data=st.data(), ranks=st.integers(1, 5), block=st.sampled_from([4, 16, 64, 1 << 20]))
def test_any_state_comes_back(tmp_path_factory, data, ranks, block):
    folder = str(tmp_path_factory.mktemp("any"))
    wholes = {f"t{number}": tensor for number, tensor in enumerate(data.draw(st.lists(tensors(), min_size=1, max_size=4)))}
    cuts = {}
    for name, tensor in wholes.items():
        if data.draw(st.booleans()):
            between = data.draw(st.lists(st.integers(0, tensor.numel()), min_size=ranks - 1, max_size=ranks - 1).map(sorted))
            cuts[name] = [0, *between, tensor.numel()]

    def save(agreement):
        parts = {
            name: part_of(tensor, cuts[name], agreement.rank) if name in cuts else checkpoint.whole(tensor)
            for name, tensor in wholes.items()
        }
        saver = checkpoint.Saver(folder, checkpoint.CheckpointConfig(asynchronous=data_is_copied), agreement)
        saver.start(1, parts, {})
        saver.finish()
        assert saver.trouble is None

    data_is_copied = data.draw(st.booleans())
    with ExitStack() as sizes:
        for module in (data_file, reading, manifest):
            sizes.enter_context(mock.patch.object(module, "BLOCK", block))
        for module in (data_file, reading):
            sizes.enter_context(mock.patch.object(module, "CHUNK", 4 * block))
        on_threads(ranks, save)
        saved, held = checkpoint.newest(folder), Held(wholes)
        assert set(saved) == set(held) == set(wholes)
        for name, tensor in wholes.items():
            assert (saved.shape(name), saved.dtype(name)) == (held.shape(name), held.dtype(name))
            assert torch.equal(saved.whole(name), tensor) and torch.equal(held.whole(name), tensor)
            first, last = sorted(data.draw(st.tuples(*[st.integers(0, tensor.numel())] * 2)))
            dtype = data.draw(st.sampled_from([tensor.dtype, torch.float64, torch.float32]))
            for source in (saved, held):
                out = torch.zeros(last - first, dtype=dtype)
                source.fill(name, out, first)
                assert torch.equal(out, tensor.reshape(-1)[first:last].to(dtype))
                spread = torch.zeros((*tensor.shape, 2), dtype=dtype)[..., 1]
                source.fill(name, spread)
                assert torch.equal(spread, tensor.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 41, 99])
def test_numbers_that_are_not_finite_are_found_wherever_they_stand(tmp_path, dtype, value, at):
    bad = torch.zeros(100, dtype=dtype)
    bad[at] = value
    with mock.patch.object(data_file, "CHUNK", 64), pytest.raises(checkpoint.NotFiniteError, match="x is not finite"):
        checkpoint.save(str(tmp_path), 1, {"x": checkpoint.whole(bad)}, {})


def read_by(saved, ranks, rank, rows, width):
    """The rows of one of `ranks` ranks, and the bytes that were read for them."""
    read = []
    original = LocalStore.read_into

    def counting(self, name, file, offset, out):
        read.append(len(out))
        original(self, name, file, offset, out)

    first, last = rows * rank // ranks, rows * (rank + 1) // ranks
    out = torch.empty(last - first, width)
    with mock.patch.object(LocalStore, "read_into", counting):
        saved.fill("prototypes", out, first * width)
    return out, sum(read), max(read)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (4, 1), (1, 4), (2, 5)])
def test_each_rank_reads_its_rows_and_no_more(tmp_path, before, after):
    """At most two blocks for each file that it needs, beside its own bytes; and no memory for more than one of them."""
    rows, width = 200_000, 16
    whole = torch.arange(rows * width, dtype=torch.float32).view(rows, width)

    def save(agreement):
        first, last = (rows * at // agreement.ranks for at in (agreement.rank, agreement.rank + 1))
        saver = checkpoint.Saver(str(tmp_path), checkpoint.CheckpointConfig(asynchronous=False), agreement)
        saver.start(1, {"prototypes": checkpoint.rows(whole[first:last], first, rows)}, {})

    on_threads(before, save)
    got = []
    for rank in range(after):
        saved = checkpoint.newest(str(tmp_path))
        tracemalloc.start()
        out, read, _ = read_by(saved, after, rank, rows, width)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        files = len({entry.file for entry in saved.manifest.tensors["prototypes"]})
        assert read <= 4 * out.numel() + 2 * data_file.BLOCK * min(files, before // after + 2)
        assert peak < 4 * data_file.BLOCK + (1 << 19)
        got.append(out)
    assert torch.equal(torch.cat(got), whole)


def test_verifying_reads_everything_once_over_all_ranks(tmp_path):
    data = {"prototypes": checkpoint.whole(torch.ones(40, 1 << 17))}
    checkpoint.save(str(tmp_path), 1, data, {}, identities=["x"])
    read = []
    original = LocalStore.read_into

    def counting(self, name, file, offset, out):
        read.append((file, offset, len(out)))
        original(self, name, file, offset, out)

    with mock.patch.object(LocalStore, "read_into", counting):
        found = on_threads(3, lambda agreement: checkpoint.newest(str(tmp_path), agreement))[0]
    blocks = [entry for entry in read if entry[0] != checkpoint.MANIFEST]
    assert sum(length for *_, length in blocks) == sum(file.bytes for file in found.manifest.files.values())
    assert len(set(blocks)) == len(blocks)
