"""Where a process stands in a job: which device it takes, and what it says about GPUs that it cannot use."""

from __future__ import annotations

import ctypes
import inspect
import logging
import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from pipeline import distributed
from pipeline.distributed import ARENAS, NCCL_MINUTES, STORE, gpu_fault, join


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "TORCHELASTIC_RUN_ID", STORE):
        monkeypatch.delenv(name, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def pretend(monkeypatch, gpus=8, capability=(9, 0), architectures=("sm_80", "sm_90", "compute_90"), driver=None, cuda="13.0"):
    """A machine with GPUs, as torch sees it."""

    def init():
        if driver:
            raise RuntimeError(driver)

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))


OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update"
FAULTS = [
    ({"cuda": None}, 8, {}, "is built without CUDA"),
    ({"driver": OLD}, 8, {}, r"built for CUDA 13.0, cannot use a GPU \(The NVIDIA driver on your system is too old"),
    ({"gpus": 4}, 8, {}, "8 ranks on this machine see 4 GPUs: start as many ranks as GPUs"),
    ({"gpus": 1}, 2, {"CUDA_VISIBLE_DEVICES": "0", STORE: "x"}, "2 ranks on this machine see 1 GPUs, as CUDA_VISIBLE_DEVICES is '0'"),
    (
        {"driver": "No CUDA GPUs are available"},
        1,
        {"CUDA_VISIBLE_DEVICES": ""},
        r"No CUDA GPUs are available, as CUDA_VISIBLE_DEVICES is ''",
    ),
    ({"capability": (7, 0)}, 8, {}, r"has no kernels for Tesla \(sm_70\), only for sm_80, sm_90, compute_90"),
    ({"capability": (10, 0), "architectures": ("sm_90", "sm_90a")}, 8, {}, r"\(sm_100\)"),
]
GOOD = [
    ({}, 8, {}),
    ({"gpus": 1}, 8, {"CUDA_VISIBLE_DEVICES": "3"}),  # the launcher shows each rank its own
    ({"capability": (8, 6)}, 8, {}),
    ({"capability": (12, 0)}, 8, {}),  # compiled by the driver
]


@pytest.mark.parametrize(("machine", "ranks", "variables", "sentence"), FAULTS)
def test_what_is_wrong_with_gpus(machine, ranks, variables, sentence, monkeypatch, caplog):
    pretend(monkeypatch, **machine)
    for name, value in {**variables, "LOCAL_WORLD_SIZE": str(ranks)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"engine.device is cuda, but .*{sentence}.*engine.device=cpu"):
        join("cuda")
    monkeypatch.setattr(os.path, "exists", lambda path: path.startswith("/proc/driver/nvidia"))
    with caplog.at_level(logging.WARNING):
        assert distributed._computes_on_gpu("auto", ranks) is False
    assert "training on the CPU, although this machine has an NVIDIA GPU" in caplog.text
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    caplog.clear()
    assert distributed._computes_on_gpu("auto", ranks) is False and not caplog.text  # nothing to say where there is no GPU


@pytest.mark.parametrize(("machine", "ranks", "variables"), GOOD)
def test_gpus_that_can_be_used(machine, ranks, variables, monkeypatch):
    pretend(monkeypatch, **machine)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert gpu_fault(ranks) is None
    assert distributed._computes_on_gpu("auto", ranks) and distributed._computes_on_gpu("cuda", ranks)
    assert not distributed._computes_on_gpu("cpu", ranks)


def test_nccl_is_bound_to_the_device_and_waits_as_long_as_asked(monkeypatch):
    pretend(monkeypatch)
    asked, chosen, signature = {}, [], inspect.signature(dist.init_process_group)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **o: asked.update(signature.bind(*a, **o).arguments, device=chosen[-1]))
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    place = join("cuda", minutes=7)
    mine = torch.device("cuda", 3)
    assert place.device == mine and asked["device"] == mine  # chosen before the group is made
    assert asked["backend"] == "nccl" and asked["device_id"] == mine and asked["timeout"] == timedelta(minutes=7 + NCCL_MINUTES)


def test_a_group_that_the_launcher_made_must_fit():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert join("auto").device.type == "cpu" and join("cpu").device.type == "cpu"
    with pytest.raises(ValueError, match=r"engine\.device is cuda, but the launcher joined the ranks with gloo"):
        join("cuda")


FILLING = """
import resource, torch
from pipeline.distributed import keep_freed_memory
keep_freed_memory()
def faults_of_filling():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults_of_filling() for _ in range(20)))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_kept():
    """A tensor of the size of one that was freed soon causes no page faults. In a process of its own, whose memory is orderly."""
    run = subprocess.run([sys.executable, "-c", FILLING], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1000  # of 16,384 pages


ARENAS_OF_THREADS = """
import ctypes, threading
from pipeline.distributed import share_freed_memory
share_freed_memory()
c_library = ctypes.CDLL(None)
c_library.malloc.restype = c_library.fopen.restype = ctypes.c_void_p
c_library.malloc_info.argtypes, c_library.fclose.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_void_p]
all_at_once = threading.Barrier(40)
def take():
    c_library.malloc(100)
    all_at_once.wait()
threads = [threading.Thread(target=take) for _ in range(40)]
for thread in threads: thread.start()
for thread in threads: thread.join()
file = c_library.fopen(b"/dev/stdout", b"a")
c_library.malloc_info(0, file)
c_library.fclose(file)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_threads_share_arenas():
    """Or else each evaluation, which has new threads, would leave some memory behind."""
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    run = subprocess.run([sys.executable, "-c", ARENAS_OF_THREADS], capture_output=True, text=True, check=True, env=environment)
    assert 1 <= run.stdout.count("<heap nr=") <= ARENAS
