"""Damage that decoders cover up, and what is none."""

import io

import numpy as np
import pytest
from pictures import picture

from dali_loaders.checking.damage import damage

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


@pytest.mark.parametrize("kind", ["baseline", "progressive", "restarts"])
def test_a_hole_of_zeros_is_damage(kind):
    """As a lost block of a disk leaves it."""
    data = sound(size=112)[kind]
    start = data.index(b"\xff\xda") + 100
    assert "damaged inside (" in (damage(data[:start] + bytes(512) + data[start + 512 :]) or "")
