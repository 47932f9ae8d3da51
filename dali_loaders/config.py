"""What to train on and how images are prepared: the section `data` of a configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from dali_loaders.augment_config import AugmentConfig as AugmentConfig

DECODERS = ("auto", "gpu", "cpu")
# At 2,850 images of 112 x 112 a second and thread, as measured on a CPU, 16 threads decode 45,000: more than one GPU trains on. For each
# thread DALI reserves 16 MiB on the GPU and 16 MiB of pinned memory.
MAX_THREADS = 16
# Above the limits that storages set themselves: 180 s of a soft NFS mount, 90 s until a server that starts anew answers, 300 s of aiohttp.
TIMEOUT = 300.0  # seconds


@dataclass(frozen=True)
class DataConfig:
    """What to train on and how images are prepared."""

    train: str = ""  # folder, .tar, .rec, .parquet, pattern or address, or several between commas
    weights: tuple[float, ...] = ()  # of several sets: the share of training images from each; empty: every image once an epoch
    identities: Literal["apart", "joined"] = "apart"  # of several sets: joined makes identities of the same name one class
    subset: str = ""  # file of image numbers, image names or identity names, one a line: only these are used
    exclude: str = ""  # such a file: these are not used
    changed: Literal["refuse", "continue"] = "refuse"  # of a run that resumes on a set that has changed; continue: in a new order
    cache: str = ""  # a local folder for copies of what is at remote addresses (s3://, gs://, https://)
    reader: str = "native"  # or "mxnet", for .rec only
    min_images: int = 2  # an identity with fewer is refused; 1 admits all
    images_per_identity: int = 1  # K of P x K batches: K images of an identity stand together; 1 ignores identities
    image_size: int = 112  # side in pixels; other sizes are stretched to it
    decoder: str = "auto"  # of JPEG: "gpu" (nvJPEG), "cpu" (libjpeg-turbo), or the GPU in runs on one
    timeout: float = TIMEOUT  # seconds that the read of an image may take before it counts as unreadable; 0: any time
    threads: int = 0  # for reading, and as many for decoding; 0 shares the cores among the ranks of this machine, but takes at most 16
    prefetch: int = 2  # batches kept ready ahead of the training step
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        least_of = {"min_images": 1, "images_per_identity": 1, "image_size": 8, "timeout": 0, "threads": 0, "prefetch": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            if not value >= least:  # NaN too
                raise ValueError(f"data.{name} is {value}; expected at least {least}.")
        for name, known in (("identities", ("apart", "joined")), ("changed", ("refuse", "continue"))):
            if getattr(self, name) not in known:
                raise ValueError(f"data.{name} is {getattr(self, name)!r}; expected {' or '.join(known)}.")
        if not all(0 < weight < 1e9 for weight in self.weights):
            raise ValueError(
                f"data.weights is {self.weights}; expected positive numbers, and to leave a set out, none in data.train either."
            )
        if self.decoder not in DECODERS:
            raise ValueError(f"data.decoder is {self.decoder!r}; expected one of {', '.join(DECODERS)}.")

    def thread_count(self) -> int:
        """`threads`, or for 0 this rank's share of the cores that the process may use, at most MAX_THREADS."""
        share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return self.threads or min(max(1, share), MAX_THREADS)
