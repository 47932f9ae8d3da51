"""What to train on and how images are prepared: the sections `data` and `data.augment` of a configuration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

DECODERS = ("auto", "gpu", "cpu")
# At 2,850 images of 112 x 112 a second and thread, as measured on a CPU, 16 threads decode 45,000: more than one GPU trains on. For each
# thread DALI reserves 16 MiB on the GPU and 16 MiB of pinned memory.
MAX_THREADS = 16


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of a training image; zero switches one off. Each is drawn uniformly and symmetrically around no change."""

    flip: bool = True  # mirrors left and right with probability 1/2
    rotate: float = 0.0  # largest angle in degrees, either way
    zoom: float = 0.0  # scale between 1 - zoom and 1 + zoom
    shift: float = 0.0  # up to this fraction of the side, in x and in y
    brightness: float = 0.0  # factor between 1 - brightness and 1 + brightness
    contrast: float = 0.0  # factor around mid-grey between 1 - contrast and 1 + contrast

    def __post_init__(self) -> None:
        for name, limit in (("rotate", 180.0), ("zoom", 0.9), ("shift", 0.9), ("brightness", 1.0), ("contrast", 1.0)):
            value = getattr(self, name)
            if not 0 <= value <= limit:
                raise ValueError(f"augment.{name} is {value}; expected a number from 0 to {limit:g}.")

    @property
    def geometric(self) -> bool:
        return max(self.rotate, self.zoom, self.shift) > 0

    @property
    def photometric(self) -> bool:
        return max(self.brightness, self.contrast) > 0


@dataclass(frozen=True)
class DataConfig:
    """What to train on and how images are prepared."""

    train: str = ""  # folder, .tar or .rec, or several between commas
    weights: tuple[float, ...] = ()  # of several sets: the share of training images from each; empty: every image once an epoch
    identities: Literal["apart", "joined"] = "apart"  # of several sets: joined makes identities of the same name one class
    subset: str = ""  # file of image numbers, image names or identity names, one a line: only these are used
    exclude: str = ""  # such a file: these are not used
    changed: Literal["refuse", "continue"] = "refuse"  # of a run that resumes on a set that has changed; continue: in a new order
    reader: str = "native"  # or "mxnet", for .rec only
    min_images: int = 2  # an identity with fewer is refused; 1 admits all
    images_per_identity: int = 1  # K of P x K batches: K images of an identity stand together; 1 ignores identities
    image_size: int = 112  # side in pixels; other sizes are stretched to it
    decoder: str = "auto"  # of JPEG: "gpu" (nvJPEG), "cpu" (libjpeg-turbo), or the GPU in runs on one
    threads: int = 0  # for reading, and as many for decoding; 0 shares the cores among the ranks of this machine, but takes at most 16
    prefetch: int = 2  # batches kept ready ahead of the training step
    augment: AugmentConfig = AugmentConfig()

    def __post_init__(self) -> None:
        for name, least in (("min_images", 1), ("images_per_identity", 1), ("image_size", 8), ("threads", 0), ("prefetch", 1)):
            value = getattr(self, name)
            if value < least:
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
