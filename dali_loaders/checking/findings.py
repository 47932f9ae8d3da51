"""One look at every image: read, hashed, decoded as a run would, and tried by a decoder that does not cover up damage."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from dali_loaders.checking.damage import damage
from dali_loaders.checking.duplicates import digest
from dali_loaders.config import DataConfig
from dali_loaders.decode import Decoder, UnreadableImagesError
from dali_loaders.encoded import HeaderReader, Unreadable, groups, read_image
from dali_loaders.progress import progress
from dali_loaders.readers import Part, Readers
from dali_loaders.sources import Source
from dali_loaders.waiting import waiting

_BATCH = 256
_BYTES = 1 << 26  # of encoded images at a time, which bounds the memory for photos


@dataclass
class Findings:
    """What was found. Images are numbers in the source."""

    sizes_n2: np.ndarray  # int32 [N, 2], height and width; zeros where the image is unreadable
    digests_n2: np.ndarray  # uint64 [N, 2]
    unreadable: dict[int, str]  # image -> reason; training leaves these out
    damaged: dict[int, str]  # image -> reason; a decoder covers the damage up, and training uses them
    decodes_on: str  # "gpu" or "cpu"


def look(source: Source, config: DataConfig) -> Findings:
    """Decodes every image fully, as a run with this configuration on this machine would: on the GPU if there is one.

    Memory does not grow with the images' sizes: they are decoded in groups of GROUP_PIXELS. It keeps 24 bytes an image."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = config.thread_count()
    decoder, headers = Decoder(config.image_size, _BATCH, threads, device, decoder=config.decoder), HeaderReader(_BATCH)
    found = Findings(np.zeros((len(source), 2), np.int32), np.zeros((len(source), 2), np.uint64), {}, {}, decoder.decodes_on)
    readers: Readers[bytes | Unreadable] = Readers(
        lambda images: (read_image(source, image) for image in images), source.path, source.name, threads, config.timeout
    )
    with closing(readers), ThreadPoolExecutor(threads, "protoshard-check") as pool, progress("checking", len(source)) as done:
        for start, encoded in _parts(source, readers, 4 * threads):
            sizes_b2, why = headers.sizes(encoded)
            good = np.array([at for at in range(len(encoded)) if at not in why], np.int64)
            for part in groups(sizes_b2[good]):
                places = good[part].tolist()
                damages = pool.map(damage, [encoded[at] for at in places])
                bad = _undecodable(decoder, [encoded[at] for at in places])
                why.update((places[at], reason) for at, reason in bad.items())
                found.damaged.update((start + at, reason) for at, reason in zip(places, damages, strict=True) if reason and at not in why)
            sizes_b2[list(why)] = 0
            found.sizes_n2[start : start + len(encoded)] = sizes_b2
            for at, data in enumerate(encoded):
                if not isinstance(data, Unreadable):
                    found.digests_n2[start + at] = digest(data)
            found.unreadable.update((start + at, why[at]) for at in sorted(why))
            done.add(len(encoded))
    return found


def _parts(source: Source, readers: Readers[bytes | Unreadable], most_ahead: int) -> Iterator[tuple[int, list[bytes | Unreadable]]]:
    """The number of the first image, and consecutive ones: at most _BATCH, and little more than _BYTES, which also bounds what is read
    ahead of them: `most_ahead` images, and fewer where those before were large."""
    reads: deque[Part[bytes | Unreadable]] = deque()
    typical = float(_BYTES)  # bytes of an image; falls slowly, so that one large image among small ones does no harm for long
    part: list[bytes | Unreadable] = []
    start, held, asked = 0, 0, 0
    while start + len(part) < len(source):
        while asked < len(source) and len(reads) < max(1, min(most_ahead, _BYTES / typical)):
            reads.append(readers.submit([asked]))
            asked += 1
        with waiting(lambda: f"data: {readers.doing()}"):
            (data,) = readers.result(reads.popleft())
        part.append(data)
        size = 0 if isinstance(data, Unreadable) else len(data)
        typical = max(size, typical / 2, 1)
        held += size
        if len(part) == _BATCH or held >= _BYTES:
            yield start, part
            start, part, held = start + len(part), [], 0
    if part:
        yield start, part


def _undecodable(decoder: Decoder, encoded: list[bytes | Unreadable]) -> dict[int, str]:
    """Why, by place. The decoder names broken headers first, then broken bodies."""
    why: dict[int, str] = {}
    good = list(range(len(encoded)))
    while good:
        try:
            decoder([encoded[at] for at in good], {})
            break
        except UnreadableImagesError as error:
            why.update((good[place], reason) for place, reason in error.why.items())
            good = [at for at in good if at not in why]
    return why
