"""Decoding on a GPU against the CPU, and at different places of a batch."""

import numpy as np
import pytest
import torch
from pictures import picture, write_folder

from dali_loaders import AugmentConfig, DataConfig, TrainLoader, open_source
from dali_loaders.augment import augment_arguments
from dali_loaders.decode import Decoder, UnreadableImagesError

pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

GPU, CPU = torch.device("cuda"), torch.device("cpu")
ALL = AugmentConfig(rotate=10, zoom=0.1, shift=0.1, brightness=0.2, contrast=0.2)


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


@pytest.mark.parametrize("decoder", ["gpu", "cpu"])
def test_pixels_do_not_depend_on_the_place_in_the_batch(decoder):
    encoded = [picture(n, 112 if n % 3 else (90, 130)) for n in range(128)]
    arguments = augment_arguments(ALL, 112, 1, np.arange(128))
    decode = Decoder(112, 128, 4, GPU, decoder=decoder)
    images = decode(encoded, arguments)
    reversed_arguments = {name: np.ascontiguousarray(values[::-1]) for name, values in arguments.items()}
    assert torch.equal(images, decode(encoded[::-1], reversed_arguments).flip(0))
    assert torch.equal(images[5:6], decode(encoded[5:6], {name: values[5:6] for name, values in arguments.items()}))


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
