"""Procedural faces: a data set that anyone can make, for the quick start and for scale tests.
An identity is a set of drawn traits; pose, light, expression, occlusion and JPEG quality vary per image."""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import signal
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker

import numpy as np

from dali_loaders.extras import extra

with extra("train"):
    import cv2

from dali_loaders.faces.drawing import draw_face
from dali_loaders.faces.traits import Conditions, Traits, draw_record
from dali_loaders.names import printable
from dali_loaders.outputs import check_file
from dali_loaders.packing import pack
from dali_loaders.progress import progress
from dali_loaders.sources import TarSource

SMALLEST, LARGEST = 16, 1024  # sides in pixels
_IMAGES_WORTH_A_PROCESS = 500  # drawing them takes about as long as starting a process


@dataclass(frozen=True)
class FacesConfig:
    """Identities are numbered first_identity, first_identity + 1, ...: sets of one seed whose numbers differ share nobody."""

    identities: int = 400
    images_per_identity: int = 20
    size: int = 112
    seed: int = 0
    first_identity: int = 0


def face_image(seed: int, identity: int, image: int, size: int = 112) -> np.ndarray:
    """Image number `image` of an identity, uint8 RGB [size, size, 3]. The same arguments give the same pixels, whatever else is made."""
    return _photograph(seed, identity, image, size)[0]


def face_jpeg(seed: int, identity: int, image: int, size: int = 112) -> bytes:
    """`face_image` as a JPEG file, of the quality drawn for this image."""
    pixels, quality = _photograph(seed, identity, image, size)
    written, data = cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert written
    return data.tobytes()


def _photograph(seed: int, identity: int, image: int, size: int) -> tuple[np.ndarray, int]:
    rng = _stream(seed, identity, image + 1)
    conditions = draw_record(Conditions, rng)
    return develop(draw_face(_traits(seed, identity), conditions, size), conditions, rng), round(conditions.quality)


@functools.lru_cache(maxsize=64)
def _traits(seed: int, identity: int) -> Traits:
    return draw_record(Traits, _stream(seed, identity, 0))


def _stream(seed: int, identity: int, counter: int) -> np.random.Generator:
    """Streams of different arguments never overlap: the key names the identity, the counter's highest word the image."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, identity], np.uint64), counter=np.array([0, 0, 0, counter], np.uint64)))


def develop(face_SS3: np.ndarray, image: Conditions, rng: np.random.Generator) -> np.ndarray:
    """Light, then camera: exposure, white balance, a light that falls off across the image, blur, lost detail and noise."""
    size = len(face_SS3)
    across = np.linspace(-1, 1, size, dtype=np.float32)
    light = 2**image.exposure * image.contrast * (1 + image.slope * (image.sun_x * across[None, :] + image.sun_y * across[:, None]))
    balance = np.array([1 + image.warmth, 1 + image.tint, 1 - image.warmth], np.float32)
    pixels = face_SS3 * (light[:, :, None] * balance)
    pixels += np.float32(110 * (1 - image.contrast))
    if image.grey:
        pixels[:] = pixels.mean(axis=2, keepdims=True)
    if image.coarse:
        small = max(2, round(size * image.coarse))
        pixels = cv2.resize(cv2.resize(pixels, (small, small), interpolation=cv2.INTER_AREA), (size, size), interpolation=cv2.INTER_LINEAR)
    if image.blur:
        pixels = cv2.GaussianBlur(pixels, (0, 0), image.blur * size / 112)
    # The noise is uniform, because the normal distribution costs ten times as much; bytes have a standard deviation of 73.9.
    noise = np.frombuffer(rng.bytes(pixels.size), np.int8).reshape(pixels.shape).astype(np.float32)
    return cv2.addWeighted(pixels, 1, noise, image.noise / 73.9, 0, dtype=cv2.CV_8U)


def write_faces(out: str, config: FacesConfig, workers: int = 0) -> None:
    """Writes a data set of identities x images_per_identity faces under the name `out`, which appears when it is complete.

    A name ending in .tar makes a tar of IDENTITY/IMAGE.jpg, in .rec a RecordIO file with its .idx and .identities.txt, any other a folder,
    whose name has no dot in it unless a slash follows.
    The bytes do not depend on `workers`, the number of processes that draw (0: as many as there are cores, if the set is worth it).
    """
    _check(out, config, workers)
    folder, name = os.path.split(os.path.abspath(out))
    kind = os.path.splitext(out)[1]  # none of "faces.v2/", a folder
    check_file(out, "the set of faces", makes_folder=True)
    workers = workers or min(len(os.sched_getaffinity(0)), 1 + config.identities * config.images_per_identity // _IMAGES_WORTH_A_PROCESS)
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{name}.partial-", dir=folder) as scratch:
            files = _shown(_draw_all(config, workers), name, config.identities * config.images_per_identity)
            if kind == ".tar":
                _write_tar(f"{scratch}/{name}", files)
            elif kind == ".rec":
                _write_records(f"{scratch}/{name}", files)
            else:
                _write_folder(f"{scratch}/{name}", files)
            for part in sorted(os.listdir(scratch)):  # .rec comes after its .idx and .identities.txt
                os.replace(f"{scratch}/{part}", f"{folder}/{part}")
    except OSError as error:
        raise ValueError(f"cannot write faces to {out}: {error.strerror or error}; choose a folder that may be written.") from error


def _check(out: str, config: FacesConfig, workers: int) -> None:
    if not out:
        raise ValueError("no output named for the faces; give a folder, a .tar or a .rec.")
    if os.path.exists(out):
        raise ValueError(f"{out} exists already; remove it or write the faces under another name.")
    if os.path.splitext(out)[1] not in ("", ".tar", ".rec"):  # which does not see what stands in front of a slash at the end
        raise ValueError(f"faces are written to a .tar, a .rec or a folder, but {out} is none of them; if you mean a folder, write {out}/")
    for field, least in (("identities", 1), ("images_per_identity", 1), ("seed", 0), ("first_identity", 0)):
        value = getattr(config, field)
        if not least <= value < 2**63:
            raise ValueError(f"faces need {field} of at least {least} and below 2**63, not {value}.")
    if not SMALLEST <= config.size <= LARGEST:
        raise ValueError(f"faces can be {SMALLEST} to {LARGEST} pixels wide, not {config.size}; change size.")
    if workers < 0:
        raise ValueError(f"faces cannot be drawn by {workers} processes; use 0 for as many as there are cores.")


def _shown(files: Iterable[tuple[str, bytes]], name: str, total: int) -> Iterator[tuple[str, bytes]]:
    with progress(f"drawing {printable(name)}", total) as done:
        for file in files:
            yield file
            done.add()


def _draw_all(config: FacesConfig, workers: int) -> Iterator[tuple[str, bytes]]:
    """Names 'IDENTITY/IMAGE.jpg' and contents, in order."""
    identities = range(config.first_identity, config.first_identity + config.identities)
    draw = functools.partial(_draw_identity, config)
    if workers == 1:
        for identity in identities:
            yield from draw(identity)
        return
    # Processes are spawned, not forked: the caller may have threads, whose locks would stay taken forever in a forked child. They inherit
    # that Ctrl-C, which a terminal sends to all of them, is left to the caller, who ends them.
    resource_tracker.ensure_running()  # now, because its start lets SIGINT through again
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        workers_of_pool = multiprocessing.get_context("spawn").Pool(workers, cv2.setNumThreads, (1,))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    with workers_of_pool as pool:
        for files in pool.imap(draw, identities, chunksize=min(16, 1 + config.identities // (4 * workers))):
            yield from files


def _draw_identity(config: FacesConfig, identity: int) -> list[tuple[str, bytes]]:
    images = range(config.images_per_identity)
    return [(f"{identity:06d}/{image:03d}.jpg", face_jpeg(config.seed, identity, image, config.size)) for image in images]


def _write_folder(path: str, files: Iterable[tuple[str, bytes]]) -> None:
    for name, data in files:
        os.makedirs(os.path.dirname(f"{path}/{name}"), exist_ok=True)
        with open(f"{path}/{name}", "wb") as file:
            file.write(data)


def _write_tar(path: str, files: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)  # without time and owner: the same faces make the same file
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def _write_records(path: str, files: Iterable[tuple[str, bytes]]) -> None:
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
        _write_tar(f"{folder}/faces.tar", files)
        pack(TarSource(f"{folder}/faces.tar"), path)
