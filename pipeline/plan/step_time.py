"""The time of a step on many nodes: computing, and what of the communication it does not hide. Images of a rank stay as many, so the batch
grows with the nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.plan.hardware import GIB, Hardware
from pipeline.plan.job import BYTES, Job
from pipeline.plan.links import NOTHING, Cost, Links
from pipeline.plan.memory import BUCKET_BYTES, backbone_footprint, estimates, memory
from pipeline.plan.network import operations

DDP_FIRST, DDP_BUCKET = 1 << 20, 25 << 20  # bytes
LOG_EVERY = 20  # steps between lines of metrics, as run.log_every
LIMIT = 0.25  # of a step: from there on what the classifier sends is said to limit
MOST_NODES = 1 << 16  # that are looked at for it
UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6}
ASSUMPTIONS = (
    "step = computing + classifier + backbone that backward does not hide + control; a rank sends, of N ranks on n nodes, with B samples:",
    "  classifier  all-gather of B D features and B labels, all-reduce of 2 B sums, reduce-scatter of B D gradients; nothing hides them",
    "  backbone    its gradients in buckets during the last backward, two thirds of computing; the last bucket is never hidden",
    "  control     1 all-reduce of a number, log2(N) messages between hosts, and metrics every {log_every} steps",
    "  a ring: (N-1)/N of the bytes over the slowest link (an all-reduce twice), and N - 1 messages, n of N of them between nodes",
)


def seconds_of(text: str) -> float:
    """Of "20ms", "10us" or "10µs". ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|ms|us|µs|μs)", text.strip())
    if match is None:
        raise ValueError(f"--latency {text!r} is no time: give a number with its unit, such as 10us or 20ms")
    return float(match[1]) * UNITS[match[2]]


@dataclass(frozen=True)
class Scale:
    """On how many nodes, and what joins them. `Job` is what one node does."""

    nodes: tuple[int, ...]
    between: float | None = None  # bytes per second that a node sends to others
    latency: float = 1e-5  # seconds of a message from node to node
    step_seconds: float | None = None  # measured, of computing alone
    gather_dtype: str = "float32"  # of features on their way
    compress: bool = False  # gradients of the backbone travel in bfloat16
    log_every: int = LOG_EVERY

    def __post_init__(self) -> None:
        for nodes in self.nodes:
            if nodes < 1:
                raise ValueError(f"--nodes is {nodes}, but must be at least 1")
        if max(self.nodes) > 1 and self.between is None:
            raise ValueError(
                f"--nodes {max(self.nodes)} needs --between GB/s, the rate of a node's links to others, such as 50 for 400 Gbit/s"
            )
        if self.between is not None and self.between <= 0:
            raise ValueError(f"--between is {self.between / 1e9:g} GB/s, but must be positive")
        if self.log_every < 1:
            raise ValueError(f"--log-every is {self.log_every}, but must be at least 1")
        if self.step_seconds is not None and self.step_seconds <= 0:
            raise ValueError(f"--step-ms is {1e3 * self.step_seconds:g}, but must be positive")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, on one number of nodes."""

    nodes: int
    ranks: int
    batch: int
    computing: float
    classifier: float  # its collectives
    backbone: float  # all that its gradients take
    shown: float  # what of that backward does not hide
    control: float
    sent: float  # bytes that leave a node, or a rank where there is one node
    memory: int  # bytes of a rank

    @property
    def step(self) -> float:
        return self.computing + self.communication

    @property
    def communication(self) -> float:
        return self.classifier + self.shown + self.control

    @property
    def share(self) -> float:
        return self.communication / self.step

    @property
    def images_per_second(self) -> float:
        return self.batch / self.step


def on_nodes(job: Job, hardware: Hardware, scale: Scale, nodes: int, computing: float) -> StepTime:
    """job: of one node. computing: seconds"""
    grown = replace(job, ranks=job.ranks * nodes, batch=job.batch * nodes)
    links = Links(nodes, job.ranks, hardware.network, scale.between or 1.0, scale.latency, nccl=hardware.is_gpu)
    classifier, control = classifier_cost(grown, links, scale.gather_dtype), control_cost(grown, links, scale.log_every)
    backbone, shown = backbone_cost(grown, hardware, links, scale.compress, computing)
    kept = sum(memory(grown, hardware).values()) + sum(estimates(grown, hardware).values())
    sent = classifier.sent + control.sent + backbone.sent
    return StepTime(nodes, grown.ranks, grown.batch, computing, classifier.seconds, backbone.seconds, shown, control.seconds, sent, kept)


def classifier_cost(job: Job, links: Links, gather_dtype: str) -> Cost:
    batch = job.gathered
    features = batch * job.width
    once = links.all_gather(16 * links.ranks) + links.all_gather(BYTES[gather_dtype] * features) + links.all_gather(8 * batch)
    return (once + links.all_reduce(8 * batch) + links.reduce_scatter(4 * features)).times(job.accumulation)


def control_cost(job: Job, links: Links, log_every: int) -> Cost:
    """Every log_every steps a line of metrics: 2 small all-reduces, and cosines, for which features are gathered again, and 4 numbers of
    every rank for every sample."""
    cosines = links.all_gather(16 * links.ranks) + links.all_gather((4 * job.width + 8 + 16 * links.ranks) * job.gathered)
    line = links.all_reduce(8) + links.all_reduce(24) + cosines
    return links.all_reduce(4) + links.exchange() + line.times(1 / log_every)


def backbone_cost(job: Job, hardware: Hardware, links: Links, compress: bool, computing: float) -> tuple[Cost, float]:
    """(all of it, seconds that backward does not hide). DeepSpeed on a CPU hides nothing."""
    network = backbone_footprint(job, hardware)
    if not network.moving or links.ranks == 1:
        return NOTHING, 0.0
    item = 2 if compress else 4
    window = computing * 2 / 3 / job.accumulation  # of the last micro-batch; forward takes a third
    if job.engine == "ddp":
        buckets = ddp_buckets(network.moving)
        costs = [links.all_reduce(size // 4 * item) for size in buckets]
        cost = sum(costs, Cost(links.slow_start(max(buckets) // 4 * item / links.ranks), 0.0))
        return cost, max(cost.seconds - window, costs[-1].seconds)
    count = -(-network.moving // BUCKET_BYTES)
    gradients = links.reduce_scatter(network.moving // 4 * item / count).times(count)
    gradients += Cost(links.slow_start(network.moving // 4 * item / count / links.ranks), 0.0)
    overlap = window if hardware.is_gpu else 0.0
    shown = max(gradients.seconds - overlap, gradients.seconds / count)
    weights = links.all_gather(network.moving)
    if job.zero_stage == 3:  # put together for forward and again for backward of every micro-batch
        fetched = weights.times(2 * job.accumulation)
        total = gradients + fetched
        return total, max(total.seconds - (computing if hardware.is_gpu else 0.0), gradients.seconds / count)
    return gradients + weights, shown + weights.seconds


def ddp_buckets(size: int) -> list[int]:
    """Bytes of float32 of each: a small one first, so that sending begins early, and what is left last, which nothing hides."""
    buckets = [min(size, DDP_FIRST)]
    while left := size - sum(buckets):
        buckets.append(min(left, DDP_BUCKET))
    return buckets


def computing_seconds(job: Job, hardware: Hardware, classifier: float) -> float:
    """The least, from the peaks of the hardware. classifier: seconds of the classifier's part"""
    if not job.has_backbone:
        return classifier
    images = job.local * job.accumulation
    passes = (3 if backbone_footprint(job, hardware).moving else 1) + job.checkpoint_activations
    half = job.precision in ("bfloat16", "float16") or (job.precision == "auto" and hardware.has_bfloat16)
    return passes * images * operations(job.network, job.image_size) / (hardware.bfloat16 if half else hardware.float32) + classifier


@dataclass(frozen=True)
class Change:
    """What may be changed, and what it brings on the largest number of nodes."""

    settings: str  # for `protoshard train`
    gain: float  # images per second, times


@dataclass(frozen=True)
class Course:
    """From few nodes to many."""

    scale: Scale
    rows: tuple[StepTime, ...]
    one: StepTime  # a single node
    is_measured: bool
    limit: StepTime | None  # the fewest nodes, a power of 2, at which what the classifier sends takes LIMIT of a step
    changes: tuple[Change, ...]

    def efficiency(self, row: StepTime) -> float:
        """Images per second of a rank, compared with those on one node."""
        return row.images_per_second / row.nodes / self.one.images_per_second


def course(job: Job, hardware: Hardware, scale: Scale, classifier: float) -> Course:
    """classifier: least seconds of its part on one node, where no step was measured"""
    computing = scale.step_seconds or computing_seconds(job, hardware, classifier)

    def row(nodes: int, changed: Scale = scale, of: Job = job, taking: float = computing) -> StepTime:
        return on_nodes(of, hardware, changed, nodes, taking)

    rows = tuple(row(nodes) for nodes in scale.nodes)
    limit = None
    if scale.between is not None:
        looked_at = (row(1 << n) for n in range(MOST_NODES.bit_length()))
        limit = next((one for one in looked_at if one.classifier > LIMIT * one.step), None)
    last = rows[-1]
    tried = dict(_changes(job, scale, row, last.nodes, computing))
    changes = tuple(
        Change(settings, round(other.images_per_second / last.images_per_second, 3))
        for settings, other in tried.items()
        if other.images_per_second > 1.03 * last.images_per_second
    )
    return Course(scale, rows, row(1), scale.step_seconds is not None, limit, changes)


def _changes(job: Job, scale: Scale, row: Any, nodes: int, computing: float) -> Iterator[tuple[str, StepTime]]:
    """What `protoshard train` can do."""
    if scale.gather_dtype == "float32":
        yield "classifier.gather_dtype=bfloat16", row(nodes, replace(scale, gather_dtype="bfloat16"))
    yield f"run.log_every={5 * scale.log_every}", row(nodes, replace(scale, log_every=5 * scale.log_every))
    if not scale.compress and job.has_backbone:
        yield "engine.compress=true", row(nodes, replace(scale, compress=True))
    if job.has_backbone and not job.in_backward:
        twice = replace(job, accumulation=2 * job.accumulation, batch=2 * job.batch)
        settings = f"run.accumulation={twice.accumulation} run.batch={twice.batch * nodes}"
        yield settings, row(nodes, of=twice, taking=2 * computing)
    if job.has_backbone and job.engine == "deepspeed":
        yield "engine.name=ddp", row(nodes, of=replace(job, engine="ddp", zero_stage=1))


def as_dict(made: Course) -> dict[str, Any]:
    def of(row: StepTime) -> dict[str, Any]:
        more = {"step": row.step, "communication_share": row.share, "images_per_second": row.images_per_second}
        return {**asdict(row), **more, "efficiency": made.efficiency(row)}

    return {
        "between": made.scale.between,
        "latency": made.scale.latency,
        "gather_dtype": made.scale.gather_dtype,
        "computing_is_measured": made.is_measured,
        "rows": [of(row) for row in made.rows],
        "classifier_limits_from": None if made.limit is None else of(made.limit),
        "changes": [asdict(change) for change in made.changes],
        "assumptions": [line.format(log_every=made.scale.log_every).strip() for line in ASSUMPTIONS],
    }


def as_lines(made: Course) -> list[str]:
    scale = made.scale
    between = "" if scale.between is None else f"; nodes send {scale.between / 1e9:g} GB/s, {1e3 * scale.latency:g} ms a message"
    lines = [
        f"time of a step, ms, with as many images a rank on every number of nodes{between}",
        "  nodes   ranks      batch  computing classifier   backbone (hidden)  control      step   comm.   images/s   each   GiB",
    ]
    for row in made.rows:
        hidden = row.backbone - row.shown
        lines.append(
            f"  {row.nodes:5}{row.ranks:8}{row.batch:11,}{1e3 * row.computing:11.2f}{1e3 * row.classifier:11.2f}{1e3 * row.shown:11.2f}"
            f"{f'({1e3 * hidden:.2f})':>9}{1e3 * row.control:9.2f}{1e3 * row.step:10.2f}{row.share:8.1%}"
            f"{row.images_per_second:11,.0f}{made.efficiency(row):7.0%}{row.memory / GIB:6.1f}"
        )
    lines += [line.format(log_every=scale.log_every) for line in ASSUMPTIONS]
    if not made.is_measured:
        lines.append("Computing is the least that the peaks allow, so the share of communication is the most: give --step-ms, measured.")
    if made.limit is not None:
        lines.append(
            f"From {made.limit.nodes} nodes on, a batch of {made.limit.batch:,}, what the classifier sends takes more than {LIMIT:.0%} "
            "of a step: its bytes grow with the batch, computing does not. A larger backbone or faster links help, micro-batches do not."
        )
    elif scale.between is not None:
        lines.append(f"What the classifier sends stays below {LIMIT:.0%} of a step on up to {MOST_NODES:,} nodes.")
    for change in made.changes:
        lines.append(f"  --set {change.settings:44} {change.gain:.2f} times the images per second on {made.rows[-1].nodes} nodes")
    return lines
