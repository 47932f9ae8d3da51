"""Packs any source into one RecordIO file or into tar shards: in parallel, resumable, with an account of what was left out."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

import numpy as np

from dali_loaders import renamed
from dali_loaders.config import TIMEOUT
from dali_loaders.packing.alignment import SIDE
from dali_loaders.packing.course import Course, key, paths_of
from dali_loaders.packing.images import Images
from dali_loaders.packing.landmarks import read_landmarks, relative_names
from dali_loaders.packing.partial import Partial
from dali_loaders.packing.reading import worker_count
from dali_loaders.packing.record_file import RecordFile
from dali_loaders.packing.report import PackReport
from dali_loaders.packing.shards import Shards, check_no_others
from dali_loaders.packing.verify import verify_records, verify_shards
from dali_loaders.sources import Source

__all__ = ["PackConfig", "PackReport", "check_name", "pack"]

LIST = "left_out.txt"  # among the parts

renamed.names(__name__, {"read_identities": "dali_loaders.identities"})


@dataclass(frozen=True)
class PackConfig:
    """What the packed images are."""

    resize: int = 0  # side in pixels to which images of another size are brought, as JPEG; 0: the bytes of all images stay as they are
    quality: int = 95  # of what is encoded anew as JPEG, 1 to 100
    landmarks: str = ""  # CSV file of five points for each image: faces are cut out by ArcFace's template, at `resize` or 112 pixels
    shard_size: int = 10_000  # images of a tar shard
    verify: bool = False  # images that cannot be decoded are left out, and all that was written is read back and compared

    def __post_init__(self) -> None:
        for name, least, most in (("resize", 0, 1 << 14), ("quality", 1, 100), ("shard_size", 1, 1 << 30)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a number from {least} to {most}.")


def pack(
    source: Source, out: str, config: PackConfig | None = None, *, workers: int = 0, resume: bool = False, timeout: float = TIMEOUT
) -> PackReport:
    """Writes `source` to OUT.rec, with .idx and .identities.txt, or for OUT.tar to shards OUT-000.tar, OUT-001.tar, ...

    The result does not depend on `workers`, the number of threads (0: as many as there are cores, up to 8). Images are packed identity by
    identity. What cannot be read is left out and listed in OUT.left_out.txt; identities of which nothing is left get no label.
    A pack that was killed is gone on with, if source and options are the same. `resume` leaves what is done for that also where the pack
    ends with an error or an interruption; without, nothing stays then. timeout: seconds that the read of an image may take. ValueError
    where nothing can be packed or written."""
    config = config or PackConfig()
    is_shards = out.endswith(".tar")
    check_name(source, out)
    if is_shards:
        check_no_others(out)
    landmarks, names, unused = None, [], []
    if config.landmarks:
        landmarks, names = read_landmarks(config.landmarks, source.path), relative_names(source)
        unused = landmarks.without_image(names)
    images = Images(source, config.resize or (SIDE if landmarks else 0), config.quality, config.verify, landmarks, names)
    workers = worker_count(workers)
    depends_on = key(source, {"tar": is_shards, **asdict(config)}, *filter(None, [config.landmarks]))
    with Partial(out, depends_on, resume) as partial:
        course = Course(source, partial)
        writer: RecordFile | Shards
        if is_shards:
            writer = Shards(partial, out, course.packed, len(source), config.shard_size)
        else:
            writer = RecordFile(partial, out, course.packed)
        course.run(writer, images, workers, timeout)
        writer.finish(*course.identities)
        if config.verify:
            _verify(partial, writer, source, images, course.kept(), workers, timeout)
        left_out = f"{os.path.splitext(out)[0]}.left_out.txt"
        if course.left_out:
            course.write_list(partial.path(LIST))
        elif os.path.exists(left_out):  # of an earlier set under this name
            os.unlink(left_out)
        partial.publish({**({LIST: left_out} if course.left_out else {}), **writer.names})
    identities = len(course.identities[1])
    return PackReport(writer.opened_by, identities, course.account(), course.lost(), left_out if course.left_out else None, unused)


def _verify(
    partial: Partial, writer: RecordFile | Shards, source: Source, images: Images, kept: np.ndarray, workers: int, timeout: float
) -> None:
    try:
        if isinstance(writer, Shards):
            verify_shards([partial.path(name) for name in writer.names], source, images, kept, workers, timeout)
        else:
            verify_records(partial, source, images, kept, workers, timeout)
    except ValueError:
        partial.discard()
        raise


def check_name(source: Source, out: str) -> None:
    """ValueError for a name that a packed set cannot have."""
    if not out.endswith((".rec", ".tar")):
        raise ValueError(f"the packed set would be named {out}; give it a name that ends in .rec, or in .tar for shards NAME-000.tar, ...")
    if os.path.isdir(out):
        raise ValueError(f"{out} is a folder; give the packed set another name.")
    if os.path.exists(out) and any(os.path.exists(path) and os.path.samefile(out, path) for path in paths_of(source)):
        raise ValueError(f"{out} is the set that is read, or a part of it; give the one that is written another name.")
