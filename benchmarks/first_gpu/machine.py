"""What the machine is, and whether the tests that need a GPU pass on it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.first_gpu.rows import NO_GPU, Row, Run, failed, unmeasured
from pipeline.distributed import cores
from pipeline.measuring import MatrixRate, hardware, seconds

PACKAGES = ("triton", "numpy", "nvidia-dali-.*", "deepspeed", "ray", "liger-kernel", "cut-cross-entropy", "pytest", "opencv-python.*")
SMI = ("driver_version", "memory.total", "clocks.max.sm", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu")


def facts(run: Run) -> Iterator[Row]:
    yield Row("hardware", hardware())
    yield Row("CPU cores", cores())
    yield Row("memory", round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30), "GiB")
    yield Row("Python", platform.python_version())
    yield Row("torch", torch.__version__)
    installed = {re.sub("[-_.]+", "-", part.metadata["Name"].lower()): part.version for part in metadata.distributions()}
    for package in PACKAGES:
        yield Row(package, next((version for name, version in installed.items() if re.fullmatch(package, name)), "not installed"))
    has_header = os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
    compilers = [name for name in ("gcc", "clang", "cc") if shutil.which(name)]
    yield Row("compiler, for Triton", f"{compilers[0] if compilers else 'none'}, {'with' if has_header else 'without'} Python.h")
    yield from _gpu(run) if run.on_gpu else [unmeasured("driver, clocks, CUDA", NO_GPU)]
    dtype, batch, classes, width = (torch.bfloat16, 4096, 65536, 512) if run.on_gpu else (torch.float32, 128, 1024, 128)
    rate = MatrixRate(batch, classes, width, dtype, run.device).measure()
    yield Row("rate of matrix products", round(rate / 1e12, 3), "TFLOP/s", note=f"{dtype}, {batch} x {classes} x {width}")
    source = torch.ones((1 << 30 if run.on_gpu else 1 << 24) // 4, device=run.device)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), run.device) for _ in range(5))
    yield Row("rate of memory", round(2 * 4 * len(source) / best / 1e9, 1), "GB/s", note="a copy, read and written")


def _gpu(run: Run) -> Iterator[Row]:
    yield Row("CUDA", torch.version.cuda or "none")
    yield Row("cuDNN", str(torch.backends.cudnn.version()))
    yield Row("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    yield Row("GPUs visible", torch.cuda.device_count())
    yield Row("compute capability", ".".join(map(str, torch.cuda.get_device_capability(run.device))))
    smi = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
    try:
        values = subprocess.run(smi, capture_output=True, text=True, check=True, timeout=30).stdout.strip().split(",")
    except (OSError, subprocess.SubprocessError) as error:
        yield unmeasured("driver and clocks", f"nvidia-smi: {error}")
        return
    for name, value in zip(SMI, values, strict=True):
        yield Row(name, value.strip())


def tests(run: Run) -> Iterator[Row]:
    """Only files that hold such a test are collected: others may need packages that this machine lacks."""
    files = [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    options = ["-m", "gpu", "-v", "-rfE", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", *options, *files]
    last = "pytest printed nothing"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:  # as they come, so that those before a hang are known
            print(line, end="", flush=True)
            last = line.strip("= \n") or last
            if found := re.match(r"(tests/\S+::.*?) (?:FAILED|ERROR)\b", line):
                yield failed(found[1], "see the log")
            elif found := re.match(r"ERROR (tests/[^:\s]+\.py)(?: - (.*))?$", line):
                yield failed(found[1], found[2] or "see the log")
    yield Row("pytest -m gpu", last) if process.returncode == 0 else failed("pytest -m gpu", last)
