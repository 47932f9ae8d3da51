"""An error of DALI is told as bad images only where the images are bad, and few pipelines are built to find out."""

import numpy as np
import pytest
import stand_in
import torch
from pictures import picture, write_folder

from dali_loaders import DataConfig, TrainLoader, open_source
from dali_loaders.decode import Decoder, UnreadableImagesError
from dali_loaders.encoded import HeaderReader

dali = pytest.importorskip("nvidia.dali", reason="decoding needs NVIDIA DALI")

CPU = torch.device("cpu")
ENCODED = [picture(n) for n in range(16)]
NO_MEMORY = "CUDA allocation failed: out of memory"


def damaged_png(number: int) -> bytes:
    png = picture(number, 32, ".png")
    return png[:200] + b"\x55\xaa\x55" + png[203:]


@pytest.fixture
def builds(monkeypatch):
    """Batch sizes of the pipelines that were built."""
    sizes, build = [], dali.Pipeline.build

    def count(pipeline):
        if not pipeline._built:
            sizes.append(pipeline.max_batch_size)
        build(pipeline)

    monkeypatch.setattr(dali.Pipeline, "build", count)
    return sizes


def failing(monkeypatch, fails):
    """Makes the runs of pipelines fail for which fails(pipeline) is true."""
    outputs = dali.Pipeline.outputs

    def fail(pipeline, *args, **kwargs):
        if fails(pipeline):
            raise RuntimeError(NO_MEMORY)
        return outputs(pipeline, *args, **kwargs)

    monkeypatch.setattr(dali.Pipeline, "outputs", fail)


def decodes(pipeline) -> bool:
    return b"decoders__Image" in pipeline.serialize()


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("also_alone", [False, True])
def test_no_memory_is_no_bad_image(monkeypatch, builds, batch, also_alone):
    """Whether the CPU can decode single images meanwhile, or nothing can be decoded any more."""
    decoder = Decoder(32, batch, 2, CPU)
    failing(monkeypatch, lambda pipeline: decodes(pipeline) and (also_alone or pipeline.num_threads == 2))
    with pytest.raises(RuntimeError, match=f"not because of damaged images: {NO_MEMORY}") as error:
        decoder(ENCODED[:batch], {})
    assert str(error.value.__cause__) == NO_MEMORY
    assert len(builds) <= 3


def test_no_memory_in_a_batch_with_a_bad_image(monkeypatch):
    """The image is named first, and the next try tells the rest."""
    decoder = Decoder(32, 16, 2, CPU)
    failing(monkeypatch, lambda pipeline: decodes(pipeline) and pipeline.num_threads == 2)
    with pytest.raises(UnreadableImagesError) as error:
        decoder([*ENCODED[:5], damaged_png(1)], {})
    assert list(error.value.why) == [5]
    with pytest.raises(RuntimeError, match=NO_MEMORY):
        decoder(ENCODED[:5], {})


def test_a_broken_parser_is_no_bad_image(monkeypatch, builds):
    failing(monkeypatch, lambda pipeline: True)
    with pytest.raises(RuntimeError, match=f"not because of damaged images: {NO_MEMORY}"):
        HeaderReader(16).sizes(ENCODED)
    assert len(builds) <= 3


def test_memory_of_torch_is_no_bad_image(monkeypatch):
    stand_in.install(monkeypatch)
    decoder = Decoder(32, 16, 2, torch.device("cuda:0"))

    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError(NO_MEMORY)

    monkeypatch.setattr(torch, "empty", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        decoder(ENCODED, {})


def test_bad_images_are_found_with_few_pipelines(builds):
    decoder = Decoder(32, 16, 2, CPU)
    encoded = list(ENCODED)
    encoded[3], encoded[11] = damaged_png(3), damaged_png(11)
    with pytest.raises(UnreadableImagesError) as error:
        decoder(encoded, {"flip": np.zeros(16, np.int32)})
    assert list(error.value.why) == [3, 11]
    # Headers, the batch, and one of single images, again after each bad one.
    assert builds.count(16) == 2
    assert builds.count(1) <= 3


def test_a_batch_of_bad_images_alone(builds):
    """Sound images of the same format tell it from a missing library."""
    with pytest.raises(UnreadableImagesError) as error:
        Decoder(32, 4, 2, CPU)([damaged_png(n) for n in range(4)], {})
    assert list(error.value.why) == [0, 1, 2, 3]


def test_a_run_ends_with_the_error(monkeypatch, tmp_path):
    source = open_source(str(write_folder(tmp_path / "set", identities=4, images=4)))
    failing(monkeypatch, lambda pipeline: decodes(pipeline) and pipeline.num_threads == 2)
    loader = TrainLoader(source, DataConfig(image_size=32, threads=2), seed=1, global_batch=8, skipped_path=str(tmp_path / "skipped.txt"))
    with pytest.raises(RuntimeError, match=NO_MEMORY):
        next(loader)
    assert loader.skipped == [] and not (tmp_path / "skipped.txt").exists()
