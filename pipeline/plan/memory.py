"""Bytes of the rank that has the most classes, at the moment of a step that takes the most: right before the backbone's backward, when
all activations are there and the classifier has worked."""

from __future__ import annotations

from dali_loaders.config import DataConfig
from partial_fc.device_policy import CPU, GPU
from partial_fc.kernels.triton_kernel import PARTIAL_BYTES, ROUNDED, UNITS_BYTES, WEIGHTS_BYTES
from partial_fc.sampling import capacity
from pipeline.engine import BUCKET, LIVE
from pipeline.plan.hardware import GIB, Hardware
from pipeline.plan.job import BYTES, STATES, Job
from pipeline.plan.network import Footprint, footprint

BUCKET_BYTES, LIVE_BYTES = 4 * BUCKET, 4 * LIVE
NOTHING = Footprint(0, 0, 0, 0, 0, 0)
BATCHES = DataConfig().prefetch + 2  # of images: the one in use, those that are ready, and the next, which waits for its place


def memory(job: Job, hardware: Hardware) -> dict[str, int]:
    """Tensors, by what they are for."""
    network = backbone_footprint(job, hardware)
    lines = {**_backbone(job, hardware, network), **_classifier(job)}
    work = max(_tiles(job, hardware) + _vectors(job), network.work)
    # When weights move and checkpoints are written, activations and tiles are gone.
    free = lines["activations"] + work
    later = max(_update(job, hardware, network), _save(job), _evaluation(job, network))
    lines |= {"work": work, "update, save": max(0, later - free)}
    return lines if hardware.is_gpu else {**lines, "copy for saves": copy_for_saves(job, network)}


def copy_for_saves(job: Job, network: Footprint) -> int:
    """What an asynchronous save keeps in the memory of the host: the rank's rows, and its share of the backbone, of its average and its
    optimizer, but no less than one whole tensor."""
    if not job.asynchronous:
        return 0
    rows = _classifier(job)
    shared = network.buffers + network.weights + _average(job, network) + network.moving * STATES[job.backbone_optimizer]
    return rows["prototypes"] + rows["optimizer"] + rows["bank"] + max(-(-shared // job.ranks), network.largest)


def on_host(job: Job, hardware: Hardware) -> dict[str, int]:
    """Memory of the host, for each rank whose tensors are on a GPU."""
    network = backbone_footprint(job, hardware)
    return {"copy for saves": copy_for_saves(job, network)} if hardware.is_gpu and job.asynchronous else {}


def backbone_footprint(job: Job, hardware: Hardware) -> Footprint:
    """With the images that a rank has at once; of zeros for the classifier alone."""
    if not job.has_backbone:
        return NOTHING
    return footprint(job.network, job.image_size, job.local, in_half=in_half(job, hardware), frozen=job.frozen)


def in_half(job: Job, hardware: Hardware) -> bool:
    """Whether the backbone computes in 2 bytes, as engine.precision decides."""
    return hardware.has_bfloat16 if job.precision == "auto" else job.precision != "float32"


def estimates(job: Job, hardware: Hardware) -> dict[str, int]:
    """What is no tensor of torch, on a GPU: rough figures, which nothing here can compute, until a GPU was measured."""
    if not hardware.is_gpu:
        return {}
    images = _images(job, hardware) // BATCHES
    return {
        "CUDA context": GIB // 2,  # with the kernels of torch that are loaded
        "cuBLAS, cuDNN": (64 << 20) + (GIB // 2 if job.has_backbone else 0),  # 32 MB for each of two threads; workspaces of convolutions
        "NCCL": GIB // 2 if job.ranks > 1 else 0,  # 4 MB for every channel and direction
        "DALI": GIB // 4 + 2 * images if job.has_backbone else 0,  # nvJPEG; decoded and finished images
    }


def _backbone(job: Job, hardware: Hardware, network: Footprint) -> dict[str, int]:
    weights, gradients = network.weights, network.moving  # gradients are views of DDP's buckets
    state = gradients * STATES[job.backbone_optimizer]
    if _has_deepspeed(job, network):
        part = _part(job, network)
        # One bucket fills while the other travels; gradients grow as activations go, but those of an earlier micro-batch are there.
        gradients = 2 * BUCKET_BYTES + (_averaged(job, network) if job.accumulation > 1 else 0)
        weights, state = weights + part, part * STATES[job.backbone_optimizer]  # the optimizer moves a copy of its part
        if job.zero_stage == 3:  # or its part itself; the rest comes when it is needed
            weights, gradients = -(-network.weights // job.ranks) + min(network.weights, LIVE_BYTES), 2 * BUCKET_BYTES + part
    return {
        "backbone": weights + network.buffers,
        "its gradients": gradients,
        "its optimizer": state,
        "its average": _average(job, network),
        "activations": network.activations,
        "images": _images(job, hardware),
    }


def _has_deepspeed(job: Job, network: Footprint) -> bool:
    """A backbone of which nothing moves has no engine."""
    return job.engine == "deepspeed" and network.moving > 0


def _average(job: Job, network: Footprint) -> int:
    return network.weights + network.buffers if job.ema else 0


def _part(job: Job, network: Footprint) -> int:
    """What DeepSpeed gives each rank of the weights that move, and of their gradients."""
    return -(-network.moving // job.ranks)


def _averaged(job: Job, network: Footprint) -> int:
    """Gradients that DeepSpeed keeps until the end of backward, or flattens in the step."""
    return network.moving if job.zero_stage == 1 else {2: 2, 3: 1}[job.zero_stage] * _part(job, network)


def _images(job: Job, hardware: Hardware) -> int:
    item = 2 if hardware.is_gpu and in_half(job, hardware) else 4  # the trainer asks for float16 where autocast rounds them anyway
    return BATCHES * job.local * 3 * job.image_size**2 * item if job.has_backbone else 0


def _held(job: Job) -> int:
    """Columns of a step: all classes, or room for a sample of them."""
    return job.rows if job.rate == 1 else capacity(job.rows, job.rate, job.batch, share=job.rows / job.identities)


def _classifier(job: Job) -> dict[str, int]:
    rows, width, held = job.rows, job.width, _held(job)
    # Gradients of samples are added at the end of the step only, dense ones when the next is there.
    gradients = min(job.accumulation, 2) if job.rate == 1 else job.accumulation
    return {
        "prototypes": rows * width * BYTES[job.storage_dtype],
        "optimizer": rows * width * 4 * STATES[job.optimizer],
        "gradient": 0 if job.in_backward else gradients * held * width * BYTES[job.storage_dtype],
        "bank": rows * (width * 4 + 8) if job.bank else 0,
        "sample": 0 if job.rate == 1 else rows * 40 + held * 10,  # the columns of all classes, and what drawing them takes
    }


def _vectors(job: Job) -> int:
    """Rows of the global batch in float32: features, gathered, scaled and rounded, entries that are computed exactly, gradients."""
    return 14 * job.gathered * job.width * 4


def _tiles(job: Job, hardware: Hardware) -> int:
    """A chunk of prototypes and what is computed of it, in the kernel that `auto` takes."""
    in_triton = hardware.is_gpu and hardware.has_bfloat16 and job.dtype == "bfloat16"
    columns, size = _in_triton(job) if in_triton else _in_torch(job, hardware)
    return size + (_moving(job, hardware, columns) if job.in_backward else 0)


def _in_torch(job: Job, hardware: Hardware) -> tuple[int, int]:
    """(columns of a chunk, bytes): logits, unit columns twice, and two products in float32."""
    item = BYTES[job.dtype]
    policy = GPU if hardware.is_gpu else CPU
    columns = _chunk(_held(job), min(policy.tile_bytes // (job.gathered * item), policy.units_bytes // (job.width * item)))
    return columns, columns * (job.gathered * item + job.width * (2 * item + 8 + _loaded(job)))


def _in_triton(job: Job) -> tuple[int, int]:
    """(columns of a chunk in backward, bytes): unit columns with sums by block in forward; with weights and a product in backward."""
    held, batch, width, item = _held(job), job.gathered, job.width, BYTES[job.dtype]
    largest = UNITS_BYTES // (width * item)
    columns = _chunk(held, largest)
    sums = 12 * batch * -(-columns // min(blocks.n for blocks in ROUNDED))  # of a chunk
    forward = columns * width * (item + _loaded(job)) + max(sums, min(sums * -(-held // columns), PARTIAL_BYTES))
    columns = _chunk(held, min(largest, WEIGHTS_BYTES // (batch * item)))
    weights = batch * -(-columns // 256) * 256 * item
    product = 4 if job.in_backward or job.storage_dtype == "bfloat16" else 0  # otherwise it is computed where the gradient lies
    return columns, max(forward, columns * width * (item + product + _loaded(job)) + weights + 8 * held)


def _loaded(job: Job) -> int:
    """Bytes for an element of a chunk's prototypes: gathered, if they are sampled, and in float32."""
    return (4 if job.storage_dtype == "bfloat16" else 0) + (0 if job.rate == 1 else BYTES[job.storage_dtype])


def _chunk(held: int, largest: int) -> int:
    """Columns of a chunk: as TileLoop divides them."""
    chunks = -(-held // max(256, largest))
    return min(held, -(-held // chunks // 64) * 64)


def _moving(job: Job, hardware: Hardware, rows: int) -> int:
    """What the row optimizer takes for the rows that it moves at a time."""
    policy = GPU if hardware.is_gpu else CPU
    elements = min(rows * job.width, policy.moved_elements)
    sampled = 0 if job.rate == 1 else BYTES[job.storage_dtype] + 4 * STATES[job.optimizer] + 8  # rows, and those of the padding
    rounded = 12 if job.storage_dtype == "bfloat16" else 0  # in float32, and the numbers that round them
    adamw = 8 if job.optimizer == "adamw" else 0
    return elements * (sampled + rounded + adamw)


def _update(job: Job, hardware: Hardware, network: Footprint) -> int:
    """Fused optimizers move weights in place. DeepSpeed sends a copy of its bucket when all gradients are there."""
    averaging = BUCKET_BYTES + _averaged(job, network) if _has_deepspeed(job, network) else 0
    return max(averaging, 0 if job.in_backward else _moving(job, hardware, _held(job)))


def _save(job: Job) -> int:
    """Every rank gives its own parts, which go to the host one by one, and the check that they are finite takes no memory. The classifier's
    gradient is gone by then."""
    return -_classifier(job)["gradient"]


def _evaluation(job: Job, network: Footprint) -> int:
    """ZeRO 3 puts the weights together for it, and an average takes the place of the weights, which are kept aside."""
    whole = network.weights if _has_deepspeed(job, network) and job.zero_stage == 3 else _average(job, network)
    return whole - _classifier(job)["gradient"]
