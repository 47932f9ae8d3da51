"""`protoshard plan` against torch's own MemTracker, which follows every tensor of a whole training step. The tensors are fake: they have
shapes and no data, and the classifier works as it does on a GPU."""

from __future__ import annotations

import gc
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools import mem_tracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from partial_fc import PartialFC, RowAdamW, RowSGD, device_policy, found_non_finite, losses
from partial_fc.batch_check import BatchCheck, LossCheck, RanksCheck
from partial_fc.kernels import chunked, triton_kernel
from partial_fc.optimizers import RowOptimizer, sgd
from pipeline import backbones
from pipeline.distributed import Place
from pipeline.engine import DDPEngine, DeepSpeedEngine, EngineConfig
from pipeline.plan import PRESETS, Job, memory
from pipeline.plan.memory import BATCHES, BUCKET_BYTES
from pipeline.schedule import OptimizerConfig

H100, MIB = PRESETS["h100-80gb"], 2**20


@pytest.fixture
def on_fake_gpus(monkeypatch):
    """Call it with a number of ranks, of which this process is one; nothing holds data, and the Triton kernel runs without its programs."""

    def start(ranks: int) -> None:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())

    for check in (BatchCheck, LossCheck, RanksCheck):
        monkeypatch.setattr(check, "faults", lambda check: (None, None))  # reads values
    monkeypatch.setattr(RowOptimizer, "_steps", lambda optimizer, parameter: 0)  # too
    monkeypatch.setattr(mem_tracker, "get_untyped_storages", with_sparse(mem_tracker.get_untyped_storages))
    monkeypatch.setattr(triton_kernel, "refusal", lambda problem: None)
    monkeypatch.setattr(triton_kernel, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_kernel, "_programs", NoPrograms)
    monkeypatch.setattr(triton_kernel, "_milliseconds", lambda run, blocks: 0.0)
    monkeypatch.setattr(sgd, "sgd", lambda *tensors, **options: None)  # the fused one moves rows in place, and has no fake form
    for kernel in (chunked, triton_kernel):  # cuBLAS writes float32 sums of bfloat16 products; a CPU would convert the operands
        monkeypatch.setattr(kernel, "multiply", lambda left, right, out, spare=None: out)
    with device_policy.forced(device_policy.GPU), FakeTensorMode():
        yield start
    dist.destroy_process_group()


def with_sparse(storages):
    def of(tensor: Tensor):
        if isinstance(tensor, Tensor) and tensor.is_sparse:
            return {tensor._values().untyped_storage(), tensor._indices().untyped_storage()}
        return storages(tensor)

    return of


class NoPrograms:
    """In place of the module of Triton programs, each of which is called as program[grid](...)."""

    def __getattr__(self, name: str):
        return self

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *arguments, **options: None


def images_of(job: Job, dtype: torch.dtype) -> list[Tensor]:
    shape = job.local, 3, job.image_size, job.image_size
    return [torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in range(BATCHES)]


class Step:
    """The step of pipeline.trainer; the engine's gradients lie in DDP's buckets, which are there from the start."""

    def __init__(self, job: Job) -> None:
        self.job = job
        options = {"dtype": job.dtype, "storage_dtype": job.storage_dtype, "kernel": "triton" if job.dtype == "bfloat16" else "chunked"}
        self.classifier = PartialFC(job.identities, job.width, losses.build("cosface"), job.rate, **options)
        self.row_optimizer = {"sgd": RowSGD, "adamw": RowAdamW}[job.optimizer](self.classifier, lr=0.1, in_backward=job.in_backward)
        self.labels = torch.zeros(job.local, dtype=torch.int64)
        self.held = [self.classifier, self.row_optimizer]
        if job.has_backbone:
            network = backbones.build(job.network, job.image_size).requires_grad_()
            network.to = lambda **format: network  # which fake weights cannot change; convolutions take that of the images
            place = Place(0, 1, torch.device("cpu"))  # of one rank: torch's DDP itself knows no fake tensors
            self.engine = DDPEngine(EngineConfig("ddp", precision="bfloat16"), OptimizerConfig(), network, place)
            for group in [self.engine.optimizer.defaults, *self.engine.optimizer.param_groups]:
                group.update(fused=False, foreach=False)  # the fused one has no fake form
            for parameter in network.parameters():
                parameter.grad = torch.zeros_like(parameter)
            self.images = images_of(job, torch.float16)
            self.held += [network, self.engine.optimizer, *self.images, *(parameter.grad for parameter in network.parameters())]

    def peak(self) -> int:
        tracker = MemTracker()
        tracker.track_external(*self.held)
        with tracker:
            if self.job.has_backbone:
                features_bD = self.engine.forward(self.images[0], True)
            else:
                features_bD = torch.zeros(self.job.local, self.job.width)
            leaf_bD = features_bD.detach().requires_grad_()
            for micro in range(self.job.accumulation):
                if micro:
                    tracker.reset_mod_stats()  # it wants to see a module once
                self.classifier(leaf_bD, self.labels).backward()
            if self.job.has_backbone:
                self.engine.backward(features_bD, leaf_bD.grad, True)
                self.engine.step(0.1, found_non_finite(self.engine.clip(), self.classifier))
            self.row_optimizer.step()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize(
    ("backbone", "again"),
    [
        ("iresnet18", False),
        pytest.param("iresnet50", False, marks=pytest.mark.long),
        pytest.param("iresnet100", False, marks=pytest.mark.long),
        pytest.param("iresnet100", True, marks=pytest.mark.long),
        ("mobilefacenet", False),
        ("vit_t", False),
        ("vit_t", True),
        pytest.param("vit_b", False, marks=pytest.mark.long),
        pytest.param("vit_b", True, marks=pytest.mark.long),
    ],
)
def test_tensors_of_a_step_are_within_a_tenth(on_fake_gpus, backbone, again):
    """Batch 128 on each of 8 GPUs, a million identities, bfloat16. `-s` prints the table of docs/memory.md."""
    job = Job(1_000_000, batch=8 * 128, ranks=8, backbone=backbone, checkpoint_activations=again)
    on_fake_gpus(job.ranks)
    tracked, planned = Step(job).peak(), sum(memory(job, H100).values())
    print(
        f"\n| {backbone}{', checkpointed' if again else ''} | {planned / MIB:,.0f} | {tracked / MIB:,.0f} | {planned / tracked - 1:+.1%} |"
    )
    assert math.isclose(planned, tracked, rel_tol=0.1)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.filterwarnings("ignore:Expected a tensor")  # there is no gradient in backward
@pytest.mark.parametrize(
    "job",
    [
        pytest.param(Job(1_000_000, ranks=8), id="rate 1"),
        pytest.param(Job(1_000_000, ranks=8, dtype="float32"), id="float32, so in torch instead of Triton"),
        pytest.param(Job(200_000, batch=128), id="one GPU"),
        pytest.param(Job(1_000_000, batch=4096, ranks=8, accumulation=4), id="micro-batches"),
        pytest.param(Job(1_000_000, ranks=8, rate=0.1), id="sampled"),
        pytest.param(Job(10_000_000, ranks=8, batch=4096, rate=0.1), id="sampled, large"),
        pytest.param(Job(1_000_000, ranks=8, rate=0.1, in_backward=True), id="sampled, in backward"),
        pytest.param(Job(1_000_000, ranks=8, storage_dtype="bfloat16", in_backward=True), id="rounded, in backward"),
        pytest.param(Job(1_000_000, ranks=8, dtype="float32", storage_dtype="bfloat16", optimizer="adamw"), id="rounded, AdamW"),
        pytest.param(Job(1_000_000, ranks=32, batch=4096, rate=0.2, storage_dtype="bfloat16"), id="sampled, rounded"),
    ],
)
def test_tensors_of_a_classifier_alone(on_fake_gpus, job):
    on_fake_gpus(job.ranks)
    assert math.isclose(sum(memory(job, H100).values()), Step(job).peak(), rel_tol=0.1)


def peak_of_deepspeed(job: Job) -> int:
    """Of a later step on real tensors, without classifier: DeepSpeed knows no fake ones."""
    network = backbones.build(backbones.BackboneConfig(job.backbone, job.width), job.image_size).requires_grad_()
    place = Place(dist.get_rank(), job.ranks, torch.device("cpu"))
    engine = DeepSpeedEngine(
        EngineConfig("deepspeed", zero_stage=job.zero_stage, precision="bfloat16"), OptimizerConfig(), network, place, 1
    )
    images = images_of(job, torch.float32)

    def step() -> None:
        features_bD = engine.forward(images[0], True)
        engine.backward(features_bD, torch.randn_like(features_bD), True)
        engine.clip()
        engine.step(0.1, torch.zeros(()))

    step()
    gc.collect()  # cycles of references sometimes keep tensors of the step before
    tracker = MemTracker()
    tracker.track_external(network, engine.zero.optimizer, *engine._flats(), *images)
    with tracker:
        step()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3])
def test_buffers_of_deepspeed_are_counted(ranks, stage):
    """All that it takes, and not much more: plan adds up what is never there at once."""
    job = Job(2, batch=32, ranks=2, backbone="iresnet18", image_size=32, engine="deepspeed", zero_stage=stage)
    tracked, planned = max(ranks(2).run(peak_of_deepspeed, job)), sum(memory(job, H100).values())
    second = BUCKET_BYTES  # which a CPU does not fill while the first one travels
    assert tracked <= planned - second <= 1.2 * tracked
