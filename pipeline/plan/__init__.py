"""What training will need, before anything of it is allocated: bytes of each rank, the least time of the classifier's part of a step, and
what to try where it does not fit; and the time of a step on many nodes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from pipeline import backbones
from pipeline.plan.hardware import GIB, PRESETS, Hardware, find_hardware
from pipeline.plan.job import BYTES, STATES, Job
from pipeline.plan.memory import estimates, memory, on_host
from pipeline.plan.step_time import Course, Scale, as_dict, as_lines, course, seconds_of

__all__ = [
    "BYTES",
    "GIB",
    "PRESETS",
    "Hardware",
    "Job",
    "Plan",
    "Scale",
    "as_json",
    "as_text",
    "estimates",
    "find_hardware",
    "memory",
    "plan",
    "seconds",
    "seconds_of",
]

USABLE = 0.95  # of a rank's memory; the rest is lost between the blocks of torch's allocator


@dataclass(frozen=True)
class Alternative:
    options: str  # of this command
    settings: str  # the same for `protoshard train`
    total: int  # bytes that it would take
    fits: bool


@dataclass(frozen=True)
class Plan:
    job: Job
    hardware: Hardware
    memory: dict[str, int]  # bytes of one rank's tensors
    estimates: dict[str, int]  # and of what is no tensor
    on_host: dict[str, int]  # for a rank on a GPU, in the memory of its machine
    seconds: dict[str, float]  # least time of each part of the hardware, for the classifier
    alternatives: tuple[Alternative, ...]  # where it does not fit
    course: Course | None = None  # on many nodes

    @property
    def total(self) -> int:
        return sum(self.memory.values()) + sum(self.estimates.values())

    @property
    def left(self) -> int:
        """Negative where it does not fit."""
        return _usable(self.hardware) - self.total

    @property
    def bound_by(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__)


def plan(job: Job, hardware: Hardware, scale: Scale | None = None) -> Plan:
    """scale: numbers of nodes, of which one does `job`"""
    fits = _total(job, hardware) <= _usable(hardware)
    tried = () if fits else alternatives(job, hardware)
    least = seconds(job, hardware)
    scaled = None if scale is None else course(job, hardware, scale, max(least["compute"], least["memory"]))
    return Plan(job, hardware, memory(job, hardware), estimates(job, hardware), on_host(job, hardware), least, tried, scaled)


def _usable(hardware: Hardware) -> int:
    return round(hardware.memory * USABLE)


def _total(job: Job, hardware: Hardware) -> int:
    return sum(memory(job, hardware).values()) + sum(estimates(job, hardware).values())


def seconds(job: Job, hardware: Hardware) -> dict[str, float]:
    """The cost model: the classifier takes at least the longest of these.

    compute  8 B S D operations: logits, again in backward, and two products with them
    memory   S D stored numbers read in forward and in backward of every micro-batch; of the updated rows weight and state read and
             written, and the gradient
    network  a ring of N ranks sends (N-1)/N of: features and their gradient, float32, labels, two sums per sample; and two
             numbers of each rank
    """
    batch, width = job.batch, job.width
    stored = BYTES[job.storage_dtype]
    update = 2 * stored + 8 * STATES[job.optimizer] + (0 if job.in_backward else 6)
    sent = (batch * (8 * width + 24) + 16 * job.ranks) * (job.ranks - 1) / job.ranks
    return {
        "compute": 8 * batch * job.sampled * width / (hardware.bfloat16 if job.dtype == "bfloat16" else hardware.float32),
        "memory": (2 * stored * job.accumulation + update) * job.sampled * width / hardware.memory_rate,
        "network": sent / hardware.network,
    }


# Fields of a recipe, by the option of this command.
FIELDS = {
    "in_backward": "optimizer.in_backward",
    "storage_dtype": "classifier.storage_dtype",
    "rate": "classifier.sample_rate",
    "accumulation": "run.accumulation",
    "batch": "run.batch",
    "asynchronous": "checkpoint.asynchronous",
    "checkpoint_activations": "backbone.checkpoint_activations",
}


def alternatives(job: Job, hardware: Hardware) -> tuple[Alternative, ...]:
    """What to change, where it helps; `protoshard train` can do all of it."""
    changes: list[dict[str, object]] = []
    if not job.in_backward and job.accumulation == 1:
        changes.append({"in_backward": True})
    if job.storage_dtype == "float32":
        changes.append({"storage_dtype": "bfloat16"})
    if len(changes) == 2:
        changes.append({**changes[0], **changes[1]})
    if job.asynchronous and not hardware.is_gpu:
        changes.append({"asynchronous": False})
    if job.rate > 0.1 and not job.in_backward:
        changes.append({"rate": 0.1})
    if job.has_backbone and not job.checkpoint_activations and "checkpoint_activations" in backbones.options(job.backbone):
        changes.append({"checkpoint_activations": True})
    changes += [change for change in (_micro_batches(job, hardware), _ranks(job, hardware) or _smaller_batch(job)) if change]
    tried = (_alternative(job, hardware, change) for change in changes)
    total = _total(job, hardware)
    tenth = (total - _usable(hardware)) // 10  # of what is too many: less is no help
    return tuple(one for one in tried if one.fits or total - one.total >= tenth)


def _alternative(job: Job, hardware: Hardware, change: dict[str, object]) -> Alternative:
    options = " ".join(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in change.items())
    options = options.replace("--asynchronous False", "--synchronous")
    ranks = f"--ranks {change['ranks']}" if "ranks" in change else ""
    fields = " ".join(f"{FIELDS[name]}={str(value).lower()}" for name, value in change.items() if name in FIELDS)
    total = _total(replace(job, **change), hardware)  # type: ignore[arg-type]
    return Alternative(options, f"{ranks} {f'--set {fields}' if fields else ''}".strip(), total, total <= _usable(hardware))


def _micro_batches(job: Job, hardware: Hardware) -> dict[str, object] | None:
    """The fewest with which it fits, twice as many at a time, of at least 2 images for each rank."""
    parts = 2 * job.accumulation
    while job.has_backbone and not job.in_backward and job.batch % parts == 0 and job.batch >= 2 * parts * job.ranks:
        if _total(replace(job, accumulation=parts), hardware) <= _usable(hardware):
            return {"accumulation": parts}
        parts *= 2
    return None


def _ranks(job: Job, hardware: Hardware) -> dict[str, object] | None:
    """Twice as many until it fits; a batch that is too small for them grows."""
    ranks = job.ranks
    while ranks < max(job.identities, job.batch):
        ranks *= 2
        batch = _enough(job.batch, ranks, job.accumulation)
        if _total(replace(job, ranks=ranks, batch=batch), hardware) <= _usable(hardware):
            return {"ranks": ranks} if batch == job.batch else {"ranks": ranks, "batch": batch}
    return None


def _smaller_batch(job: Job) -> dict[str, object] | None:
    batch = _enough(job.batch // 2, job.ranks, job.accumulation)
    return {"batch": batch} if batch < job.batch else None


def _enough(batch: int, ranks: int, accumulation: int) -> int:
    """The batch, or a larger one, of equal micro-batches that give each rank at least 2 samples."""
    return -(-max(batch, 2 * ranks * accumulation) // accumulation) * accumulation


def as_json(plan: Plan) -> str:
    what = {
        **asdict(plan),
        "course": None if plan.course is None else as_dict(plan.course),
        "total": plan.total,
        "left": plan.left,
        "fits": plan.left >= 0,
    }
    return json.dumps({**what, "bound_by": plan.bound_by, "step_seconds": plan.seconds[plan.bound_by]}, indent=1)


def as_text(plan: Plan) -> str:
    job, hardware, usable = plan.job, plan.hardware, _usable(plan.hardware)
    lines = [
        f"{job.identities:,} identities x {job.width}, ranks {job.ranks}, batch {job.batch}, rate {job.rate:g}, {job.optimizer}"
        f"{' in backward' if job.in_backward else ''}, {job.dtype} products, {job.storage_dtype} prototypes; each rank: {hardware.name}",
        _backbone_text(job, hardware),
        "memory of a rank, GiB",
        *(f"  {name:14}{size / GIB:9.3f}" for name, size in plan.memory.items() if size),
        *(f"  {name:14}{size / GIB:9.3f}  a rough estimate, not measured on a GPU" for name, size in plan.estimates.items() if size),
        f"  {'total':14}{plan.total / GIB:9.3f} of {usable / GIB:.1f} usable ({USABLE:.0%} of {hardware.memory / GIB:.1f})",
        *(f"memory of its machine for each rank, GiB: {name} {size / GIB:.3f}" for name, size in plan.on_host.items()),
        "time that the classifier takes of a step, at least, ms",
        *(f"  {name:14}{1e3 * value:9.3f}" for name, value in plan.seconds.items()),
        f"  {'step':14}{1e3 * plan.seconds[plan.bound_by]:9.3f} bound by {plan.bound_by}",
    ]
    if hardware.remark:
        lines.append(hardware.remark)
    if plan.course is not None:
        lines += as_lines(plan.course)
    if plan.left >= 0:
        rest = "" if job.has_backbone else " to backbone, activations and images"
        lines.append(f"It fits and leaves {plan.left / GIB:.1f} GiB of each rank{rest}.")
        return "\n".join(lines)
    remedy = "Try this, in `protoshard train` the last column:" if plan.alternatives else "Smaller images or another backbone might."
    lines.append(f"It does not fit: {-plan.left / GIB:.1f} GiB too many on each rank. {remedy}")
    for tried in plan.alternatives:
        verdict = "which fits" if tried.fits else "still too many"
        lines.append(f"  {tried.options:42}{tried.total / GIB:9.3f} GiB, {verdict:16}{tried.settings}")
    return "\n".join(lines)


def _backbone_text(job: Job, hardware: Hardware) -> str:
    if not job.has_backbone:
        return "the classifier alone"
    engine = "DDP" if job.engine == "ddp" else f"DeepSpeed ZeRO {job.zero_stage}"
    batches = f"{job.accumulation} x {job.local}" if job.accumulation > 1 else f"{job.local}"
    precision = ("bfloat16" if hardware.has_bfloat16 else "float32") if job.precision == "auto" else job.precision
    again = ", activations computed again" if job.checkpoint_activations else ""
    images = f"{batches} images a rank"
    rest = again + (f", frozen: {', '.join(job.frozen)}" if job.frozen else "") + (", with an average" if job.ema else "")
    return f"backbone {job.backbone} at {job.image_size} pixels, {images}, {precision}, {job.backbone_optimizer}, {engine}{rest}"
