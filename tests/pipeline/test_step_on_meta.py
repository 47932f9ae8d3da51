"""The step of a run at world size 32, in one process: tensors are on the meta device, which has no data that a host could read, and the
process group is torch's fake one. Every collective is compared, with its bytes, with what docstrings say."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dali_loaders import Batch
from partial_fc import PartialFC, batch_check, collectives
from partial_fc.classifier import ClassifierConfig
from partial_fc.optimizers import adamw, sgd
from pipeline import trainer, training_step
from pipeline.agreement import Agreement
from pipeline.distributed import Place
from tests.partial_fc.test_no_host_read import unfused
from tests.pipeline.runs import configuration, faces

RANKS, ROWS, WIDTH = 32, 2, 16
SAMPLES = RANKS * ROWS
FLOATS = torch.float32.itemsize


@pytest.fixture
def seen(monkeypatch):
    """(name, bytes of the whole, of which a ring of N ranks sends (N-1)/N, or twice that for an all-reduce), in order."""
    found = []

    def watch(module, name):
        original = getattr(module, name)

        def watched(*args, **options):
            found.append((name.strip("_"), max(x.nbytes for x in args if isinstance(x, torch.Tensor))))
            return original(*args, **options)

        monkeypatch.setattr(module, name, watched)

    for name in ("all_reduce", "broadcast", "all_gather", "all_to_all_single"):
        watch(dist, name)
    for name in ("_all_gather", "_reduce_scatter"):
        watch(collectives, name)
    return found


class NoNumbers:
    """Equal numbers of rows and other shards on all ranks, which the meta device cannot tell."""

    is_ready = True

    def __init__(self, _):
        pass

    def read(self):
        return [(0, rank) for rank in range(RANKS)]


class Zero:
    """The gradient is finite."""

    def __init__(self, _):
        pass

    def read(self):
        return [0.0]


class Alone:
    """Ranks whose hosts tell each other nothing."""

    is_alone, rank, ranks, group = True, 0, 1, None
    highest, gather, of_first = Agreement.highest, Agreement.gather, Agreement.of_first

    def __init__(self, *_):
        pass


@pytest.fixture
def fake_ranks(monkeypatch):
    """32 ranks, of which this process is number 3; and stand-ins for what has no form on the meta device: see test_no_host_read."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=RANKS)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    for module, name in ((sgd, "sgd"), (adamw, "adamw")):
        monkeypatch.setattr(module, name, unfused(getattr(module, name)))
    monkeypatch.setattr(PartialFC, "_check", lambda *_: None)
    monkeypatch.setattr(batch_check, "ToHost", NoNumbers)
    monkeypatch.setattr(training_step, "ToHost", Zero)
    monkeypatch.setattr(trainer, "Agreement", Alone)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda module, *_, **__: module)  # its gradients are torch's affair
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))  # refuses the device
    yield
    dist.destroy_process_group()


TOLD = ("all_gather", 16 * RANKS)


def batches(*_, **options):
    local = options["global_batch"] // options["world_size"]
    while True:
        yield Batch(torch.zeros(local, 3, 32, 32, device="meta"), torch.zeros(local, dtype=torch.int64, device="meta"), None)


@pytest.fixture
def step_of(fake_ranks, seen, tmp_path, monkeypatch):
    return partial(collectives_of_a_step, seen, tmp_path, monkeypatch)


def collectives_of_a_step(seen, tmp_path, monkeypatch, accumulation=1, in_backward=False, **options):
    """Of the second step."""
    monkeypatch.setattr(trainer, "TrainLoader", batches)
    config = configuration(
        faces(str(tmp_path)),
        str(tmp_path / "run"),
        9,
        run={"batch": SAMPLES * accumulation, "accumulation": accumulation, "log_every": 99, "epochs": 99},
    )
    config = replace(config, classifier=ClassifierConfig(**options), optimizer=replace(config.optimizer, in_backward=in_backward))
    run = trainer.Trainer(config, Place(3, RANKS, torch.device("meta")), resume="none")
    run._train_step()
    seen.clear()
    run._train_step()
    return seen


DECIDED = ("all_reduce", FLOATS)  # whether the gradient is finite: of one number, once a step


def forward_and_backward(float_bytes=FLOATS):
    """PartialFC.forward: 1 all-gather of 2 N numbers, 1 of B D floats, 1 of B labels, CosFace's all-reduce of 2 B floats; backward 1
    reduce-scatter."""
    return [
        TOLD,
        ("all_gather", SAMPLES * WIDTH * float_bytes),
        ("all_gather", SAMPLES * 8),
        ("all_reduce", 2 * SAMPLES * FLOATS),
        ("reduce_scatter", SAMPLES * WIDTH * FLOATS),
    ]


@pytest.mark.parametrize("in_backward", [False, True])
def test_all_classes(step_of, in_backward):
    assert step_of(in_backward=in_backward) == [*forward_and_backward(), DECIDED]


def test_sampled_classes_with_micro_batches(step_of):
    found = step_of(accumulation=2, sample_rate=0.5)
    assert found == [
        TOLD,
        ("all_gather", 2 * SAMPLES * 8),
        *forward_and_backward(),
        *forward_and_backward(),
        DECIDED,
    ]  # begin_step gathers labels


def test_features_that_travel_in_bfloat16(step_of):
    assert step_of(gather_dtype="bfloat16") == [*forward_and_backward(float_bytes=2), DECIDED]


def test_hard_negatives(step_of):
    """nearest_classes: 1 all-reduce of B D floats and 1 all-gather of (3 k + 1) N B."""
    k = 2
    found = step_of(sample_rate=0.5, hard_negatives=k)
    nearest = [("all_reduce", SAMPLES * WIDTH * FLOATS), ("all_gather", (3 * k + 1) * RANKS * SAMPLES * FLOATS)]
    gathered, rest = forward_and_backward()[:3], forward_and_backward()[3:]
    assert found == [*gathered, *nearest, *rest, DECIDED]


def test_substitution_communicates_nothing_more(step_of):
    assert step_of(substitution_rate=0.5) == [*forward_and_backward(), DECIDED]
