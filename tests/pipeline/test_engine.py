"""Engines on their own: how gradients travel, how weights lie, and what the libraries' arguments are held against."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline.backbones import BackboneConfig, build
from pipeline.checkpoint.parts import Held
from pipeline.distributed import join
from pipeline.engine import BUCKET, EngineConfig, build_engine
from pipeline.engine.module_state import averaged_buffers
from pipeline.schedule import OptimizerConfig

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SGD = OptimizerConfig(lr=0.1, clip=0.0)


def steps(config, count=2, optimizer=SGD, backbone="small"):
    """Weights after a few steps on this rank's half of the images, and what the engine knows of its gradients."""
    place = join("cpu")
    torch.manual_seed(0)
    engine = build_engine(config, optimizer, build(BackboneConfig(backbone, width=8), 32), place, 1)
    mine = IMAGES.chunk(place.world_size)[place.rank]
    for _ in range(count):
        features = engine.forward(mine, True)
        assert features.dtype is torch.float32
        engine.backward(features, torch.ones_like(features) * (1 + place.rank), True)
        engine.clip()
        engine.step(0.1, torch.zeros(()))
    dtypes = {getattr(p, "comm_dtype", p.dtype) for p in engine.module.parameters()}
    return whole_state(engine), dtypes


def whole_state(engine):
    """What the parts of all ranks make together."""
    mine = [(name, part.shape, part.start, part.tensor.detach().reshape(-1).clone()) for name, part in engine.state().items()]
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    state = {}
    for name, shape, start, tensor in itertools.chain.from_iterable(found):
        flat = state.setdefault(name, torch.empty(shape, dtype=tensor.dtype)).view(-1)
        flat[start : start + len(tensor)] = tensor
    return state


def muon_is_compiled():
    steps(EngineConfig("deepspeed"), 1)
    from deepspeed.runtime.zero.muon import original_muon

    return hasattr(original_muon.zeropower_via_newtonschulz5, "_torchdynamo_orig_callable")


def test_deepspeed_starts_without_the_compiler(ranks):
    """Seconds of every start and restart."""
    assert ranks(2).run(muon_is_compiled) == [False, False]


@pytest.mark.parametrize(("engine", "precision"), [("ddp", "float32"), ("deepspeed", "float32"), ("deepspeed", "bfloat16")])
def test_compressed_gradients_differ_by_their_rounding_only(ranks, engine, precision):
    plain, narrow = (
        ranks(2).run(steps, EngineConfig(engine, precision=precision, compress=compress), 1)[0][0] for compress in (False, True)
    )
    differ = False
    for name, tensor in plain.items():
        if name.startswith("optimizer."):  # after one step, momentum is the gradient
            differ |= not torch.equal(tensor, narrow[name])
            torch.testing.assert_close(narrow[name], tensor, rtol=0.02, atol=0.02 * float(tensor.abs().max()))
    assert differ


def test_deepspeed_sends_gradients_as_they_are_unless_asked(ranks):
    """Its autocast would send those of linear layers and convolutions in bfloat16."""
    config = EngineConfig("deepspeed", precision="bfloat16")
    assert ranks(2).run(steps, config, 1)[0][1] == {torch.float32}
    assert torch.bfloat16 in ranks(2).run(steps, replace(config, compress=True), 1)[0][1]


@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
@pytest.mark.parametrize("backbone", ["iresnet18", "small", "small_nobn"])
def test_the_last_layer_is_not_rounded(ranks, engine, backbone):
    assert ranks(1).run(dtypes_of_the_head, engine, backbone)[0] == {torch.float32}


def dtypes_of_the_head(name, backbone):
    config = EngineConfig(name, precision="bfloat16")
    module = build(BackboneConfig(backbone, width=8), 32)
    seen = set()
    for part in (module.fc, module.features):
        part.register_forward_hook(lambda _, inputs, output: seen.update({inputs[0].dtype, output.dtype}))
    rounded = []
    next(part for part in module.modules() if isinstance(part, nn.Conv2d)).register_forward_hook(lambda *a: rounded.append(a[2].dtype))
    build_engine(config, SGD, module, join("cpu"), 1).forward(IMAGES, True)
    assert set(rounded) == {torch.bfloat16}
    return seen


def test_optimizer_state_lies_as_its_parameter(ranks):
    """Fused optimizers go over weights, gradients and state as they lie in memory; a checkpoint's tensors lie otherwise."""
    ranks(1).run(state_goes_through_a_checkpoint)


def state_goes_through_a_checkpoint():
    place = join("cpu")
    for name in ("sgd", "adamw"):
        optimizer = replace(SGD, name=name)
        state, _ = steps(EngineConfig("ddp", precision="float32"), 1, optimizer, "iresnet18")
        engine = build_engine(EngineConfig("ddp", precision="float32"), optimizer, build(BackboneConfig("iresnet18", 8), 32), place, 1)
        engine.load(Held(state))
        for parameter, values in engine.optimizer.state.items():
            for value in values.values():
                assert value.ndim == 0 or value.stride() == parameter.stride()
        for key, value in whole_state(engine).items():
            torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def test_averaging_buffers_is_one_collective(ranks):
    for calls, is_right, is_back in ranks(2).run(averaged):
        assert calls == 1 and is_right and is_back


def averaged():
    rank = dist.get_rank()
    module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(5))
    for number, buffer in enumerate(module.buffers()):
        if buffer.is_floating_point():
            buffer.fill_(number + rank)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce, averaged_buffers(module):
        inside = floating(module)
    return reduce.call_count, inside == [number + 0.5 for number in NUMBERS], floating(module) == [number + rank for number in NUMBERS]


NUMBERS = (0, 1, 3, 4)  # of floating buffers


def floating(module):
    return [float(buffer.max()) for buffer in module.buffers() if buffer.is_floating_point()]


def test_compiled_backbones_keep_the_names_of_weights(ranks):
    assert all(ranks(1).run(names_of_compiled))


def names_of_compiled():
    def compile_eagerly(module):
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    with mock.patch.object(nn.Module, "compile", compile_eagerly):
        compiled, _ = steps(EngineConfig("ddp", precision="float32", compile=True))
    plain, _ = steps(EngineConfig("ddp", precision="float32"))
    torch.testing.assert_close(compiled, plain)
    return list(compiled) == list(plain)


def test_compiled_backbones_train_alike_on_two_ranks(ranks):
    """DDP splits what it compiles at its buckets, here also between entering and leaving the float32 of the head."""
    plain, compiled = (ranks(2).run(compiled_steps, choice)[0] for choice in (False, True))
    torch.testing.assert_close(compiled, plain)


def compiled_steps(compiles):
    def compile_without_compiler(module):
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    small_buckets = partial(nn.parallel.DistributedDataParallel, bucket_cap_mb=0.5)
    with (
        mock.patch.object(nn.Module, "compile", compile_without_compiler),
        mock.patch.object(nn.parallel, "DistributedDataParallel", small_buckets),
        mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1 << 10),
    ):
        return steps(EngineConfig("ddp", precision="bfloat16", compile=compiles))[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_that_travel_during_backward_are_the_same(ranks, stage):
    """What a GPU does, as far as a CPU goes: two buckets in turn, many of them, and weights larger than one."""
    apart, overlapped = (ranks(2).run(overlapped_steps, stage, choice)[0] for choice in (False, True))
    torch.testing.assert_close(overlapped, apart, rtol=0, atol=0)


def overlapped_steps(stage, overlaps):
    import deepspeed

    def initialize(config, **options):
        config["zero_optimization"] |= {"overlap_comm": overlaps, "reduce_bucket_size": 1 << 14}
        return original(config=config, **options)

    original = deepspeed.initialize
    with mock.patch.object(deepspeed, "initialize", initialize):
        return steps(EngineConfig("deepspeed", precision="float32", zero_stage=stage))[0]


class AskedError(Exception):
    pass


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_arguments_of_deepspeed_exist(device, monkeypatch):
    """Its configuration takes unknown names without a word."""
    for name, value in {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}.items():  # which the engine sets, and monkeypatch sets back
        monkeypatch.setenv(name, value)
    import deepspeed
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    asked, probed = {}, dict.fromkeys(["deepspeed_shm_comm"])
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", probed)

    def initialize(*arguments, **options):
        inspect.signature(original).bind(*arguments, **options)
        asked.update(options["config"])
        raise AskedError

    original = deepspeed.initialize
    monkeypatch.setattr(deepspeed, "initialize", initialize)
    monkeypatch.setattr(EngineConfig, "autocasts", lambda *_: torch.bfloat16)
    place = mock.Mock(device=torch.device(device), world_size=2)
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)
    join("cpu")
    with pytest.raises(AskedError):
        build_engine(EngineConfig("deepspeed"), SGD, build(BackboneConfig("small"), 32), place, 1)
    assert asked["zero_optimization"]["overlap_comm"] is (device == "cuda")
    assert probed["deepspeed_shm_comm"] is (False if device == "cpu" else None)  # the extension is for CPUs
    fields = DeepSpeedZeroConfig.model_fields
    assert set(asked["zero_optimization"]) <= {*fields, *(field.alias for field in fields.values())}
    assert asked["zero_optimization"]["reduce_bucket_size"] == BUCKET
    modules = ("runtime.config", "runtime.constants", "runtime.zero.config", "utils.config")
    text = "".join(inspect.getsource(importlib.import_module(f"deepspeed.{name}")) for name in modules)
    for name in [*asked, *asked["torch_autocast"], *asked["timers"], *asked["timers"]["throughput"]]:
        assert re.search(rf"""["']{name}["']|\b{name}: """, text), name


def test_arguments_of_ddp_exist(monkeypatch):
    signature = inspect.signature(nn.parallel.DistributedDataParallel.__init__)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda *a, **o: signature.bind(None, *a, **o) and nn.Identity())
    monkeypatch.setattr(EngineConfig, "autocasts", lambda *_: None)
    join("cpu")
    engine = build_engine(
        EngineConfig("ddp"), SGD, build(BackboneConfig("small"), 32), mock.Mock(device=torch.device("cpu"), world_size=2), 1
    )
    assert isinstance(engine.parallel, nn.Identity)
    weight = next(p for p in engine.module.parameters() if p.ndim == 4 and p.shape[1] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last)
