"""Images without DALI: the pixels that DALI gives, to the bit where nothing is resized."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from dali_loaders import DataConfig
from dali_loaders.decode import Decoder
from dali_loaders.skipped import Skipped
from pipeline.evaluation.bin_pairs import MemorySource
from pipeline.export import decoding

SIDE = 112
ENCODINGS = {
    "jpeg": (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 90]),
    "progressive": (".jpg", [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
    "4:4:4": (".jpg", [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]),
    "png": (".png", []),
    "webp": (".webp", []),
}


def picture(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height + width)
    smooth = cv2.resize(rng.integers(0, 256, (12, 12, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 10, smooth.shape), 0, 255).astype(np.uint8)


def both(images: list[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    dali = Decoder(SIDE, len(images), 1, torch.device("cpu"), channels_last=True)(images, {})
    return dali, decoding.batch_of([decoding.decoded_file(image, SIDE).pixels for image in images])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_images_of_the_models_size_are_equal_to_the_bit(encoding):
    extension, options = ENCODINGS[encoding]
    colour = picture(SIDE, SIDE)
    images = [cv2.imencode(extension, image, options)[1].tobytes() for image in (colour, colour[..., 0])]
    if encoding == "png":
        images += [cv2.imencode(".png", image)[1].tobytes() for image in (np.dstack([colour, colour[..., 0]]), colour.astype("u2") * 257)]
    dali, ours = both(images)
    assert torch.equal(dali, ours) and dali.stride() == ours.stride()


@pytest.mark.parametrize("size", [(260, 300), (60, 50), (113, 112), (500, 111), (224, 224)])
@pytest.mark.parametrize("encoding", ["jpeg", "png"])
def test_stretched_images_are_within_three_levels(size, encoding):
    extension, options = ENCODINGS[encoding]
    dali, ours = both([cv2.imencode(extension, picture(*size), options)[1].tobytes()])
    difference = (dali - ours).abs() * 127.5
    assert difference.max() < 3.01 and difference.mean() < 0.02


def test_exif_turns_both():
    turned = cv2.imencode(".jpg", picture(SIDE, SIDE))[1].tobytes()
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    turned = turned[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + turned[2:]
    dali, ours = both([turned])
    assert torch.equal(dali, ours) and not torch.equal(ours, both([cv2.imencode(".jpg", picture(SIDE, SIDE))[1].tobytes()])[1])


def test_batches_leave_out_what_is_unreadable():
    good = cv2.imencode(".png", picture(SIDE, SIDE))[1].tobytes()
    huge = good[:16] + (1 << 15).to_bytes(4, "big") * 2 + good[24:]  # a header may claim gigabytes
    source = MemorySource("set.bin", [good, b"", good[:900], good, huge])
    skipped = Skipped(source, None)
    sizes: list[list[int]] = []
    settings = DataConfig(image_size=SIDE, threads=2), np.arange(5), 2, skipped, lambda _, sizes_b2: sizes.extend(sizes_b2.tolist())
    batches = list(decoding.batches(source, *settings))
    assert sizes == [[SIDE, SIDE]] * 2
    assert [batch.indices.tolist() for batch in batches] == [[0], [3]] and len(skipped) == 3
    assert set(skipped.reasons) == {"empty", "cut off", "too large (32768 x 32768 pixels)"}
