"""The first image's own end, wherever other end markers stand, and its header."""

import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import picture

from dali_loaders.jpeg import Frame, frame, has_end

Image = pytest.importorskip("PIL.Image")

END = b"\xff\xd9"
VIDEO = b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 3 + b"\xff\xda\0\x08mdat"  # as a motion photo has it, with a scan marker by chance


def encoded(**options) -> bytes:
    pixels = cv2.imdecode(np.frombuffer(picture(5, (40, 56)), np.uint8), cv2.IMREAD_COLOR)
    noisy = np.clip(pixels + np.random.default_rng(0).normal(0, 9, pixels.shape), 0, 255).astype(np.uint8)
    image = Image.fromarray(noisy).convert(options.pop("mode", "RGB"))
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def segment(marker: int, payload: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(payload) + 2).to_bytes(2, "big") + payload


KINDS = {
    "baseline": encoded(),
    "progressive": encoded(progressive=True, quality=95),
    "grey": encoded(mode="L"),
    "cmyk": encoded(mode="CMYK"),
    "restarts": encoded(restart_marker_blocks=2),
}
KINDS["preview"] = KINDS["baseline"][:2] + segment(0xE1, b"Exif\0\0" + KINDS["grey"]) + KINDS["baseline"][2:]
KINDS["comment"] = KINDS["progressive"][:2] + segment(0xFE, END + b"\xff\xda" + END) + KINDS["progressive"][2:]
KINDS["fill bytes"] = KINDS["restarts"][:2] + b"\xff\xff" + KINDS["restarts"][2:-2] + b"\xff\xff\xff\xd9"
KINDS["lines told last"] = KINDS["baseline"][:-2] + segment(0xDC, b"\0\x28") + END


@pytest.mark.parametrize("kind", KINDS)
def test_whole_images_have_an_end_whatever_follows_it(kind):
    """A motion photo's video, a second image as multi-picture files have it, or anything."""
    data = KINDS[kind]
    for behind in (b"", b"\0", VIDEO, KINDS["progressive"], KINDS["grey"][:-2], bytes(500), b"\xff", b"\xff\xda"):
        assert has_end(data + behind), behind[:20]
        assert has_end(memoryview(data + behind))


@pytest.mark.parametrize("kind", KINDS)
def test_images_cut_anywhere_have_none(kind):
    """Also where the cut falls behind the end marker of a preview."""
    data = KINDS[kind]
    for end in range(2, len(data)):
        assert not has_end(data[:end]), end
        if not data[:end].endswith(b"\xff"):  # which the first zero byte would complete to a stuffed FF
            assert not has_end(data[:end] + bytes(50)), end


def test_a_video_behind_a_cut_image_is_no_end_of_it():
    assert not has_end(KINDS["baseline"][:-2] + VIDEO)
    assert not has_end(KINDS["baseline"][:-2] + KINDS["grey"] + VIDEO)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(sorted(KINDS)), st.integers(0, 4000), st.integers(0, 40))
def test_no_bytes_are_an_error(noise, kind, at, removed):
    data = KINDS[kind][:at] + noise + KINDS[kind][at + removed :]
    assert has_end(data) in (True, False)
    assert frame(data) is None or isinstance(frame(data), Frame)


def test_headers():
    assert frame(KINDS["preview"]) == Frame(0, 8, 40, 56)
    assert frame(KINDS["comment"]) == Frame(2, 8, 40, 56)
    assert frame(b"\xff\xd8\xff") is None
    assert frame(b"\xff\xd8" + segment(0xDA, b"\1\1\0\0\0\0")) is None
