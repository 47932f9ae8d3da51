"""The decoded, augmented and normalised images against OpenCV; every encoding gives three channels."""

import gc
import struct
import weakref

import cv2
import numpy as np
import pytest
import torch
from pictures import picture

from dali_loaders import AugmentConfig, DataConfig
from dali_loaders.augment import augment_arguments
from dali_loaders.decode import Decoder, UnreadableImagesError
from dali_loaders.encoded import HeaderReader

pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")

CPU = torch.device("cpu")


def opencv(data: bytes) -> np.ndarray:
    """RGB, float, HWC, 0..255."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32)


def levels(images: torch.Tensor) -> np.ndarray:
    """The 0..255 values of a normalised batch, BHWC."""
    return (images * 127.5 + 127.5).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("extension", [".png", ".jpg", ".webp"])
def test_values_are_those_of_opencv(extension):
    encoded = [picture(n, 32, extension) for n in range(3)]
    images = Decoder(32, 4, 2, CPU)(encoded, {})
    assert images.shape == (3, 3, 32, 32)
    assert images.dtype == torch.float32
    tolerance = 3 if extension in (".jpg", ".webp") else 1e-3  # lossy decoders round differently
    for image, data in zip(levels(images), encoded, strict=True):
        assert np.abs(image - opencv(data)).max() <= tolerance


def test_every_kind_of_image_has_three_channels():
    grey = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    one_bit = cv2.imencode(".png", (grey > 127).astype(np.uint8) * 255, [cv2.IMWRITE_PNG_BILEVEL, 1])[1].tobytes()
    encoded = [
        one_bit,
        cv2.imencode(".png", grey)[1].tobytes(),
        cv2.imencode(".jpg", grey)[1].tobytes(),
        cv2.imencode(".png", np.dstack([grey] * 3 + [np.full_like(grey, 128)]))[1].tobytes(),
        cv2.imencode(".png", grey.astype(np.uint16) * 257)[1].tobytes(),
    ]
    images = levels(Decoder(32, 8, 2, CPU)(encoded, {}))
    assert np.abs(images - images[..., :1]).max() < 1e-3
    assert set(np.unique(images[0].round())) == {0, 255}
    assert np.abs(images[1:, :, :, 0] - grey).max() <= 2


def test_other_sizes_are_stretched_and_the_rest_is_untouched():
    encoded = [picture(n, 32, ".png") for n in range(3)] + [picture(3, (20, 50), ".png")]
    decoder = Decoder(32, 4, 2, CPU)
    before = decoder(encoded[:3], {})
    images = decoder(encoded, {})
    assert torch.equal(images[:3], before)
    assert np.abs(levels(images)[3] - cv2.resize(opencv(encoded[3]), (32, 32), interpolation=cv2.INTER_AREA)).mean() < 6


@pytest.mark.parametrize("size", [32, (20, 50)])
def test_memory_format_and_half_precision(size):
    """The values do not change with the layout, and half precision keeps all 256 levels apart. On to bfloat16, 16 are rounded twice."""
    encoded, arguments = (
        [picture(n, size) for n in range(4)],
        augment_arguments(AugmentConfig(zoom=0.1, brightness=0.2), 32, 3, np.arange(4)),
    )
    expected = Decoder(32, 4, 2, CPU)(encoded, arguments)
    assert expected.is_contiguous()
    for dtype in (torch.float32, torch.float16):
        images = Decoder(32, 4, 2, CPU, channels_last=True, dtype=dtype)(encoded, arguments)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, expected.to(dtype))
    assert torch.equal((images.float() * 127.5 + 127.5).round(), (expected * 127.5 + 127.5).round())
    level = (torch.arange(256) - 127.5) / 127.5
    assert len(level.half().unique()) == 256
    assert (level.half().bfloat16() != level.bfloat16()).sum() == 16


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_camera_says(orientation):
    jpeg = picture(1, (20, 50))
    tag = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x112, 3, 1, orientation, 0, 0)
    turned = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(tag) + 8) + b"Exif\0\0" + tag + jpeg[2:]
    expected = opencv(turned)
    assert expected.shape == ((20, 50, 3) if orientation < 5 else (50, 20, 3))
    assert HeaderReader(1).sizes([turned])[0].tolist() == [list(expected.shape[:2])]
    png = cv2.imencode(".png", expected[..., ::-1].astype(np.uint8))[1].tobytes()
    decoder = Decoder(32, 1, 1, CPU)
    assert np.abs(levels(decoder([turned], {})) - levels(decoder([png], {}))).max() <= 3


def test_a_decoder_is_freed_when_it_is_dropped():
    """With its pipelines, and before Python looks for cycles."""
    decoder = Decoder(32, 4, 2, CPU)
    decoder([picture(1)], {})
    freed = weakref.ref(decoder)
    gc.disable()
    del decoder
    gc.enable()
    assert freed() is None


def test_flip_follows_its_argument():
    encoded = [picture(1, 32, ".png")] * 2
    images = Decoder(32, 2, 1, CPU)(encoded, {"flip": np.array([0, 1], np.int32)})
    assert torch.equal(images[0].flip(-1), images[1])


def test_the_matrix_moves_the_picture_as_opencv_does():
    config = AugmentConfig(flip=False, rotate=20, zoom=0.2, shift=0.1)
    encoded = [picture(n, 32, ".png") for n in range(6)]
    arguments = augment_arguments(config, 32, 3, np.arange(6))
    images = levels(Decoder(32, 6, 2, CPU)(encoded, arguments))
    for image, data, matrix in zip(images, encoded, arguments["matrix"].astype(np.float64), strict=True):
        # DALI counts from the corner of the first pixel, OpenCV from its centre.
        matrix[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5
        expected = cv2.warpAffine(
            opencv(data), matrix, (32, 32), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
        )
        assert np.abs(image - expected).mean() < 1.5


def test_brightness_and_contrast():
    grey = cv2.imencode(".png", np.full((32, 32), 100, np.uint8))[1].tobytes()
    arguments = {"flip": np.zeros(2, np.int32), "brightness": np.array([1.2, 1], np.float32), "contrast": np.array([1, 0.5], np.float32)}
    images = levels(Decoder(32, 2, 1, CPU)([grey] * 2, arguments))
    assert images[0].mean() == pytest.approx(120, abs=1)
    assert images[1].mean() == pytest.approx(127.5 - 27.5 / 2, abs=1)


def test_arguments_depend_on_seed_and_position_alone():
    config = AugmentConfig(rotate=10, zoom=0.1, shift=0.1, brightness=0.2, contrast=0.2)
    whole = augment_arguments(config, 112, 9, np.arange(100, 200))
    part = augment_arguments(config, 112, 9, np.arange(150, 160))
    for name in ("flip", "matrix", "brightness", "contrast"):
        assert np.array_equal(whole[name][50:60], part[name])
    assert not np.array_equal(whole["matrix"], augment_arguments(config, 112, 8, np.arange(100, 200))["matrix"])
    assert np.array_equal(whole["flip"], augment_arguments(AugmentConfig(), 112, 9, np.arange(100, 200))["flip"])


def test_arguments_stay_in_their_ranges():
    config = AugmentConfig(rotate=10, zoom=0.1, brightness=0.2, contrast=0.3)
    arguments = augment_arguments(config, 112, 1, np.arange(5000))
    assert 0.45 < arguments["flip"].mean() < 0.55
    for name, reach in (("brightness", 0.2), ("contrast", 0.3)):
        assert 0.95 * reach < np.abs(arguments[name] - 1).max() <= reach + 1e-6
    scale = 1 / np.sqrt(np.linalg.det(arguments["matrix"][:, :, :2]))
    assert 0.09 < np.abs(scale - 1).max() < 0.1001
    angle = np.degrees(np.arctan2(arguments["matrix"][:, 0, 1], arguments["matrix"][:, 0, 0]))
    assert 9.5 < np.abs(angle).max() < 10.001


def damages() -> dict[str, bytes]:
    jpeg, png, tiff = picture(1), picture(1, 32, ".png"), picture(1, 32, ".tiff")
    return {
        "empty": b"",
        "text": b"text",
        "zeros": bytes(3000),
        "jpeg end": jpeg[:-40],
        "jpeg filled up": jpeg[:-200] + bytes(200),
        "jpeg header": jpeg[:100],
        "jpeg mark": jpeg[:3],
        "png end": png[:-30],
        "png mark": png[:8],
        "png bytes": png[:200] + b"\x55\xaa\x55" + png[203:],
        "tiff end": tiff[:-100],
        "bmp header": picture(1, 32, ".bmp")[:20],
        "webp header": picture(1, 32, ".webp")[:20],
    }


@pytest.mark.parametrize("kind", damages())
def test_unreadable_images_are_found(kind):
    """Large batches and many turns, since DALI alone crashes the process here, though not every time."""
    random = np.random.default_rng(0)
    decoder = Decoder(32, 60, 2, CPU)
    whole = [picture(n) for n in range(60)]
    expected = decoder(whole, {})
    for turn in range(12):
        encoded = list(whole)
        places = sorted(random.choice(60, 1 + turn % 3, replace=False).tolist())
        for place in places:
            encoded[place] = damages()[kind]
        with pytest.raises(UnreadableImagesError) as error:
            decoder(encoded, {})
        assert list(error.value.why) == places
    assert torch.equal(decoder(whole, {}), expected)


@pytest.mark.parametrize("option", [{"rotate": -1}, {"zoom": 1.5}, {"shift": 2}, {"brightness": -0.1}, {"contrast": 1.1}])
def test_augment_options_out_of_range(option):
    (name,) = option
    with pytest.raises(ValueError, match=rf"augment\.{name} is .*expected a number from 0 to"):
        AugmentConfig(**option)


@pytest.mark.parametrize("option", [{"image_size": 0}, {"threads": -1}, {"prefetch": 0}])
def test_data_options_out_of_range(option):
    (name,) = option
    with pytest.raises(ValueError, match=rf"data\.{name} is .*expected at least"):
        DataConfig(**option)


def test_unknown_decoder():
    with pytest.raises(ValueError, match=r"data\.decoder is 'mixed'; expected one of auto, gpu, cpu\."):
        DataConfig(decoder="mixed")


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(224, 1, 16), (224, 8, 16), (64, 8, 8), (4, 1, 4)])
def test_threads_of_large_machines_are_limited(monkeypatch, cores, ranks, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert DataConfig().thread_count() == threads
    assert DataConfig(threads=48).thread_count() == 48


def test_threads_are_shared_among_the_ranks_of_a_machine(monkeypatch):
    assert DataConfig(threads=3).thread_count() == 3
    alone = DataConfig().thread_count()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert DataConfig().thread_count() == 1 <= alone
