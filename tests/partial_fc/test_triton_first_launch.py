"""A machine on which Triton cannot launch: without a C compiler or Python.h kernel "auto" is chunked, said once. Triton's driver is
replaced by one that needs no GPU; what it compiles with is the machine's own compiler."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from partial_fc import LogSumExp
from partial_fc.kernels import chunked, triton_kernel
from partial_fc.similarity import _choose

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.build import compile_module_from_src  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="launches nothing where Triton interprets")
has_compiler = pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="needs a C compiler")
CUDA = torch.device("cuda", 0)
MODULE = """
#include <Python.h>
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "compiled_first", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_compiled_first(void) { return PyModule_Create(&definition); }
"""


class Driver:
    """Compiles a module before it launches anything, as the one of a GPU does."""

    def __init__(self, launched):
        compile_module_from_src(MODULE, "compiled_first")
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 17}, load_binary=lambda *_: (None, None, 0, 0, 1024)
        )
        self.launcher_cls = lambda source, metadata: lambda *arguments: launched.append(source.fn)

    def get_current_device(self):
        return self  # the place of what Triton remembers of a device, whose programs it compiles again

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """(programs launched, devices whose capability was asked for) of a GPU that is not there."""
    launched, asked = [], []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    drivers = importlib.import_module("triton.runtime.driver")
    monkeypatch.setattr(drivers, "_create_driver", lambda: Driver(launched))
    monkeypatch.setattr(triton.runtime.driver, "_default", None)
    monkeypatch.setattr(triton.runtime.driver, "_active", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    first_launch = triton_kernel._first_launch
    monkeypatch.setattr(triton_kernel, "_first_launch", lambda device: first_launch(torch.device("cpu")))
    for cached in (triton_kernel._refusal_of, triton_kernel._capability):
        cached.cache_clear()
    yield launched, asked
    for cached in (triton_kernel._refusal_of, triton_kernel._capability):
        cached.cache_clear()


def problem():
    queries_BD = SimpleNamespace(device=CUDA, is_cuda=True)
    return SimpleNamespace(queries_BD=queries_BD, map=None, dtype=torch.bfloat16, statistic=LogSumExp())


@has_compiler
def test_one_small_launch_per_process_and_no_question_per_step(machine):
    launched, asked = machine
    assert [_choose("auto", problem()) for _ in range(3)] == [triton_kernel] * 3
    assert len(launched) == 1 and asked == [CUDA]


def without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def with_a_wrong_cc(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "cc"))


def without_python_h(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda **_: {"include": str(tmp_path)})


def without_a_cache(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (without_a_compiler, "Failed to find C compiler"),
        (with_a_wrong_cc, "No such file or directory: .*cc"),
        pytest.param(without_python_h, "returned non-zero exit status 1", marks=has_compiler),
        (without_a_cache, "Not a directory"),
    ],
)
def test_where_triton_cannot_launch_auto_is_chunked_and_says_so_once(damage, cause, machine, monkeypatch, tmp_path, caplog):
    launched, _ = machine
    damage(monkeypatch, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert [_choose("auto", problem()) for _ in range(3)] == [chunked] * 3
    assert not launched
    (line,) = (record.getMessage() for record in caplog.records if record.name == triton_kernel.__name__)
    assert "kernel 'triton' cannot launch its first program" in line and "\n" not in line
    with pytest.raises(ValueError, match=rf"kernel 'triton' cannot launch its first program \(.*{cause}.*\): Triton needs a C compiler"):
        _choose("triton", problem())


def test_old_gpus_are_refused_without_a_launch(machine, monkeypatch):
    launched, _ = machine
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert _choose("auto", problem()) is chunked
    with pytest.raises(ValueError, match=r"kernel 'triton' needs a GPU of compute capability 8\.0"):
        _choose("triton", problem())
    assert not launched
