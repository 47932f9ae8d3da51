"""Damage that decoders cover up, and what is none."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from pictures import picture

from dali_loaders.checking.damage import damage
from dali_loaders.decode import Decoder, UnreadableImagesError

Image = pytest.importorskip("PIL.Image")


def sound(size: int = 48) -> dict[str, bytes]:
    pixels = np.asarray(Image.open(io.BytesIO(picture(3, (size, 64)))))
    image = Image.fromarray(np.clip(pixels + np.random.default_rng(0).normal(0, 8, pixels.shape), 0, 255).astype(np.uint8))

    def encoded(mode: str = "RGB", **options) -> bytes:
        out = io.BytesIO()
        image.convert(mode).save(out, "JPEG", **options)
        return out.getvalue()

    baseline = encoded()
    return {
        "baseline": baseline,
        "progressive": encoded(progressive=True),
        "grey": encoded("L"),
        "cmyk": encoded("CMYK"),
        "4:4:4": encoded(subsampling=0, quality=100),
        "restarts": encoded(restart_marker_blocks=2),
        "one pixel": picture(1, 1),
        "bytes behind the end": baseline + b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\x08mdat" * 9,
        "zeros before the end": baseline[:-2] + bytes(700) + b"\xff\xd9",
        "zeros before the end of the first": baseline[:-2] + bytes(700) + b"\xff\xd9" + baseline,
        "an unknown version": baseline.replace(b"JFIF\0\1", b"JFIF\0\7"),
        "png": picture(1, 32, ".png"),
        "webp": picture(1, 32, ".webp"),
        "empty": b"",
    }


@pytest.mark.parametrize("kind", sound())
def test_sound_images_and_other_formats_are_not_damaged(kind):
    assert damage(sound()[kind]) is None


@pytest.mark.parametrize("kind", ["baseline", "progressive", "grey", "cmyk", "restarts"])
def test_a_jpeg_cut_anywhere_with_a_new_end_is_damaged(kind):
    """But in its last bytes, where only padding may be lost. libjpeg alone is silent about a cut between two scans."""
    data = sound()[kind]
    for size in range(data.index(b"\xff\xda") + 20, len(data) - 4):
        assert "damaged inside (" in (damage(data[:size] + b"\xff\xd9") or ""), size


def overwritten(data: bytes, start: int, length: int) -> Iterator[bytes]:
    """At many places from `start` on, by bytes that are no markers."""
    for at in range(start, len(data) - length - 2, 61):
        yield data[:at] + np.random.default_rng(at).integers(0, 255, length, np.uint8).tobytes() + data[at + length :]


def test_what_libjpeg_can_tell():
    """As docs/data.md has it: of single bytes in a face crop about two thirds, of 64 and more all."""
    rough = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(rough).resize((112, 112), Image.Resampling.BICUBIC))
    out = io.BytesIO()
    noisy = np.clip(smooth + np.random.default_rng(0).normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(out, "JPEG", quality=95)
    data = out.getvalue()
    for length, least, most in ((1, 0.5, 0.8), (64, 0.98, 1)):
        told = [damage(changed) is not None for changed in overwritten(data, data.index(b"\xff\xda") + 14, length)]
        assert least < np.mean(told) <= most, length


def test_png_notices_every_changed_byte_of_its_pixels():
    pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")
    decoder, data = Decoder(32, 1, 1, torch.device("cpu")), picture(1, 32, ".png")
    for changed in overwritten(data, data.index(b"IDAT") + 4, 1):
        with pytest.raises(UnreadableImagesError):
            decoder([changed], {})


@pytest.mark.parametrize("kind", ["baseline", "progressive", "restarts"])
def test_a_hole_of_zeros_is_damage(kind):
    """As a lost block of a disk leaves it."""
    data = sound(size=112)[kind]
    start = data.index(b"\xff\xda") + 100
    assert "damaged inside (" in (damage(data[:start] + bytes(512) + data[start + 512 :]) or "")
