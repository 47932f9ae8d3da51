"""`protoshard plan`: its bytes are the real ones, it moves the right way, and it says what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partial_fc import PartialFC, losses
from partial_fc.optimizers import RowAdamW, RowSGD
from pipeline.cli import main
from pipeline.plan import BYTES, GIB, PRESETS, Job, find_hardware, memory, plan, seconds

H100 = PRESETS["h100-80gb"]
JOBS = st.builds(
    Job,
    identities=st.integers(1, 10**8),
    width=st.integers(1, 1024),
    batch=st.integers(1, 1 << 16),
    ranks=st.integers(1, 512),
    rate=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    optimizer=st.sampled_from(["sgd", "adamw"]),
    dtype=st.sampled_from(list(BYTES)),
    storage_dtype=st.sampled_from(list(BYTES)),
    in_backward=st.booleans(),
    bank=st.booleans(),
)


def bytes_of(*tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def real_bytes(rate, storage_dtype, optimizer_name, size):
    """(prototypes, optimizer state, gradient) of the rank."""
    loss = losses.build("cosface")
    classifier = PartialFC(203, 24, loss, rate, storage_dtype=storage_dtype)
    optimizer = {"sgd": RowSGD, "adamw": RowAdamW}[optimizer_name](classifier, lr=0.1)
    generator = torch.Generator().manual_seed(0)
    classifier(torch.randn(16 // size, 24, generator=generator).requires_grad_(), torch.randint(0, 203, (16 // size,))).backward()
    gradient = classifier.prototypes.grad
    assert gradient is not None
    values = gradient._values() if gradient.is_sparse else gradient
    state = [value for value in optimizer.state[classifier.prototypes].values() if value.ndim]  # not the count of steps
    return bytes_of(classifier.prototypes), bytes_of(*state), bytes_of(values)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("storage_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_bytes_are_those_of_a_classifier_and_its_optimizer(ranks, rate, storage_dtype, optimizer, size):
    job = Job(203, width=24, batch=16 // size * size, ranks=size, rate=rate, storage_dtype=storage_dtype, optimizer=optimizer)
    arguments = rate, storage_dtype, optimizer, size
    results = [real_bytes(*arguments)] if size == 1 else ranks(size).run(real_bytes, *arguments)
    expected = memory(job)
    assert max(results) == (expected["prototypes"], expected["optimizer"], expected["gradient"])


def test_a_bank_is_counted():
    classifier = PartialFC(203, 24, losses.build("cosface"), substitution_rate=0.5, substitution_source="bank")
    assert classifier.bank is not None
    job = Job(203, width=24, bank=True)
    assert memory(job)["bank"] == bytes_of(*classifier.bank) and memory(replace(job, bank=False))["bank"] == 0


@given(JOBS)
def test_more_work_never_takes_less(job):
    total, step = sum(memory(job).values()), max(seconds(job, H100).values())
    for larger in (replace(job, identities=2 * job.identities), replace(job, width=job.width + 1), replace(job, optimizer="adamw")):
        assert sum(memory(larger).values()) >= total and max(seconds(larger, H100).values()) >= step
    assert max(seconds(replace(job, batch=job.batch + 1), H100).values()) >= step
    assert sum(memory(replace(job, in_backward=True)).values()) <= total
    assert sum(memory(replace(job, storage_dtype="bfloat16")).values()) <= total
    assert memory(replace(job, ranks=2 * job.ranks))["prototypes"] <= memory(job)["prototypes"]


@given(JOBS)
def test_what_does_not_fit_names_what_does(job):
    made = plan(job, H100)
    assert made.total == sum(made.memory.values())
    if made.left >= 0:
        assert not made.alternatives
    else:
        assert made.alternatives
        *_, (last, total) = made.alternatives.items()
        if last.startswith("--ranks"):
            fewest = int(last.split()[1])
            assert total <= 0.9 * H100.memory and plan(replace(job, ranks=fewest - 1), H100).left < 0


def test_the_cost_model_of_the_field():
    """10M classes on 8 GPUs, rate 0.1, batch 1024: 22 bytes an element for the update, 8 for two passes over the sample."""
    job = Job(10_000_000, ranks=8, rate=0.1)
    elements = (125_000 + 1024 / 8) * 512
    assert seconds(job, H100) == pytest.approx(
        {
            "compute": 8 * 1024 * elements / 989e12,
            "memory": 30 * elements / 3.35e12,
            "network": (8 * 512 + 24) * 1024 * 7 / 8 / 450e9,
        }
    )
    assert plan(job, H100).bound_by == "memory" and plan(replace(job, dtype="float32"), H100).bound_by == "compute"


def test_too_big_says_so_and_what_to_try(capsys):
    assert main(["plan", "--identities", "30000000", "--hardware", "a100-40gb"]) == 0
    out = capsys.readouterr().out
    assert "It does not fit" in out and "--in-backward" in out and "--storage-dtype bfloat16" in out and ", which fits" in out
    assert "--ranks 5" in out


def test_json(capsys):
    assert main(["plan", "--identities", "1000000", "--hardware", "h100-80gb", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["fits"] and made["bound_by"] in made["seconds"] and made["step_seconds"] == max(made["seconds"].values())
    assert made["total"] == sum(made["memory"].values()) and made["memory"]["prototypes"] == 1_000_000 * 512 * 4
    assert made["left"] == round(0.9 * 80 * GIB) - made["total"]


def test_this_machine_is_measured():
    job = Job(1000, width=32, batch=16, ranks=2)
    here = find_hardware("here", job, network=1e9)
    assert here.memory > GIB // 4 and min(here.float32, here.bfloat16) > 1e6 and here.memory_rate > 1e8 and here.network == 1e9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--identities", "0"], "--identities is 0, but must be at least 1"),
        (["--identities", "9", "--rate", "0"], "--rate is 0.0, but must be above 0 and at most 1"),
        (["--identities", "9", "--hardware", "h900"], "choose here, or one of h100-80gb"),
        (["--identities", "9", "--network", "-1"], "--network is -1 GB/s, but must be positive"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, words, capsys):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("protoshard: ") and words in error and error.count("\n") == 1
