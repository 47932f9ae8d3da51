"""Why an image cannot be used, in a few words: the one list for the log, skipped.txt and `protoshard data check`.

Formats are told by content, because names lie: most downloads that fail are pages of text under the name of an image."""

from __future__ import annotations

from dali_loaders import jpeg

EMPTY = "empty"
CUT_OFF = "cut off"
DAMAGED = "damaged"
NO_HEADER = "no valid header"
ZEROS = "zero bytes only (a download or copy that was never completed)"
FLOATING = "floating-point pixels, whose range is unknown"

PNG = b"\x89PNG\r\n\x1a\n"

# (place, bytes found there, what it is). The first that fits is taken.
_FORMATS = (
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "BigTIFF"),
    (0, b"MM\0+", "BigTIFF"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"8BPS", "Photoshop file"),
    (0, b"v/1\1", "OpenEXR"),
    (0, b"#?R", "Radiance HDR"),
    (0, b"PF\n", "PFM"),
    (0, b"Pf\n", "PFM"),
    (0, b"P7\n", "PAM"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"qoif", "QOI"),
    (0, b"%PDF", "PDF"),
    (0, b"\x1f\x8b", "gzip file"),
    (0, b"PK\3\4", "zip file"),
    (0, b"7z\xbc\xaf", "7-Zip file"),
    (0, b"Rar!", "RAR file"),
    (0, b"\x93NUMPY", "NumPy array"),
    (0, b"\x1aE\xdf\xa3", "video (Matroska)"),
    (8, b"AVI ", "video (AVI)"),
    (0, b"version https://git-lfs.github.com", "Git LFS pointer in place of the file; run git lfs pull"),
)
_BRANDS = {  # of ISO base media files, after "ftyp"
    b"avif": "AVIF",
    b"avis": "AVIF",
    **dict.fromkeys((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), "HEIC"),
    b"crx ": "raw photo (CR3)",
}
_PROCESSES = {3: "lossless", 5: "hierarchical", 6: "hierarchical", 7: "hierarchical", 11: "lossless"}
_PNM = {b"P%d" % number for number in range(1, 7)}


def too_large(height: int, width: int) -> str:
    """For a size that its header claims, in pixels."""
    return f"too large ({width} x {height} pixels)"


def is_webp(data: bytes) -> bool:
    return data.startswith(b"RIFF") and data[8:12] == b"WEBP"


def undecodable(data: bytes) -> str:
    """Why bytes that no decoder here takes are no image, or what is wrong with it."""
    if not data:
        return EMPTY
    if data.startswith(jpeg.START):
        return _of_jpeg(data)
    if data.startswith(PNG):
        return DAMAGED if b"IEND" in data[-64:] else CUT_OFF
    if is_webp(data):
        return CUT_OFF if int.from_bytes(data[4:8], "little") + 8 > len(data) else DAMAGED
    kind = format_of(data)
    if kind in ("BMP", "TIFF", "PNM"):  # which are decoded where they are sound (uncommon.py)
        return f"{kind} that is cut off, damaged, or of a kind that nothing here decodes"
    if kind is not None:
        return kind if kind.startswith("Git") else f"{kind}, which nothing here decodes"
    if not data.strip(b"\0"):
        return ZEROS
    return _of_text(data) or "no image by its content"


def format_of(data: bytes) -> str | None:
    """The name of a format other than JPEG, PNG and WebP; None where it is not known."""
    if data[4:8] == b"ftyp":
        return _BRANDS.get(bytes(data[8:12]), "video (MP4 or QuickTime)")
    if data[:2] in _PNM and data[2:3].isspace():
        return "PNM"
    return next((name for place, start, name in _FORMATS if data[place : place + len(start)] == start), None)


def _of_jpeg(data: bytes) -> str:
    if jpeg.end(data) is None:
        return CUT_OFF
    frame = jpeg.frame(data)
    if frame is None:
        return DAMAGED
    if frame.process in _PROCESSES or frame.process > 11:
        return f"{_PROCESSES.get(frame.process, 'hierarchical')} JPEG, which nothing here decodes"
    if frame.bits != 8:
        return f"JPEG of {frame.bits} bits, which nothing here decodes"
    return DAMAGED if frame.height else "JPEG whose height stands after its lines, which nothing here decodes"


def _of_text(data: bytes) -> str | None:
    start = bytes(data[:1024])
    lower = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if lower.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "HTML page (a download that failed)"
    if lower.startswith(b"<svg") or (lower.startswith(b"<?xml") and b"<svg" in lower):
        return "SVG, which nothing here decodes"
    if lower.startswith((b"<?xml", b"<error")):
        return "XML (a download that failed)"
    try:
        text = start.decode("utf-8", errors="strict" if len(data) <= 1024 else "ignore")
    except UnicodeDecodeError:
        return None
    return "text" if all(character.isprintable() or character.isspace() for character in text) else None
