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
from pipeline import backbones
from pipeline.backbones import BackboneConfig
from pipeline.checkpoint import CheckpointConfig, Saver
from pipeline.classifier_state import state_of
from pipeline.cli import main
from pipeline.distributed import join
from pipeline.ema import Ema
from pipeline.engine import EngineConfig, build_engine
from pipeline.engine.parameters import freeze
from pipeline.plan import BYTES, GIB, PRESETS, Job, estimates, find_hardware, memory, on_host, plan, seconds
from pipeline.resolve import resolve
from pipeline.schedule import OptimizerConfig

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
    classifier = PartialFC(203, 24, loss, rate, storage_dtype=storage_dtype, class_counts=torch.ones(203))
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
    expected = memory(job, H100)
    assert max(results) == (expected["prototypes"], expected["optimizer"], expected["gradient"])


def test_a_bank_is_counted():
    classifier = PartialFC(203, 24, losses.build("cosface"), substitution_rate=0.5, substitution_source="bank")
    assert classifier.bank is not None
    job = Job(203, width=24, bank=True)
    assert memory(job, H100)["bank"] == bytes_of(*classifier.bank) and memory(replace(job, bank=False), H100)["bank"] == 0


def kept(job):
    """Bytes that grow with the classes; tiles, divided evenly, may shrink with them."""
    lines = memory(job, H100)
    return sum(lines[name] for name in ("prototypes", "optimizer", "gradient", "bank", "sample"))


@given(JOBS)
def test_more_work_never_takes_less(job):
    step = max(seconds(job, H100).values())
    for larger in (replace(job, identities=2 * job.identities), replace(job, width=job.width + 1), replace(job, optimizer="adamw")):
        assert kept(larger) >= kept(job) and max(seconds(larger, H100).values()) >= step
    assert max(seconds(replace(job, batch=job.batch + 1), H100).values()) >= step
    assert kept(replace(job, in_backward=True)) <= kept(job)
    assert kept(replace(job, storage_dtype="bfloat16")) <= kept(job)
    assert memory(replace(job, ranks=2 * job.ranks), H100)["prototypes"] <= memory(job, H100)["prototypes"]


@given(JOBS)
def test_what_does_not_fit_names_what_does(job):
    made = plan(job, H100)
    assert made.total == sum(made.memory.values()) + sum(made.estimates.values())
    if made.left >= 0:
        assert not made.alternatives
    else:
        assert made.alternatives[-1].options.startswith("--ranks") and made.alternatives[-1].fits
        assert all(tried.total <= made.total for tried in made.alternatives)


def test_the_cost_model_of_the_field():
    """10M classes on 8 GPUs, rate 0.1, batch 1024: 22 bytes an element for the update, 8 for two passes over the sample."""
    job = Job(10_000_000, ranks=8, rate=0.1)
    elements = (125_000 + 1024 / 8) * 512
    assert seconds(job, H100) == pytest.approx(
        {
            "compute": 8 * 1024 * elements / 989e12,
            "memory": 30 * elements / 3.35e12,
            "network": ((8 * 512 + 24) * 1024 + 16 * 8) * 7 / 8 / 450e9,
        }
    )
    assert plan(job, H100).bound_by == "memory" and plan(replace(job, dtype="float32"), H100).bound_by == "compute"


def test_too_big_says_so_and_what_to_try(capsys):
    assert main(["plan", "--identities", "30000000", "--hardware", "a100-40gb", "--backbone", "none"]) == 0
    out = capsys.readouterr().out
    assert "It does not fit" in out and ", which fits" in out and ", still too many" in out
    assert "--in-backward" in out and "--set optimizer.in_backward=true" in out
    assert "--storage-dtype bfloat16" in out and "--set classifier.storage_dtype=bfloat16" in out
    assert "--ranks 8 " in out


@pytest.mark.parametrize(
    "job",
    [
        Job(30_000_000),
        Job(30_000_000, ranks=2, batch=300, backbone="iresnet18"),
        Job(100_000, batch=8192, ranks=4, backbone="iresnet100"),
        Job(100_000_000, batch=4, ranks=2, accumulation=1, backbone="iresnet18", rate=0.5),
    ],
)
def test_advice_is_what_train_can_do(job):
    """Every setting is a field of a recipe, and every rank has 2 images of each equal micro-batch."""
    made = plan(job, PRESETS["a100-40gb"])
    assert made.left < 0 and made.alternatives[-1].fits
    for tried in made.alternatives:
        options, _, fields = tried.settings.partition("--set ")
        run = resolve("ms1mv3_iresnet50_arcface_8gpu", [f"run.batch={job.batch}", *fields.split()]).run
        ranks = int(options.split()[1]) if options else job.ranks
        assert run.batch % run.accumulation == 0 and run.batch >= 2 * ranks * run.accumulation
    assert any("run.accumulation" in tried.settings for tried in made.alternatives) == (job.batch == 8192)


def test_a_backbone_is_counted_and_none_is_not(capsys):
    arguments = ["plan", "--identities", "1000000", "--ranks", "8", "--hardware", "h100-80gb"]
    assert main([*arguments, "--json"]) == 0 and main([*arguments, "--backbone", "none", "--json"]) == 0
    whole, alone = map(json.loads, capsys.readouterr().out.replace("}\n{", "}\0{").split("\0"))
    assert whole["memory"]["activations"] > 4 * GIB and whole["memory"]["backbone"] > 43_000_000 * 4
    assert not any(alone["memory"][name] for name in ("backbone", "its gradients", "its optimizer", "activations", "images"))
    assert all(whole["memory"][name] == alone["memory"][name] for name in ("prototypes", "optimizer", "gradient"))
    assert whole["left"] < alone["left"] - 4 * GIB


def test_what_only_a_gpu_knows_is_called_an_estimate(capsys):
    assert main(["plan", "--identities", "1000", "--ranks", "8", "--hardware", "h200"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "estimate, not measured on a GPU" in line]
    assert [line[2:16].strip() for line in lines] == ["CUDA context", "cuBLAS, cuDNN", "NCCL", "DALI"]


def test_a_gpu_without_bfloat16_is_planned_in_float32_and_said_to_need_other_builds(capsys):
    assert main(["plan", "--identities", "1000", "--hardware", "v100-32gb", "--batch", "128"]) == 0
    out = capsys.readouterr().out
    assert "only with builds for CUDA 12.6" in out and "float32" in out.splitlines()[1]
    job = Job(1000, batch=128, backbone="iresnet18")
    floats, halves = (memory(job, PRESETS[name])["activations"] for name in ("v100-32gb", "h100-80gb"))
    assert 1.9 * halves < floats < 2.1 * halves


def test_micro_batches_share_the_activations():
    job = Job(100_000, batch=1024, backbone="iresnet18")
    whole, half = memory(job, H100), memory(replace(job, accumulation=2), H100)
    assert half["activations"] < 0.51 * whole["activations"] and half["images"] == whole["images"] // 2
    assert half["its gradients"] == whole["its gradients"]
    assert half["gradient"] == 2 * whole["gradient"]  # the sum and the next one
    assert memory(replace(job, accumulation=4), H100)["gradient"] == 2 * whole["gradient"]
    sampled = replace(job, rate=0.1)
    assert memory(replace(sampled, accumulation=2), H100)["gradient"] == 2 * memory(sampled, H100)["gradient"]


def test_json(capsys):
    assert main(["plan", "--identities", "1000000", "--hardware", "h100-80gb", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["fits"] and made["bound_by"] in made["seconds"] and made["step_seconds"] == max(made["seconds"].values())
    assert made["total"] == sum(made["memory"].values()) + sum(made["estimates"].values())
    assert made["memory"]["prototypes"] == 1_000_000 * 512 * 4
    assert made["left"] == round(0.95 * 80 * GIB) - made["total"]


def test_this_machine_is_measured():
    job = Job(1000, width=32, batch=16, ranks=2)
    here = find_hardware("here", job, network=1e9)
    assert not estimates(job, here) or here.is_gpu
    assert here.memory > GIB // 4 and min(here.float32, here.bfloat16) > 1e6 and here.memory_rate > 1e8 and here.network == 1e9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--identities", "0"], "--identities is 0, but must be at least 1"),
        (["--identities", "9", "--rate", "0"], "--rate is 0.0, but must be above 0 and at most 1"),
        (["--identities", "9", "--hardware", "h900"], "choose here, or one of h100-80gb"),
        (["--identities", "9", "--network", "-1"], "--network is -1 GB/s, but must be positive"),
        (["--identities", "9", "--backbone", "iresnet51"], "did you mean 'iresnet50'"),
        (["--identities", "9", "--image-size", "100"], "needs an image size divisible by 16"),
        (["--identities", "9", "--batch", "100", "--ranks", "51"], "use at least 102"),
        (["--identities", "9", "--batch", "33", "--ranks", "8", "--accumulation", "2"], "use a multiple of 2 from 32 on"),
        (["--identities", "9", "--in-backward", "--accumulation", "2"], "choose one"),
        (["--identities", "9", "--engine", "deepspeed", "--zero-stage", "3", "--ema"], "--ema averages whole weights"),
        (["--identities", "9", "--nodes", "0"], "--nodes is 0, but must be at least 1"),
        (["--identities", "9", "--nodes", "8"], "--nodes 8 needs --between GB/s"),
        (["--identities", "9", "--nodes", "8", "--between", "0"], "--between is 0 GB/s, but must be positive"),
        (["--identities", "9", "--nodes", "1", "--latency", "20"], "--latency '20' is no time: give a number with its unit"),
        (["--identities", "9", "--nodes", "1", "--step-ms", "0"], "--step-ms is 0, but must be positive"),
        (["--identities", "9", "--between", "50"], "--between is about many nodes: say how many with --nodes"),
        (["--identities", "9", "--latency", "10us"], "--latency is about many nodes"),
        (["--identities", "9", "--compress"], "--compress is about many nodes"),
        (["--identities", "9", "--gather-dtype", "float32"], "--gather-dtype is about many nodes"),
        (["--identities", "9", "--log-every", "20"], "--log-every is about many nodes"),
        (["--identities", "9", "--frozen", "conv1,body"], "'body' names no parameter of the backbone"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, words, capsys):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("protoshard: ") and words in error and error.count("\n") == 1


def test_the_help_names_every_preset(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in PRESETS)


def test_activations_that_are_computed_again(capsys):
    arguments = ["plan", "--identities", "1000000", "--ranks", "8", "--batch", "2048", "--hardware", "a100-40gb", "--backbone", "vit_b"]
    assert main([*arguments, "--json"]) == 0 and main([*arguments, "--checkpoint-activations", "--json"]) == 0
    kept, again = (json.loads(part)["memory"] for part in capsys.readouterr().out.replace("}\n{", "}\0{").split("\0"))
    assert again["activations"] < 0.15 * kept["activations"] and again["work"] > kept["work"]
    assert main([*arguments, "--batch", "8192"]) == 0
    out = capsys.readouterr().out
    assert "--set backbone.checkpoint_activations=true" in out and "--checkpoint-activations" in out
    assert main([*arguments, "--batch", "8192", "--checkpoint-activations"]) == 0
    out = capsys.readouterr().out
    assert "activations computed again" in out and "It fits" in out


def copied_bytes(optimizer, engine, zero_stage, frozen, averages):
    """Runs on every rank: (bytes that an asynchronous save keeps, those of the optimizer's state, those of the average)."""
    config = OptimizerConfig(name=optimizer, classifier=optimizer)
    module = backbones.build(BackboneConfig("iresnet18", width=64), 112)
    freeze(module, frozen)
    engine = build_engine(EngineConfig(engine, zero_stage=zero_stage, precision="float32"), config, module, join("cpu"), 1)
    classifier = PartialFC(50_000, 64, "cosface")
    rows = {"sgd": RowSGD, "adamw": RowAdamW}[optimizer](classifier, lr=0.1)
    state, ema = {**engine.state(), **state_of(classifier, rows)}, Ema(0.9)
    if averages:
        ema.restart(module)
        state |= ema.state(module)
    saver = Saver("nowhere", CheckpointConfig())
    saver.reserve(state)
    own = bytes_of(*(part.tensor for name, part in state.items() if name.startswith("optimizer.") and not name.endswith(".step")))
    return len(saver.copy.buffer), own, bytes_of(*ema.averages.values())


@pytest.mark.parametrize(
    ("optimizer", "engine", "zero_stage", "frozen", "averages"),
    [
        ("sgd", "ddp", 1, (), False),
        ("adamw", "ddp", 1, (), True),
        ("adamw", "ddp", 1, ("layer*", "conv1"), True),
        ("sgd", "ddp", 1, ("*",), False),
        ("sgd", "deepspeed", 1, ("layer*", "conv1"), True),
        ("adamw", "deepspeed", 3, ("layer3",), False),
    ],
)
def test_the_copy_for_saves_is_what_a_rank_writes(ranks, optimizer, engine, zero_stage, frozen, averages):
    options = {"engine": engine, "zero_stage": zero_stage, "frozen": frozen, "ema": averages}
    job = Job(50_000, 64, batch=8, ranks=2, backbone="iresnet18", optimizer=optimizer, backbone_optimizer=optimizer, **options)
    lines = memory(job, replace(H100, is_gpu=False))
    planned = lines["copy for saves"]
    copies, states, averages = zip(*ranks(2).run(copied_bytes, optimizer, engine, zero_stage, frozen, averages), strict=True)
    assert planned == pytest.approx(max(copies), rel=0.03)
    assert lines["its optimizer"] == pytest.approx(max(states), rel=1e-3) and lines["its average"] == averages[0]
    assert memory(replace(job, asynchronous=False), replace(H100, is_gpu=False))["copy for saves"] == 0
    assert "copy for saves" not in memory(job, H100) and on_host(job, H100)["copy for saves"] == planned


def test_one_rank_writes_the_largest_tensor():
    """Which on many ranks is more than each one's share."""
    job = Job(1000, 512, batch=256, ranks=128, backbone="iresnet50")
    weight = 25088 * 512 * 4
    assert on_host(job, H100)["copy for saves"] == pytest.approx(weight + 2 * 8 * 512 * 4, rel=1e-6)


def test_what_is_frozen_keeps_nothing_for_backward():
    job = Job(1000, 64, batch=32, ranks=2, backbone="iresnet18")
    whole, head, nothing = (memory(replace(job, frozen=frozen), H100) for frozen in ((), ("layer*", "conv1", "bn1", "prelu"), ("*",)))
    assert 0 < head["its gradients"] < 0.5 * whole["its gradients"] and 0 < head["activations"] < 0.1 * whole["activations"]
    assert nothing["its gradients"] == nothing["its optimizer"] == nothing["activations"] == 0
    outputs = 64 * 112 * 112 * 2 * job.local  # of the first layers, in bfloat16
    assert nothing["backbone"] == whole["backbone"] and nothing["work"] >= 3 * outputs
