"""What bytes are before they are decoded: their sizes, why some cannot be used, and the groups in which they are decoded."""

import io
import zlib

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pictures import picture, write_folder

from dali_loaders import open_source, reading, reasons
from dali_loaders.account import ReadError
from dali_loaders.decode import Decoder, UnreadableImagesError
from dali_loaders.encoded import GROUP_PIXELS, HeaderReader, Unreadable, groups, is_complete, read_image
from dali_loaders.reading import StorageError
from dali_loaders.uncommon import size_of

pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")

CPU = torch.device("cpu")


class OneImage:
    """A source whose only image has these bytes, or fails with this error."""

    path = "set"

    def __init__(self, data: bytes | Exception) -> None:
        self.data = data

    def read(self, index: int) -> bytes:
        if isinstance(self.data, Exception):
            raise self.data
        return self.data


def why(data: bytes | Exception) -> str | None:
    """The reason why an image is unreadable; None where it is decoded."""
    try:
        Decoder(32, 1, 1, CPU)([read_image(OneImage(data), 0)], {})
    except UnreadableImagesError as error:
        return error.why[0]
    return None


def decoded(data: bytes) -> np.ndarray:
    """Levels 0..255, [32, 32, 3]."""
    images = Decoder(32, 1, 1, CPU)([read_image(OneImage(data), 0)], {})
    return (images[0] * 127.5 + 127.5).permute(1, 2, 0).numpy()


def opencv(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32)


def by_pillow(form: str, mode: str = "RGB", **options) -> bytes:
    Image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    Image.open(io.BytesIO(picture(1, 32, ".png"))).convert(mode).save(out, form, **options)
    return out.getvalue()


@pytest.mark.parametrize("extension", [".bmp", ".tiff", ".ppm"])
def test_other_formats_become_png(tmp_path, extension):
    write_folder(tmp_path / "set", 1, 2, extension)
    (tmp_path / "set" / "person00" / f"02{extension}").write_bytes(picture(1, 32, extension)[:20])
    source = open_source(str(tmp_path / "set"))
    _, second, broken = (read_image(source, index) for index in range(3))
    assert isinstance(broken, Unreadable) and "cut off" in broken.reason
    assert np.array_equal(decoded(second).round(), opencv(source.read(1)))
    assert size_of(source.read(1)) == (32, 32)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("GIF", {}),
        ("AVIF", {}),
        ("ICO", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("TIFF", {"mode": "I;16"}),
        ("BMP", {"mode": "P"}),
        ("TIFF", {"big_tiff": True}),
        ("PPM", {"mode": "L"}),
        ("PPM", {"mode": "1"}),
        ("JPEG2000", {}),
        ("PNG", {"mode": "LA"}),
        ("PNG", {"mode": "1"}),
        ("WEBP", {"mode": "RGBA", "lossless": True}),
        ("JPEG", {"mode": "CMYK"}),
        ("JPEG", {"progressive": True}),
        ("MPO", {}),
    ],
)
def test_every_format_is_decoded_as_opencv_decodes_it_or_named(form, options):
    data = by_pillow(form, **options)
    refused = {"JPEG2000": "JPEG 2000", "TIFF": "BigTIFF"}.get(form, form)
    if form in ("GIF", "AVIF", "ICO", "JPEG2000") or "big_tiff" in options:
        assert why(data) == f"{refused}, which nothing here decodes"
    else:
        assert np.abs(decoded(data) - opencv(data)).max() <= 3


def test_of_animations_the_first_picture_is_taken():
    Image = pytest.importorskip("PIL.Image")
    second = [Image.open(io.BytesIO(picture(2, 32, ".png")))]
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = by_pillow(form, save_all=True, append_images=second, **options)
        assert np.abs(decoded(data) - opencv(picture(1, 32, ".png"))).max() < 1e-3


@pytest.mark.parametrize(
    ("extension", "reason"),
    [
        (".tiff", "floating-point pixels, whose range is unknown"),
        (".pfm", "PFM, which nothing here decodes"),
        (".hdr", "Radiance HDR, which nothing here decodes"),
    ],
)
def test_floating_point_pixels_are_refused_for_they_would_be_nearly_black_or_noise(extension, reason):
    assert why(cv2.imencode(extension, np.full((32, 32, 3), 0.5, np.float32))[1].tobytes()) == reason


def with_header(code: int, bits: int = 8, height: int = 32) -> bytes:
    jpeg = bytearray(picture(1))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 1], jpeg[at + 4], jpeg[at + 5 : at + 7] = code, bits, height.to_bytes(2, "big")
    return bytes(jpeg)


PNG, WEBP = picture(1, 32, ".png"), picture(1, 32, ".webp")
REASONS = {
    "empty": b"",
    "cut off": picture(1)[:-40],
    "damaged": PNG[:200] + b"\x55\xaa\x55" + PNG[203:],
    "zero bytes only (a download or copy that was never completed)": bytes(3000),
    "text": "ein Gesicht, größer".encode(),
    "no image by its content": b"\x07\x80\xff\x13" * 20,
    "HTML page (a download that failed)": b"\n<!DOCTYPE html><html><body>404</body></html>",
    "XML (a download that failed)": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "SVG, which nothing here decodes": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "Git LFS pointer in place of the file; run git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
    "HEIC, which nothing here decodes": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "video (MP4 or QuickTime), which nothing here decodes": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom",
    "video (AVI), which nothing here decodes": b"RIFF\x24\0\0\0AVI LIST",
    "GIF, which nothing here decodes": b"GIF89a",
    "PDF, which nothing here decodes": b"%PDF-1.7",
    "zip file, which nothing here decodes": b"PK\3\4\x14\0",
    "lossless JPEG, which nothing here decodes": with_header(0xC3),
    "hierarchical JPEG, which nothing here decodes": with_header(0xC5),
    "JPEG of 12 bits, which nothing here decodes": with_header(0xC1, bits=12),
    "JPEG whose height stands after its lines, which nothing here decodes": with_header(0xC0, height=0),
}


@pytest.mark.parametrize("reason", REASONS)
def test_the_reason_is_told_by_the_content(reason):
    assert why(REASONS[reason]) == reason


@pytest.mark.parametrize("data", [PNG[:-30], PNG[:200], PNG[:20], PNG[:8], WEBP[:-30], WEBP[:20], picture(1)[:100], picture(1)[:3]])
def test_cut_images_are_called_cut_off(data):
    assert why(data) == "cut off"


def test_the_reason_of_an_image_that_cannot_be_read(monkeypatch):
    monkeypatch.setattr(reading, "WAITS", ())
    assert why(PermissionError(13, "Permission denied")) == "permission denied"
    with pytest.raises(StorageError, match="Stale file handle"):
        why(OSError(116, "Stale file handle"))
    assert why(ReadError("vanished")) == "vanished"


def test_a_header_that_claims_gigabytes():
    ihdr = b"IHDR" + (60_000).to_bytes(4, "big") + (70_000).to_bytes(4, "big") + PNG[24:29]
    huge = PNG[:12] + ihdr + zlib.crc32(ihdr).to_bytes(4, "big") + PNG[33:]
    assert why(huge) == reasons.too_large(70_000, 60_000) == "too large (60000 x 70000 pixels)"
    assert HeaderReader(1).sizes([huge])[0].tolist() == [[0, 0]]
    bmp, tiff = bytearray(picture(1, 32, ".bmp")), picture(1, 32, ".tiff")
    bmp[18:26] = (60_000).to_bytes(4, "little") + (-70_000).to_bytes(4, "little", signed=True)
    size = (257).to_bytes(2, "little") + b"\3\0\1\0\0\0"
    tiff = tiff.replace(size + b"\x20\0", size + (70_000 - 65_536).to_bytes(2, "little")).replace(size, size[:2] + b"\4" + size[3:], 1)
    at = tiff.index(size[:2] + b"\4") + 8
    tiff = tiff[:at] + (70_000).to_bytes(4, "little") + tiff[at + 4 :]
    assert size_of(tiff) == (70_000, 32)
    assert why(bytes(bmp)) == why(b"P6 # a comment\n60000\n#\n70000 255\n") == "too large (60000 x 70000 pixels)"


def test_sizes_from_headers():
    encoded = [picture(1, (20, 50)), b"", PNG, b"text", Unreadable("permission denied"), picture(1)[:100]]
    sizes_b2, why = HeaderReader(6).sizes(encoded)
    assert sizes_b2.tolist() == [[20, 50], [0, 0], [32, 32], [0, 0], [0, 0], [0, 0]]
    assert why == {1: "empty", 3: "text", 4: "permission denied", 5: "cut off"}


@pytest.mark.parametrize("extension", [".jpg", ".png", ".webp", ".bmp", ".tiff", ".ppm"])
def test_motion_photos_are_images(extension):
    """A video behind the image, with the marker of a scan in it."""
    motion = picture(1, 32, extension) + b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\x08mdat" * 10
    assert np.array_equal(decoded(motion), decoded(picture(1, 32, extension)))


@pytest.mark.parametrize("turn", [3, 6, 8])
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG", "TIFF"])
def test_every_format_is_turned_as_its_exif_data_say(form, turn):
    Image = pytest.importorskip("PIL.Image")
    from PIL.ImageOps import exif_transpose

    exif = Image.Exif()
    exif[0x112] = turn
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(form, {})
    data = by_pillow(form, exif=exif, **options)
    expected = np.asarray(exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.abs(decoded(data) - expected).mean() < 2


def test_a_motion_photo_is_complete():
    assert is_complete(picture(1) + b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\x08mdat" * 10)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=30), st.integers(1, 4000))
def test_groups_cover_a_batch_in_order_and_hold_no_more_than_allowed(sizes, most):
    sizes_b2 = np.array(sizes, np.int64).reshape(-1, 2)
    parts = groups(sizes_b2, most)
    assert [at for part in parts for at in range(part.start, part.stop)] == list(range(len(sizes)))
    held = [int(sizes_b2[part].prod(axis=1).sum()) for part in parts]
    for part, pixels in zip(parts, held, strict=True):
        assert part.stop > part.start and (pixels <= most or np.count_nonzero(sizes_b2[part].prod(axis=1)) == 1)
    # No two neighbours would have fitted into one.
    first = [next(pixels for pixels in sizes_b2[part].prod(axis=1).tolist() if pixels or part.stop == len(sizes)) for part in parts]
    assert all(pixels + following > most for pixels, following in zip(held, first[1:], strict=False))


def test_a_usual_batch_is_one_group_and_photos_are_several():
    assert groups(np.full((256, 2), 112)) == [slice(0, 256)]
    assert groups(np.full((256, 2), 512)) == [slice(0, 256)]
    assert len(groups(np.array([[6000, 8000]] * 4))) == 4
    assert len(groups(np.array([[3000, 4000]] * 16))) == 4
    assert GROUP_PIXELS >= 6000 * 8000
