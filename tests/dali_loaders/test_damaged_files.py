"""Whatever a file holds, reading and decoding it neither crashes nor hangs: it is an image of its size, or there is a reason why not.

The work is done in another process, because what is looked for are crashes of libraries."""

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from pictures import picture

pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")

BATCH = 50


def corpus() -> list[bytes]:
    """Small images of every kind that sets hold."""
    pixels = cv2.imdecode(np.frombuffer(picture(2, (36, 48)), np.uint8), cv2.IMREAD_COLOR)
    rgba = np.dstack([pixels, pixels[..., :1]])
    made = [cv2.imencode(extension, pixels)[1].tobytes() for extension in (".jpg", ".png", ".webp", ".bmp", ".tiff", ".ppm", ".jp2")]
    made += [cv2.imencode(extension, rgba)[1].tobytes() for extension in (".png", ".webp", ".tiff")]
    made += [cv2.imencode(extension, pixels[..., 0])[1].tobytes() for extension in (".jpg", ".png", ".pgm", ".bmp")]
    made.append(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes())
    made.append(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_RST_INTERVAL, 1])[1].tobytes())
    made.append(cv2.imencode(".png", pixels.astype(np.uint16) * 257)[1].tobytes())
    made.append(cv2.imencode(".webp", pixels, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes())
    try:
        from PIL import Image
    except ModuleNotFoundError:
        return made
    image = Image.fromarray(pixels)
    for form, mode in (
        ("GIF", "P"),
        ("JPEG", "CMYK"),
        ("PNG", "P"),
        ("PNG", "1"),
        ("BMP", "P"),
        ("TIFF", "1"),
        ("AVIF", "RGB"),
        ("ICO", "RGB"),
    ):
        out = io.BytesIO()
        image.convert(mode).save(out, form)
        made.append(out.getvalue())
    return made


def damaged(random: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """With bits flipped, bytes overwritten, cut, inserted, repeated or taken from another file, often in the header."""
    changed = bytearray(data)
    for _ in range(random.integers(1, 5)):
        reach = len(changed) if random.random() < 0.5 else min(64, len(changed))
        at, length = int(random.integers(reach + 1)), int(2 ** random.uniform(0, 8))
        kind = random.integers(8)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << int(random.integers(8))
        elif kind == 1:
            changed[at : at + length] = random.bytes(length)
        elif kind == 2:
            changed[at : at + length] = bytes(length)
        elif kind == 3:
            del changed[at : at + length]
        elif kind == 4:
            changed[at:at] = random.bytes(length)
        elif kind == 5:
            changed[at:at] = changed[at : at + length]
        elif kind == 6:
            changed[at:] = other[at:]
        elif kind == 7 and at + 4 <= len(changed):  # a length or a size: extreme ones
            changed[at : at + 4] = [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\1", b"\0\1\0\0"][random.integers(4)]
    return bytes(changed)


def inputs(count: int, seed: int) -> list[bytes]:
    random, sound = np.random.default_rng(seed), corpus()
    made = []
    for number in range(count):
        if number % 50 == 49:
            made.append(random.bytes(int(random.integers(300))))
        else:
            made.append(damaged(random, sound[number % len(sound)], sound[random.integers(len(sound))]))
    return made


def look_at(count: int, seed: int, log: str) -> None:
    """In the other process: every input through the judgement of bytes, the decoder and the search for damage."""
    import torch

    from dali_loaders.account import Account
    from dali_loaders.checking import look
    from dali_loaders.config import DataConfig
    from dali_loaders.encoded import Unreadable, read_image

    class Inputs:
        path, identities = "inputs", ["one"]

        def __init__(self, images: list[bytes]) -> None:
            self.images, self.labels, self.account = images, np.zeros(len(images), np.int64), Account(len(images), len(images))

        def __len__(self) -> int:
            return len(self.images)

        def read(self, index: int) -> bytes:
            return self.images[index]

        def name(self, index: int) -> str:
            return str(index)

    torch.set_num_threads(1)
    made, used = inputs(count, seed), 0
    for start in range(0, count, BATCH):
        Path(log).write_text(str(start))  # where it was, if it does not come back
        source = Inputs(made[start : start + BATCH])
        found = look(source, DataConfig(image_size=32, threads=2))
        for index in range(len(source)):
            is_used = bool(found.sizes_n2[index].all())
            assert is_used != (index in found.unreadable), start + index
            assert is_used or found.unreadable[index], start + index
            assert not isinstance(read_image(source, index), Unreadable) or not is_used
            used += is_used
    print(used)


def survive(count: int, seed: int, seconds: float) -> int:
    """How many of the inputs are still images."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        here = str(Path(__file__).parent)
        command = f"import sys; sys.path.insert(0, {here!r}); import test_damaged_files as t; t.look_at({count}, {seed}, {str(log)!r})"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(here).parents[1]), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(
            [sys.executable, "-c", command], env=environment, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
        assert done.returncode == 0, (
            f"exit {done.returncode} in the batch from {log.read_text() if log.exists() else 0} on: {done.stderr[-2000:]}"
        )
        return int(done.stdout.split()[-1])


def test_damaged_files_are_images_or_have_a_reason():
    assert 20 < survive(300, seed=0, seconds=200) < 280


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 11))
def test_ten_thousand_damaged_files(seed):
    assert 50 < survive(1000, seed, seconds=1800) < 950
