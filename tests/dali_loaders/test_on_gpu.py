"""Decoding on a GPU against the CPU, and at different places of a batch."""

import itertools

import numpy as np
import pytest
import torch
from changes import ALL, ALL_FRAMED, CHANGES, only
from pictures import picture, write_folder

from dali_loaders import DataConfig, TrainLoader, open_source
from dali_loaders.augment import augment_arguments
from dali_loaders.decode import Decoder, UnreadableImagesError

pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize("decoder", ["gpu", "cpu"])
@pytest.mark.parametrize("extension", [".jpg", ".png", ".webp"])
def test_pixels_are_those_of_the_cpu(decoder, extension):
    encoded = [picture(n, 112, extension) for n in range(128)]
    expected = Decoder(112, 128, 4, CPU)(encoded, {})
    for channels_last, dtype in ((False, torch.float32), (True, torch.float16)):
        images = Decoder(112, 128, 4, GPU, decoder=decoder, channels_last=channels_last, dtype=dtype)(encoded, {})
        assert (images.dtype, images.device.type) == (dtype, "cuda")
        assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        levels = 127.5 * (images.float().cpu() - expected).abs()
        if extension == ".jpg" and decoder == "gpu":  # two decoders, whose roundings add up over the conversion of colours
            assert levels.max() <= 8 and levels.mean() <= 1
        else:
            assert levels.max() <= 0.1


@pytest.mark.parametrize("probability", [0.5, 1e-9, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_augmented_pixels_are_nearly_those_of_the_cpu(change, probability):
    """Images that are not chosen are the very same; of the others a few pixels may fall on the other side of a rounding."""
    encoded = [picture(n, 112, ".png") for n in range(64)]
    arguments = augment_arguments(only(change, probability), 112, 1, np.arange(64))
    plain, expected = Decoder(112, 64, 4, CPU)(encoded, {}), Decoder(112, 64, 4, CPU)(encoded, arguments)
    images = Decoder(112, 64, 4, GPU, decoder="cpu")(encoded, arguments).cpu()
    levels = 127.5 * (images - expected).abs()
    untouched = (expected == plain).flatten(1).all(1)
    assert not untouched.any() or levels[untouched].max() <= 0.1
    # For JPEG there are two implementations: OpenCV's on the CPU and DALI's own on the GPU.
    most, share = (4, 0.2) if change == "jpeg" else (0.5, 0.01)
    assert levels.mean() <= most and (levels > 8).float().mean() <= share


@pytest.mark.parametrize("config", [ALL, ALL_FRAMED])
@pytest.mark.parametrize("decoder", ["gpu", "cpu"])
def test_pixels_do_not_depend_on_the_place_in_the_batch(decoder, config):
    encoded = [picture(n, 112 if n % 3 else (90, 130)) for n in range(128)]
    arguments = augment_arguments(config, 112, 1, np.arange(128))
    decode = Decoder(112, 128, 4, GPU, decoder=decoder)
    images = decode(encoded, arguments)
    reversed_arguments = {name: np.ascontiguousarray(values[::-1]) for name, values in arguments.items()}
    assert torch.equal(images, decode(encoded[::-1], reversed_arguments).flip(0))
    assert torch.equal(images[5:6], decode(encoded[5:6], {name: values[5:6] for name, values in arguments.items()}))


@pytest.mark.parametrize("config", [ALL, ALL_FRAMED])
def test_every_memory_format_has_the_same_values(config):
    encoded = [picture(n, 112, ".png") for n in range(32)]
    arguments = augment_arguments(config, 112, 1, np.arange(32))
    expected = Decoder(112, 32, 4, GPU)(encoded, arguments)
    for channels_last, dtype in itertools.product((False, True), (torch.float32, torch.float16)):
        images = Decoder(112, 32, 4, GPU, channels_last=channels_last, dtype=dtype)(encoded, arguments)
        assert (images.float() - expected).abs().max() <= 1e-3
        assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_unreadable_images_are_found():
    png = picture(1, 32, ".png")
    encoded = [picture(n) for n in range(32)]
    encoded[7] = png[:200] + b"\x55\xaa\x55" + png[203:]
    decode = Decoder(32, 32, 2, GPU)
    with pytest.raises(UnreadableImagesError) as error:
        decode(encoded, {})
    assert list(error.value.why) == [7]
    assert decode(encoded[:7], {}).shape == (7, 3, 32, 32)


def test_batches_of_a_loader(tmp_path):
    source = open_source(str(write_folder(tmp_path / "set", identities=6, images=4)))
    batches = []
    for device in ("cuda", "cpu"):
        loader = TrainLoader(source, DataConfig(image_size=32, threads=2, decoder="cpu"), seed=5, global_batch=8, device=device)
        batches.append([next(loader) for _ in range(6)])
        loader.close()
    for on_gpu, on_cpu in zip(*batches, strict=True):
        assert torch.equal(on_gpu.labels.cpu(), on_cpu.labels)
        assert (on_gpu.images.cpu() - on_cpu.images).abs().max() < 1e-3
