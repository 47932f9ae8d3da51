"""What only a GPU enters, on a stand-in: streams, copies, memory formats, and which GPU is used. None of it was run on a GPU."""

import itertools

import numpy as np
import pytest
import stand_in
import torch
from pictures import picture

from dali_loaders.decode import Decoder

pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")

ENCODED = [picture(n) for n in range(4)]
FLIP = {"flip": np.array([0, 1, 0, 1], np.int32)}


@pytest.fixture
def seen(monkeypatch):
    return stand_in.install(monkeypatch)


@pytest.mark.parametrize(("channels_last", "dtype"), itertools.product([False, True], [torch.float32, torch.float16]))
def test_images_are_those_of_the_cpu(seen, channels_last, dtype):
    expected = Decoder(32, 4, 2, torch.device("cpu"))(ENCODED, FLIP)
    decoder = Decoder(32, 4, 2, torch.device("cuda:1"), channels_last=channels_last, dtype=dtype)
    with stand_in.TensorsStayOnCpu():
        images = decoder(ENCODED, FLIP)
        assert torch.equal(decoder.to_device(torch.arange(3)), torch.arange(3))
    assert (images.shape, images.dtype) == (expected.shape, dtype)
    assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert torch.equal(images, expected.to(dtype))


def test_the_output_is_asked_for_on_the_decoders_stream(seen):
    decoder = Decoder(32, 4, 2, torch.device("cuda:1"))
    with stand_in.TensorsStayOnCpu():
        decoder(ENCODED, FLIP)
    *_, output = seen.outputs
    (copy,) = seen.copies
    assert isinstance(output["cuda_stream"], stand_in.Stream) and output["cuda_stream"] is copy["cuda_stream"]
    assert output["cuda_stream"].device == torch.device("cuda:1")


@pytest.mark.parametrize(("decoder", "decode_on"), [("auto", "gpu"), ("gpu", "gpu"), ("cpu", "cpu")])
def test_decoder_of_a_run_on_a_gpu(seen, decoder, decode_on):
    """`cuda` is the current GPU of the thread that makes the decoder, here the one with number 3. Resizing never joins later."""
    decoder = Decoder(32, 4, 2, torch.device("cuda"), decoder=decoder)
    with stand_in.TensorsStayOnCpu():
        decoder(ENCODED, {})
        decoder([picture(9, (20, 50))], {})
    (made,) = seen.pipelines
    assert (made["device"], made["decode_on"], made["resize"]) == (torch.device("cuda:3"), decode_on, True)


def test_a_run_on_the_cpu_cannot_decode_on_a_gpu():
    assert Decoder(32, 4, 2, torch.device("cpu")).decodes_on == "cpu"
    with pytest.raises(ValueError, match=r"data\.decoder is 'gpu', but this runs on the CPU; expected 'auto' or 'cpu'"):
        Decoder(32, 4, 2, torch.device("cpu"), decoder="gpu")
