"""Every program of the Triton kernel, compiled for five architectures without a GPU, from the arguments that the host code passes: what the
interpreter does not see are types, alignment, layouts, registers and shared memory."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch

from partial_fc import LogSumExp, SoftplusSum, of_classes
from partial_fc.columns import Mask
from partial_fc.kernels import ForwardResult, NeededGradients, Problem, Slopes, triton_kernel

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITCallable  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles nothing where Triton interprets"),
]
KB = 1024
LARGEST_SPILL = 128  # bytes of a thread's registers that lie in memory


class Architecture(NamedTuple):
    shared: int  # bytes that one program may ask for: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
    tensor_cores: str  # the instruction of PTX


ARCHITECTURES = {
    80: Architecture(163 * KB, "mma.sync"),
    86: Architecture(99 * KB, "mma.sync"),
    89: Architecture(99 * KB, "mma.sync"),
    90: Architecture(227 * KB, "wgmma.mma_async"),
    100: Architecture(227 * KB, "tcgen05.mma"),
}


class Variant(NamedTuple):
    """What Triton would compile for one launch."""

    program: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    warps: int
    stages: int

    @property
    def arguments(self) -> dict[str, str]:
        """Value of a constant, otherwise type and alignment."""
        names = list(self.signature)
        constants = {names[place]: str(value) for (place,), value in self.constants.items()}
        others = {names[place]: f"{self.signature[names[place]]} {value}" for (place,), value in self.attributes.items()}
        return {"program": self.program.__name__, "warps": str(self.warps), "stages": str(self.stages)} | others | constants

    @property
    def choices(self) -> frozenset[tuple[str, str]]:
        """What the variant is made of, with the size of blocks as one choice."""
        arguments = self.arguments
        blocks = " ".join(arguments.pop(name, "") for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "warps", "stages"))
        return frozenset(arguments.items()) | {("blocks", blocks)}

    @property
    def is_product(self) -> bool:
        return "BLOCK_M" in self.signature

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.arguments.items())


class NoDevice:
    """In place of Triton's driver of a GPU."""

    def get_current_device(self) -> str:
        return "none"  # the place of what Triton remembers of a device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)


def problems():
    """One for each combination of what the programs depend on."""
    batch, classes = 16, 300
    statistics = [(LogSumExp(), False), (LogSumExp(), True), (SoftplusSum(), False)]
    labels_B, labels_n = torch.arange(batch), torch.arange(classes)
    for options in itertools.product(statistics, *[(False, True)] * 3, (torch.float32, torch.bfloat16), (512, 1000)):
        (statistic, shifts), has_bias, has_labels, normalize, dtype, width = options
        columns = of_classes(torch.randn(classes, width), labels_B, bias_S=torch.zeros(classes) if has_bias else None, normalize=normalize)
        columns = columns._replace(mask=Mask(labels=(labels_B, labels_n))) if has_labels else columns
        yield Problem(torch.randn(batch, width), columns, statistic, shifts, dtype=dtype)


@functools.cache
def variants_of(major: int) -> list[Variant]:
    """Of all launches of forward and backward. Nothing runs, so tensors on the CPU stand for those on a GPU: they are aligned alike."""
    found = {}

    def launched(*, fn, compile, **_):
        signature, constants, (attributes,) = compile["signature"], compile["constants"], compile["configs"]
        variant = Variant(fn.jit_function, signature, constants, attributes, compile["num_warps"], compile["num_stages"])
        found[str(variant)] = variant
        return True  # that it was compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", NoDevice())
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", launched)
        patch.setattr(triton_kernel, "_capability", lambda device: (major, 0))
        patch.setattr(triton_kernel, "_milliseconds", lambda run, blocks: run(blocks) or 0.0)
        patch.setattr(triton_kernel, "UNITS_BYTES", 1)  # several chunks
        for problem in problems():
            patch.setattr(triton_kernel, "_fastest", {})  # so that all blocks are tried
            shard = triton_kernel.forward(problem, NeededGradients())
            result, slope_B = ForwardResult(torch.ones_like(shard.sum_B), shard.exact_columns_B), torch.ones_like(shard.sum_B)
            triton_kernel.backward(problem, result, Slopes(slope_B, slope_B), NeededGradients(queries=True, source=True, bias=True))
    return list(found.values())


@pytest.fixture(scope="module")
def chosen(request):
    """By architecture, so few variants that all pairs (with --long all threes) of choices (a block, a reduction, an optional argument, an
    architecture) that occur are among them: to compile all would take a quarter of an hour."""
    together = 3 if request.config.getoption("--long") else 2
    cases = {}
    for architecture in ARCHITECTURES:
        for variant in variants_of(architecture // 10):
            choices = sorted(variant.choices | {("architecture", str(architecture))})
            cases[architecture, str(variant)] = variant, {(variant.program, *some) for some in itertools.combinations(choices, together)}
    missing = set().union(*(combinations for _, combinations in cases.values()))
    chosen = {architecture: [] for architecture in ARCHITECTURES}
    while missing:
        (architecture, name), (variant, combinations) = max(cases.items(), key=lambda case: len(case[1][1] & missing))
        chosen[architecture].append(variant)
        missing -= combinations
        del cases[architecture, name]
    return chosen


@pytest.mark.parametrize(
    ("major", "rounded"),
    [(8, triton_kernel.ROUNDED), (9, triton_kernel.ROUNDED_HOPPER), (10, triton_kernel.ROUNDED_BLACKWELL), (12, triton_kernel.ROUNDED)],
)
def test_the_variants_are_what_the_kernel_can_be_asked_for(major, rounded):
    values, blocks = {}, {}
    for variant in variants_of(major):
        for name, value in variant.arguments.items():
            values.setdefault((variant.program.__name__, name), set()).add(value)
        blocks.setdefault(variant.program.__name__, set()).add(dict(variant.choices)["blocks"])
    for program in ("row_sums", "weights"):
        assert values[program, "TERMS"] == set(triton_kernel._programs().KNOWN_TERMS)
        assert values[program, "SHIFTS"] == {"True", "False"}
        assert blocks[program] == {" ".join(map(str, shape)) for shape in (*rounded, *triton_kernel.EXACT)}
        for optional in ("bias", "labels", "column_labels"):
            assert "None" in values[program, optional] and len(values[program, optional]) > 1
    assert "None" in values["column_gradients", "inverse"] and len(values["column_gradients", "inverse"]) > 1
    # Aligned to 16 bytes, in all chunks: otherwise loads and stores are narrower.
    assert all("['tt.divisibility', 16]" in value for found in values.values() for value in found if value.startswith("*"))


class Binary(NamedTuple):
    ptx: str
    shared: int
    registers: int
    spilled: int


def compiled(variant, architecture, folder) -> Binary:
    source = ASTSource(variant.program, variant.signature, variant.constants, variant.attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    path = folder / f"{kernel.metadata.hash}.cubin"
    path.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Binary(kernel.asm["ptx"], kernel.metadata.shared, registers, stack + local)


def faults(variant, binary, architecture) -> list[str]:
    limits, found = ARCHITECTURES[architecture], []
    if binary.spilled > LARGEST_SPILL:
        found.append(f"{binary.spilled} bytes of registers are spilled")
    if binary.shared > limits.shared:
        found.append(f"{binary.shared} bytes of shared memory, of {limits.shared}")
    if variant.is_product and "cp.async" not in binary.ptx:
        found.append("loads are not pipelined")
    if variant.is_product and variant.signature["queries"] == "*bf16" and limits.tensor_cores not in binary.ptx:
        found.append(f"no {limits.tensor_cores}")
    return [f"sm_{architecture} {variant}: {fault}" for fault in found]


def one_at_a_time(function):
    lock = threading.Lock()

    def locked(*arguments):
        with lock:
            return function(*arguments)

    return locked


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spills_and_fits(architecture, chosen, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    # CPython 3.11 counts the depth of ast.parse for all threads together, and raises a SystemError if two are in it.
    monkeypatch.setattr(JITCallable, "parse", one_at_a_time(JITCallable.parse))
    with ThreadPoolExecutor(2) as pool:
        binaries = list(pool.map(lambda variant: compiled(variant, architecture, tmp_path), chosen[architecture]))
    pairs = zip(chosen[architecture], binaries, strict=True)
    assert not [fault for variant, binary in pairs for fault in faults(variant, binary, architecture)]
