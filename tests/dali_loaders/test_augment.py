"""Augmentations against plain computations. Images that are not chosen stay as they are, and numbers depend on (seed, place) alone."""

import itertools
import re
from dataclasses import fields, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from changes import ALL, ALL_FRAMED, CHANGES, NONE, PROBABILITIES, only
from hypothesis import given
from hypothesis import strategies as st
from pictures import picture

from dali_loaders import AugmentConfig, DataConfig, TrainLoader, open_source
from dali_loaders.augment import ARGUMENTS, augment_arguments
from dali_loaders.decode import Decoder, UnreadableImagesError
from dali_loaders.order import uniform

pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")

CPU, SIZE, BATCH = torch.device("cpu"), 48, 24
EXTREME = replace(
    ALL,
    **{"rotate": 180, "zoom": 0.9, "shift": 0.9, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 180},
    **{"crop_area": (0.01, 1), "crop_ratio": (0.1, 10), "cutout_area": (0.001, 1), "blur_sigma": (0.1, 20)},
    **{"low_resolution_scale": (0.01, 1), "jpeg_quality": (1, 100)},
)


def pictures(count: int = BATCH, size: int | tuple[int, int] = SIZE) -> list[bytes]:
    return [picture(n, size, ".png") for n in range(count)]


def levels(images: torch.Tensor) -> np.ndarray:
    """The 0..255 values of a normalised batch, BHWC."""
    return (images * 127.5 + 127.5).round().permute(0, 2, 3, 1).numpy()


def augmented(arguments: dict[str, list], size: int = SIZE) -> tuple[list[np.ndarray], np.ndarray]:
    """Pictures (RGB, float), and what the graph makes of them with arguments written as lists."""
    encoded = pictures(len(next(iter(arguments.values()))), size)
    arrays = {name: np.array(values, ARGUMENTS[name][0]) for name, values in arguments.items()}
    images = levels(Decoder(size, len(encoded), 2, CPU)(encoded, arrays))
    return [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32) for data in encoded], images


@pytest.mark.parametrize("change", CHANGES)
def test_images_that_are_not_chosen_stay_as_they_are(change):
    decode = Decoder(SIZE, BATCH, 2, CPU)
    plain = decode(pictures(), {}).clone()
    assert torch.equal(Decoder(SIZE, BATCH, 2, CPU)(pictures(), augment_arguments(only(change, 1e-9), SIZE, 1, np.arange(BATCH))), plain)
    images = Decoder(SIZE, BATCH, 2, CPU)(pictures(), augment_arguments(only(change), SIZE, 1, np.arange(BATCH)))
    same = [torch.equal(a, b) for a, b in zip(images, plain, strict=True)]
    draw = uniform(1, 1, np.arange(BATCH), 35)
    column = {"geometry": 7, "colour": 8, "crop": 11, "frame": 11, "mask": 16, "cutout": 21, "blur": 26, "low_resolution": 28}
    chosen = draw[:, column.get(change, {"grey": 32, "jpeg": 33}.get(change))] < 0.5
    assert same == (~chosen).tolist()


def test_no_option_changes_the_numbers_of_another():
    """And new options changed none of the first ones': theirs are the first seven columns."""
    positions = np.arange(100, 164)
    whole = augment_arguments(ALL, SIZE, 9, positions)
    for change in PROBABILITIES:
        for name, values in augment_arguments(only(change), SIZE, 9, positions).items():
            assert name == "flip" or np.array_equal(values, whole[name])
    old = augment_arguments(AugmentConfig(rotate=10, brightness=0.2, contrast=0.4), SIZE, 9, positions)
    draw = uniform(9, 1, positions, 7)
    assert old.keys() == {"flip", "matrix", "brightness", "contrast"}
    assert np.array_equal(old["flip"], draw[:, 0] < 0.5)
    assert np.allclose(np.degrees(np.arctan2(old["matrix"][:, 0, 1], old["matrix"][:, 0, 0])), 20 * draw[:, 1] - 10, atol=1e-4)
    assert np.allclose(old["brightness"], 0.8 + 0.4 * draw[:, 5]) and np.allclose(old["contrast"], 0.6 + 0.8 * draw[:, 6])


@pytest.mark.parametrize("chosen", [AugmentConfig(), ALL, ALL_FRAMED, AugmentConfig.named("adaface")])
def test_arguments_depend_on_seed_and_position_alone(chosen):
    whole, part = augment_arguments(chosen, SIZE, 9, np.arange(100, 200)), augment_arguments(chosen, SIZE, 9, np.arange(150, 160))
    assert whole.keys() == part.keys() <= ARGUMENTS.keys()
    for name, values in whole.items():
        assert np.array_equal(values[50:60], part[name])
        assert (values.dtype, values.ndim - 1) == ARGUMENTS[name] and values.flags.c_contiguous
        other = augment_arguments(chosen, SIZE, 8, np.arange(100, 200))[name]
        assert not np.array_equal(values, other) or not values.any()  # adaface leaves the hue at 0


def test_ranges_are_used_and_kept():
    arguments = augment_arguments(replace(ALL, crop=1, hue=90, saturation=0.5), SIZE, 1, np.arange(5000))
    height, width = (arguments["crop_end"] - arguments["crop_start"]).T
    assert arguments["crop_start"].min() >= 0 and arguments["crop_end"].max() <= 1 + 1e-6
    for values, least, most in (
        (height * width, 0.2, 1.0),
        (np.log(width / height), np.log(3 / 4), np.log(4 / 3)),
        (arguments["sigma"], 0.5, 1.5),
        (arguments["saturation"], 0.5, 1.5),
        (arguments["hue"], -90, 90),
        (arguments["low_size"], 9, 38),
        (arguments["quality"], 5, 50),
        (arguments["shrink"], 0, 3),
    ):
        assert least - 1e-6 <= values.min() <= least + 0.01 * (most - least)
        assert most - 0.01 * (most - least) - (values.dtype == np.int32) <= values.max() <= most + 1e-6
    assert set(arguments["quality"]) == set(range(5, 51))
    for change in ("mask", "geometry", "cutout", "blur", "low_resolution", "colour", "grey", "jpeg"):
        assert 0.47 < arguments[change].mean() < 0.53
    smooth = arguments["smooth"].mean()
    assert 0.17 < smooth < 0.23


ENDS = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda ends: tuple(sorted(ends)))
RATIOS = st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(lambda ends: tuple(sorted(ends)))


@given(ENDS, RATIOS, ENDS, st.integers(8, 600), st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_parts_lie_in_the_image(areas, ratios, cutouts, size, seed, position):
    chosen = replace(NONE, crop=0.5, crop_area=areas, crop_ratio=ratios, cutout=0.5, cutout_area=cutouts)
    places = np.arange(position, position + 8)
    resized, framed = (augment_arguments(replace(chosen, crop_resize=resize), size, seed, places) for resize in (True, False))
    start, end = resized["crop_start"], resized["crop_end"]
    assert (start >= 0).all() and (start < end).all() and (end <= 1 + 1e-6).all()
    area = np.prod(end - start, axis=1)
    assert (area >= areas[0] * (1 - 1e-5)).all() and (area <= areas[1] * (1 + 1e-5)).all()
    anchor, shape = framed["frame_anchor"].reshape(-1, 4, 2).astype(int), framed["frame_shape"].reshape(-1, 4, 2).astype(int)
    for corners, sides in zip(anchor, shape, strict=True):
        black = np.zeros((size, size), int)
        for (y, x), (height, width) in zip(corners, sides, strict=True):
            assert min(y, x, height, width) >= 0 and y + height <= size and x + width <= size
            black[y : y + height, x : x + width] += 1
        assert black.max() <= 1 and black.sum() < size**2  # no rectangle covers another, and something is left
    anchor, shape = framed["cutout_anchor"], framed["cutout_shape"]
    assert (anchor >= 0).all() and (shape >= 1).all() and (anchor + shape <= size).all()
    assert (anchor == anchor.round()).all() and (shape == shape.round()).all()


def test_mask_covers_the_lower_face():
    before, after = augmented({"mask": [1] * 4, **{n: v.tolist() for n, v in masks(4).items()}}, 112)
    for old, new, colour in zip(before, after, masks(4)["mask_colour"], strict=True):
        changed = (new != old).any(-1)
        assert (new[changed] == colour).all()
        assert not changed[:58].any() and changed[68:90, 20:92].mean() > 0.99  # below the eyes; nose, mouth and cheeks
        assert not changed[:, :16].any() and not changed[:, 96:].any() and not changed[108:, :30].any()
        assert changed[68:].any(1).all()  # no gap between strips


def masks(count: int) -> dict[str, np.ndarray]:
    arguments = augment_arguments(replace(NONE, mask=1), 112, 2, np.arange(count))
    return {name: arguments[name] for name in ("mask_anchor", "mask_shape", "mask_colour")}


def test_cutout_and_frame():
    before, after = augmented({"cutout": [1, 0], "cutout_anchor": [[5, 9], [0, 0]], "cutout_shape": [[10, 20], [4, 4]]})
    before[0][5:15, 9:29] = 128
    assert np.array_equal(after, before)
    arguments = augment_arguments(only("frame", 1), SIZE, 1, np.arange(8))
    before, after = augmented({name: arguments[name].tolist() for name in ("frame", "frame_anchor", "frame_shape")})
    for old, new, anchor, shape in zip(before, after, arguments["frame_anchor"], arguments["frame_shape"], strict=True):
        (top, left), (height, width) = np.array([shape[0], shape[5]], int), np.array([shape[4], anchor[7] - shape[5]], int)
        expected = np.zeros_like(old)
        expected[top : top + height, left : left + width] = old[top : top + height, left : left + width]
        assert np.array_equal(new, expected)
        assert 0.15 < height * width / SIZE**2 < 1 and 0.6 < width / height < 1.6


def test_crop_is_enlarged_from_the_image_as_it_was_decoded():
    start, end = [0.25, 0.5], [0.75, 1.0]
    before, after = augmented({"crop": [1, 0], "crop_start": [start, start], "crop_end": [end, end]})
    expected = cv2.resize(before[0][12:36, 24:48], (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
    assert np.abs(after[0] - expected)[2:-2, 2:-2].max() <= 1.5
    assert np.array_equal(after[1], before[1])
    large = pictures(1, 4 * SIZE)
    arrays = {"crop": np.array([True]), "crop_start": np.array([start], np.float32), "crop_end": np.array([end], np.float32)}
    image = levels(Decoder(SIZE, 1, 1, CPU)(large, arrays))
    whole = cv2.imdecode(np.frombuffer(large[0], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    half = whole[48:144, 96:192]
    assert np.abs(image[0] - cv2.resize(half, (SIZE, SIZE), interpolation=cv2.INTER_AREA)).mean() < 2


def test_images_of_other_sizes_change_nothing_for_the_rest():
    arguments = augment_arguments(ALL, SIZE, 1, np.arange(BATCH))
    decode = Decoder(SIZE, BATCH, 2, CPU)
    before = decode(pictures(), arguments).clone()
    after = decode([*pictures(BATCH - 1), picture(99, (60, 31))], arguments)
    assert torch.equal(after[:-1], before[:-1])


def test_blur():
    before, after = augmented({"blur": [1, 1, 0], "sigma": [0.5, 1.5, 1]})
    for old, new, sigma in zip(before, after, (0.5, 1.5), strict=False):
        kernel = 2 * int(np.ceil(3 * sigma)) + 1
        assert np.abs(new - cv2.GaussianBlur(old, (kernel, kernel), sigma)).max() <= 1


def test_low_resolution():
    scale, both = [[24, 24]] * 5, [1] * 5
    kinds = [cv2.INTER_LINEAR, cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4]
    before, after = augmented(
        {"low_resolution": both, "low_size": scale, "smooth": [0, 0, 0, 0, 1], "shrink": [0, 1, 2, 3, 1], "enlarge": [1, 0, 2, 3, 1]}
    )
    assert np.array_equal(after[1][::2, ::2], after[1][1::2, 1::2])  # enlarged to squares of 2 x 2
    for index, kind in enumerate(kinds[1:], 1):
        small = cv2.resize(before[index], (24, 24), interpolation=kind)
        expected = cv2.resize(small, (SIZE, SIZE), interpolation=cv2.INTER_NEAREST if index == 1 else kind)
        assert np.abs(after[index] - expected).mean() < 1.5  # the libraries' cubics and Lanczos windows differ
    area = cv2.resize(before[4], (24, 24), interpolation=cv2.INTER_AREA)
    assert np.abs(after[4] - cv2.resize(area, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)).mean() < 2
    odd = before[0][1::2, 1::2]  # the pixel whose centre is nearest, of two the later one
    assert np.abs(after[0] - cv2.resize(odd, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)).max() <= 1


def test_colours():
    """Brightness and contrast, then saturation and hue, which turn and stretch I and Q of YIQ; positive angles turn red to green."""
    brightness, contrast, saturation, hue = [1.5, 1, 1, 1, 0.7], [1, 0.5, 1, 1, 1.2], [1, 1, 1.5, 1, 0.6], [0, 0, 0, 60, -100]
    before, after = augmented({"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue})
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
    for index, old in enumerate(before):
        lit = np.clip(brightness[index] * (127.5 + contrast[index] * (old - 127.5)), 0, 255).round()
        y, i, q = np.moveaxis(lit @ to_yiq.T, -1, 0)
        angle = np.radians(-hue[index])
        turned = [i * np.cos(angle) - q * np.sin(angle), i * np.sin(angle) + q * np.cos(angle)]
        expected = np.stack([y, *(saturation[index] * part for part in turned)], axis=-1) @ np.linalg.inv(to_yiq).T
        assert np.abs(after[index] - np.clip(expected, 0, 255)).max() <= 2


def test_grey():
    before, after = augmented({"grey": [1, 0]})
    assert np.array_equal(after[0][..., 0], after[0][..., 1]) and np.array_equal(after[0][..., 0], after[0][..., 2])
    assert np.abs(after[0][..., 0] - before[0] @ [0.299, 0.587, 0.114]).max() <= 1
    assert np.array_equal(after[1], before[1])


def test_jpeg():
    before, after = augmented({"jpeg": [1, 1, 1], "quality": [10, 50, 95]})
    for old, new, quality in zip(before, after, (10, 50, 95), strict=True):
        data = cv2.imencode(".jpg", old[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        expected = cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32)
        assert np.abs(new - expected).mean() < 1
    assert np.abs(after[0] - before[0]).mean() > 2 * np.abs(after[2] - before[2]).mean()


@pytest.mark.parametrize(("channels_last", "dtype"), itertools.product([False, True], [torch.float32, torch.float16]))
@pytest.mark.parametrize("resize", [True, False])
def test_every_memory_format_has_the_same_values(channels_last, dtype, resize):
    arguments = augment_arguments(replace(ALL, crop_resize=resize), SIZE, 1, np.arange(BATCH))
    expected = Decoder(SIZE, BATCH, 2, CPU)(pictures(), arguments)
    images = Decoder(SIZE, BATCH, 2, CPU, channels_last=channels_last, dtype=dtype)(pictures(), arguments)
    assert torch.equal(images, expected.to(dtype))
    assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize(("channels_last", "dtype"), [(False, torch.float32), (True, torch.float16)])
def test_batches_depend_neither_on_ranks_nor_on_a_resume(folder, channels_last, dtype):
    source, chosen = open_source(str(folder)), DataConfig(image_size=32, threads=1, augment=ALL)

    def images(**options) -> torch.Tensor:
        loader = TrainLoader(source, chosen, seed=3, global_batch=8, channels_last=channels_last, dtype=dtype, **options)
        batches = [next(loader).images.clone() for _ in range(3)]
        loader.close()
        return torch.cat(batches)

    alone = images()
    ranks = [images(rank=rank, world_size=2).view(3, 4, 3, 32, 32) for rank in range(2)]
    assert torch.equal(torch.cat(ranks, dim=1).view(24, 3, 32, 32), alone)
    assert torch.equal(images(consumed=16)[:8], alone[16:])


@pytest.mark.parametrize("size", [8, 9, 50, 113])
@pytest.mark.parametrize("resize", [True, False])
def test_no_range_is_too_wide_and_no_image_too_small(size, resize):
    """Nor do pixels depend on the place in the batch."""
    arguments = augment_arguments(replace(EXTREME, crop_resize=resize), size, 3, np.arange(16))
    encoded = [picture(n, ((3, 90), (70, 5), 1, size)[n % 4], ".png") for n in range(16)]
    decode = Decoder(size, 16, 2, CPU)
    images = decode(encoded, arguments).clone()
    assert images.shape == (16, 3, size, size) and images.abs().max() <= 1
    turned = decode(encoded[::-1], {name: np.ascontiguousarray(values[::-1]) for name, values in arguments.items()})
    assert torch.equal(turned.flip(0), images)
    assert torch.equal(decode(encoded[5:6], {name: values[5:6] for name, values in arguments.items()}), images[5:6])


def test_damaged_images_are_found_among_augmented_ones():
    arguments = augment_arguments(ALL, SIZE, 1, np.arange(BATCH))
    decode = Decoder(SIZE, BATCH, 2, CPU)
    expected = decode(pictures(), arguments).clone()
    broken = pictures()
    broken[7] = broken[7][:200] + b"\x55\xaa\x55" + broken[7][203:]
    with pytest.raises(UnreadableImagesError) as error:
        decode(broken, arguments)
    assert list(error.value.why) == [7]
    assert torch.equal(decode(pictures(), arguments), expected)


def test_named_sets():
    assert AugmentConfig.named("flip") == AugmentConfig()
    assert augment_arguments(AugmentConfig(), SIZE, 1, np.arange(4)).keys() == {"flip"}
    assert not augment_arguments(NONE, SIZE, 1, np.arange(4))["flip"].any()
    adaface = AugmentConfig.named("adaface")
    assert {name: getattr(adaface, name) for name in PROBABILITIES if getattr(adaface, name)} == {
        "crop": 0.2, "low_resolution": 0.2, "colour": 0.2, "geometry": 1.0,
    }  # fmt: skip
    assert (adaface.crop_area, adaface.crop_ratio, adaface.crop_resize) == ((0.2, 1.0), (3 / 4, 4 / 3), False)
    assert (adaface.low_resolution_scale, adaface.brightness, adaface.contrast, adaface.saturation) == ((0.2, 1.0), 0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"data\.augment is 'ada'; expected one of none, flip, adaface, or set its fields"):
        AugmentConfig.named("ada")


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"flip": 0.5}, r"flip is 0\.5; expected true or false"),
        ({"blur": 1.5}, r"blur is 1\.5; expected a number from 0 to 1\."),
        ({"hue": float("nan")}, r"hue is nan; expected a number from 0 to 180\."),
        ({"colour": 0.2}, r"colour is 0\.2, but nothing changes: set an amount, brightness, contrast, saturation, hue\."),
        ({"geometry": 0.2, "hue": 20}, r"geometry is 0\.2, but nothing changes: set an amount, rotate, zoom, shift\."),
        ({"crop_area": (0.5, 0.2)}, r"crop_area is \(0\.5, 0\.2\); expected two numbers, the smaller one first, from 0\.01 to 1\."),
        ({"crop_area": 0.5}, r"crop_area is 0\.5; expected two numbers"),
        ({"crop_ratio": (0.0, 1.0)}, r"crop_ratio is \(0\.0, 1\.0\); expected two numbers, the smaller one first, from 0\.1 to 10\."),
        ({"cutout_area": (0.1,)}, r"cutout_area is \(0\.1,\); expected two numbers"),
        ({"blur_sigma": (0.0, 1.0)}, r"blur_sigma is \(0\.0, 1\.0\); expected two numbers, the smaller one first, from 0\.1 to 20\."),
        ({"low_resolution_scale": (0.5, float("nan"))}, r"low_resolution_scale is \(0\.5, nan\); expected two numbers"),
        ({"jpeg_quality": (0, 90)}, r"jpeg_quality is \(0, 90\); expected two numbers, the smaller one first, from 1 to 100\."),
    ],
)
def test_options_out_of_range(option, sentence):
    with pytest.raises(ValueError, match=rf"^augment\.{sentence}"):
        AugmentConfig(**option)


def test_the_docs_have_every_option_with_its_default():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*?\|(.*?)\|(.*?)\|.*\|.*\|$", page[page.index("| change |") : page.index("- **Numbers**")], re.M)
    written = dict(re.findall(r"`(\w+)` ([\w., ]*\w)", " ".join(cell for row in rows for cell in row)))
    for field in fields(AugmentConfig):
        ends = field.default if isinstance(field.default, tuple) else (field.default,)
        assert written.pop(field.name) == ", ".join(f"{end:.4g}" if not isinstance(end, bool) else str(end).lower() for end in ends)
    assert not written
