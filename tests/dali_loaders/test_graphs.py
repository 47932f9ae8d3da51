"""The graphs of GPUs are defined and serialised without one, which checks the names and kinds of every operator's arguments; other calls
of DALI bind to the installed signatures."""

import inspect
import itertools
import re
from unittest import mock

import pytest
import torch

from dali_loaders import graphs, image_graph
from dali_loaders.augment import ARGUMENTS, augment_arguments

dali = pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
FIRST = ["flip", "matrix", "brightness", "contrast"]
ON_IMAGES = {
    "Erase", "Resize", "WarpAffine", "GaussianBlur", "BrightnessContrast", "Hsv", "ColorSpaceConversion", "JpegCompressionDistortion",
    "CropMirrorNormalize", "_conditional__Split", "_conditional__Merge",
}  # fmt: skip


@pytest.fixture
def without_driver(monkeypatch):
    """A pipeline with the number of a GPU needs a driver even to be serialised; one without is given a GPU when it is built."""
    monkeypatch.setattr(image_graph, "pipeline_options", lambda *given: graphs.pipeline_options(*given) | {"device_id": None})


@pytest.mark.parametrize("decode_on", ["gpu", "cpu"])
@pytest.mark.parametrize("arguments", [[], ["flip"], FIRST, [*ARGUMENTS]])
def test_graphs_of_gpus_are_serialised(without_driver, decode_on, arguments):
    for channels_last, dtype, resize in itertools.product([False, True], [torch.float32, torch.float16], [False, True]):
        options = {"decode_on": decode_on, "arguments": arguments, "channels_last": channels_last, "dtype": dtype, "resize": resize}
        text = image_graph.image_pipeline(112, 128, 4, GPU, **options).serialize()
        assert (b"mixed" in text) == (decode_on == "gpu")
        assert (b"Resize" in text) == (resize or "crop" in arguments)
        assert (b"WarpAffine" in text) == ("matrix" in arguments)
        assert all(name.encode() in text for name in arguments)


@pytest.mark.parametrize("decode_on", ["gpu", "cpu"])
def test_everything_after_decoding_runs_on_the_gpu(without_driver, decode_on):
    pipeline = image_graph.image_pipeline(112, 128, 4, GPU, decode_on=decode_on, resize=True, arguments=ARGUMENTS)
    pipeline.serialize()  # which collects the operators
    on_gpu, on_cpu = set(), set()
    for operator in pipeline._ops:
        name = re.match("OpSpec for (.*):", str(operator._spec))[1]
        (on_gpu if operator.outputs[0].device == "gpu" else on_cpu).add(name)
        arguments = range(operator._spec.NumRegularInput(), operator._spec.NumInput())
        assert all(operator._spec.InputDevice(at) == "cpu" for at in arguments), name
    assert on_gpu - {"decoders__Image"} == ON_IMAGES and ("decoders__Image" in on_gpu) == (decode_on == "gpu")
    assert set(dali.ops.gpu_ops()) >= ON_IMAGES and "decoders__Image" in dali.ops.mixed_ops()
    assert on_cpu - {"decoders__Image"} == {"ExternalSource", "Reinterpret", "_conditional__Split"}


def test_the_gpu_decodes_independently_of_the_place_in_the_batch(without_driver):
    with mock.patch.object(dali.fn.decoders, "image", wraps=dali.fn.decoders.image) as image:
        image_graph.image_pipeline(112, 128, 4, GPU, decode_on="gpu", resize=True)
    options = image.call_args.kwargs
    assert (options["device"], options["hw_decoder_load"], options["jpeg_fancy_upsampling"]) == ("mixed", 0.0, True)


def test_dali_checks_the_names_of_arguments_when_a_graph_is_defined():
    with dali.Pipeline(1, 1, None), pytest.raises(KeyError, match="hw_decoder_lod"):
        dali.fn.decoders.image(dali.fn.external_source(name="encoded"), hw_decoder_lod=0.0)


@pytest.mark.parametrize(
    ("operator", "names"),
    {
        "decoders__Image": ["output_type", "hw_decoder_load", "jpeg_fancy_upsampling", "adjust_orientation"],
        "PeekImageShape": ["adjust_orientation"],
        "Resize": ["size", "roi_start", "roi_end", "roi_relative", "interp_type", "antialias"],
        "Erase": ["anchor", "shape", "fill_value", "axis_names", "normalized"],
        "GaussianBlur": ["sigma"],
        "Hsv": ["saturation", "hue"],
        "ColorSpaceConversion": ["image_type", "output_type"],
        "JpegCompressionDistortion": ["quality"],
        "Reinterpret": ["dtype"],
        "WarpAffine": ["matrix"],
        "BrightnessContrast": ["brightness", "contrast", "contrast_center"],
        "CropMirrorNormalize": ["mirror", "mean", "std", "dtype", "output_layout"],
        "ExternalSource": ["dtype", "ndim"],
    }.items(),
)
def test_operators_know_their_arguments(operator, names):
    schema = dali.backend.GetSchema(operator)
    for name in names:
        assert schema.HasArgument(name) and not schema.IsDeprecatedArg(name)
    if "adjust_orientation" in names:  # sizes are those of the turned image, as it is decoded
        assert schema.GetArgumentDefaultValueString("adjust_orientation") == "True"


def test_memory_that_a_thread_of_nvjpeg_reserves():
    """16 MiB on the GPU and two buffers of 8 MiB in pinned memory: what MAX_THREADS and docs/data.md say."""
    schema = dali.backend.GetSchema("decoders__Image")
    assert int(schema.GetArgumentDefaultValueString("device_memory_padding")) == 16 << 20
    assert int(schema.GetArgumentDefaultValueString("host_memory_padding")) == 8 << 20


INPUTS = {
    "CropMirrorNormalize": ["mirror"],
    "WarpAffine": ["matrix"],
    "Resize": ["size", "roi_start", "roi_end", "interp_type"],
    "Erase": ["anchor", "shape", "fill_value"],
    "GaussianBlur": ["sigma"],
    "BrightnessContrast": ["brightness", "contrast"],
    "Hsv": ["saturation", "hue"],
    "JpegCompressionDistortion": ["quality"],
}


@pytest.mark.parametrize("operator", INPUTS)
def test_arguments_of_a_sample_may_be_inputs(operator):
    """mirror and so on may differ from sample to sample."""
    assert all(dali.backend.GetSchema(operator).IsTensorArgument(name) for name in INPUTS[operator])


def test_arguments_are_described():
    words = set(re.findall(r"\w+", augment_arguments.__doc__))
    assert ARGUMENTS.keys() <= words


def test_other_calls_bind():
    from nvidia.dali.plugin.pytorch import feed_ndarray

    bound = inspect.signature(dali.Pipeline).bind(128, 4, 0, prefetch_queue_depth=1).arguments
    assert bound == {"batch_size": 128, "num_threads": 4, "device_id": 0, "prefetch_queue_depth": 1}
    assert inspect.signature(dali.Pipeline.feed_input).bind("pipeline", "encoded", []).arguments["data"] == []
    assert inspect.signature(dali.Pipeline.schedule_run).bind("pipeline").arguments == {"self": "pipeline"}
    assert inspect.signature(dali.Pipeline.outputs).bind("pipeline", "stream").arguments == {"self": "pipeline", "cuda_stream": "stream"}
    assert inspect.signature(feed_ndarray).bind("tensor", "images", cuda_stream="stream").arguments["arr"] == "images"


def test_streams_of_torch_are_understood():
    class Stream:
        def __cuda_stream__(self):
            return 0, 42

    assert callable(torch.cuda.Stream.__cuda_stream__)
    assert dali.types._raw_cuda_stream_ptr(Stream()).value == 42


def test_outputs_on_a_stream_need_the_default_executor():
    pipeline = dali.Pipeline(**graphs.pipeline_options(8, 1, CPU))
    assert pipeline.exec_async and pipeline.exec_pipelined and not pipeline.exec_separated
    pipeline._require_exec_dynamic("outputs on a stream need")
