"""benchmarks/first_gpu.sh: every row is filled or says why not, whatever a step does."""

from __future__ import annotations

import csv
import glob
import os
import re
import subprocess
import sys
import types
import warnings

import pytest
import torch
from torch.nn import functional

from benchmarks.first_gpu import __main__ as command
from benchmarks.first_gpu import kernels, machine, runner
from benchmarks.first_gpu.page import Page
from benchmarks.first_gpu.rows import Row, Run
from benchmarks.first_gpu.table import STEPS, Step
from partial_fc import RowSGD

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
HEAD = "import json, os, signal, subprocess, sys, time\nrow = lambda *values: open(sys.argv[1], 'a').write(json.dumps(values) + '\\n')\n"


def read(folder):
    """(rows of the CSV file, text of the page) of the only run in the folder."""
    (table,), (page,) = (glob.glob(os.path.join(folder, f"*.{kind}")) for kind in ("csv", "md"))
    with open(table, newline="") as file, open(page) as text:
        return list(csv.DictReader(file)), text.read()


def run_script(folder, wanted):
    """(rows, text of the page); every row must be filled or say why not."""
    script = os.path.join(ROOT, "benchmarks", "first_gpu.sh")
    result = subprocess.run(
        ["bash", script, "out", "10", "--small", "--only", wanted],
        cwd=folder,  # OUT belongs to the caller's folder, whatever the script does
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows, page = read(folder / "out")
    assert list(dict.fromkeys(row["step"] for row in rows)) == wanted.split(",")
    assert all(row["value"] or row["note"].startswith("not measured: ") for row in rows)
    assert all(row["date"] and row["commit"] and row["hardware"] and "first_gpu.sh out" in row["command"] for row in rows)
    assert all(row["what"].replace("|", "\\|") in page for row in rows)
    return rows, page


def test_the_script_on_this_machine(tmp_path):
    rows, page = run_script(tmp_path, "facts,tests,parity,rivals,sync")
    found = {row["what"]: row for row in rows}
    for name, step in (("Tests that need a GPU", "tests"), ("Waiting for the device in a classifier step", "sync")):
        if not torch.cuda.is_available():
            assert found[name]["note"] == "not measured: needs a GPU" and f"## {name} ({step})" in page
    assert float(found["LogSumExp, triton float32: largest error against float64"]["value"]) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("wanted", ["decode", pytest.param("200k,r50,decode,faces,resume,engines", marks=pytest.mark.long)])
def test_steps_that_train(tmp_path, wanted):
    rows, _ = run_script(tmp_path, wanted)
    found = {row["what"]: row for row in rows}
    assert "faces" not in wanted or 0 < float(found["faces_small: EER"]["value"]) < 0.5
    resumed = next((row for row in rows if row["step"] == "resume"), None)
    assert "resume" not in wanted or resumed
    if resumed and not torch.cuda.is_available():
        assert float(resumed["value"]) < 1e-4 and "killed at step 20 of" not in resumed["note"]
    assert float(found["one image in all 128 slots, decoded on the CPU: largest difference"]["value"]) == 0


@pytest.fixture
def outcome(tmp_path, monkeypatch):
    """Runs scripts in place of steps; each adds rows with row(what, value, unit, target, note)."""

    def run(*scripts, minutes=1.0, limit=0.5, **options):
        steps = [Step(f"step{number}", f"Step {number}", machine.facts, (limit, limit), **options) for number in range(len(scripts))]
        texts = {step.name: HEAD + text for step, text in zip(steps, scripts, strict=True)}
        monkeypatch.setattr(runner, "_command", lambda step, path, *_: [sys.executable, "-c", texts[step.name], path])
        page = Page(str(tmp_path / "out"), "bash benchmarks/first_gpu.sh")
        failed = runner.run(page, steps, minutes, small=True)
        return failed, [Row(*row) for _, rows, _ in page.steps for row in rows]

    return run


def test_what_fails_is_named_and_the_next_goes_on(outcome):
    fails = "row('a', 1.5, 's', '', ''); raise RuntimeError('CUDA out of memory')"
    crashes = "os.kill(os.getpid(), signal.SIGSEGV)"
    failed, rows = outcome(fails, crashes, "pass", "row('b', 2, '', '', '')")
    assert failed == ["step0", "step1", "step2"]
    assert [row.what for row in rows] == ["a", "Step 0", "Step 1", "Step 2", "b"]
    assert rows[1].note == "failed: RuntimeError: CUDA out of memory"
    assert rows[2].note == "failed: ended by SIGSEGV" and rows[3].note == "failed: it found nothing"


def test_a_step_that_hangs_is_ended_with_its_children_and_nothing_else(outcome, tmp_path):
    bystander = subprocess.Popen(["sleep", "60"])
    hangs = f"""
child = subprocess.Popen(["sleep", "60"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
row("a", 1, "", "", "")
time.sleep(60)
"""
    try:
        failed, rows = outcome(hangs, limit=0.02)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert failed == ["step0"] and [row.what for row in rows] == ["a", "Step 0"]
    assert rows[1].note == "failed: still running after 0.02 min, and ended"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)


def test_what_there_is_no_time_for_is_left_out(outcome):
    failed, rows = outcome("row('a', 1, '', '', '')", minutes=0.4, limit=0.5)
    assert not failed and rows[0].note == "not run: no time left (it may take 0.5 min)"


def test_what_is_missing_is_named(outcome, monkeypatch):
    _, rows = outcome("pass", needs=("torch", "no_such_package", "no_such.module"))
    assert rows[0].note == "not measured: needs no_such_package and no_such.module, which cannot be imported here"
    step = Step("a", "A", machine.facts, (1, 1), needs_gpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert step.obstacle() == "needs a GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert step.obstacle() is None


def test_steps_fit_their_time():
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert sum(step.minutes[1] for step in STEPS if not step.needs_gpu) < 30
    first_half = STEPS[: [step.name for step in STEPS].index("decode")]
    assert {name for step in first_half for name in step.needs} <= {"triton", "pytest", "hypothesis"}
    assert sum(step.minutes[0] for step in first_half) <= 18


def test_the_page_has_every_step():
    with open(os.path.join(ROOT, "docs", "first-gpu.md")) as file:
        lines = [line for line in file if line.startswith("| `")]
    found = {}
    for _, names, _, minutes, *_ in (line.split("|") for line in lines):
        found |= dict(zip(re.findall("`(.*?)`", names), map(float, minutes.split(",")), strict=True))
    assert found == {step.name: step.minutes[0] for step in STEPS} and list(found)[:14] == [step.name for step in STEPS[:14]]


def test_the_first_half_needs_torch_and_numpy_only():
    """Modules are imported where other packages do not exist, as on a bare GPU machine."""
    missing = ("cv2", "nvidia.dali", "deepspeed", "ray", "mxnet", "matplotlib", "tensorboard", "pytest", "hypothesis", "triton")
    script = f"""
import importlib.abc, sys
class Bare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if any((name + ".").startswith(f"{{package}}.") for package in {missing}):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Bare())
from benchmarks.first_gpu.table import STEPS
print(*[step.name for step in STEPS if not step.obstacle()])
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) - {"sync"} == {"facts", "200k", "1m", "10m", "rivals", "r50", "r50c", "r100", "r100c"}


def test_bad_input_ends_in_a_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").write_text("")
    for arguments, words in (
        ([str(tmp_path)], "torch sees no GPU here: add --small"),
        ([str(tmp_path), "--small", "--only", "facts,speed"], "there is no step 'speed': known are facts, "),
        ([str(tmp_path / "file" / "out"), "--small"], "cannot be written (Not a directory): choose another folder"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main(arguments)
        assert stop.value.code == 2 and words in " ".join(capsys.readouterr().err.split())
    monkeypatch.setenv("ARCFACE_TORCH", str(tmp_path))
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "out"), "--small"])
    assert "has no backbones/__init__.py" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_gpu_tests_that_fail_are_named(tmp_path, monkeypatch):
    tests = tmp_path / "tests"
    tests.mkdir()
    mark = "import pytest\n@pytest.mark.gpu\n"
    (tests / "test_a.py").write_text(
        f"{mark}@pytest.mark.parametrize('x', ['a b'])\ndef test_bad(x): assert 0\n{mark}def test_good(): pass"
    )
    (tests / "test_b.py").write_text(f"import no_such_package\n{mark}def test_c(): pass\n")
    (tests / "test_d.py").write_text("import no_such_package\n")  # no such test in it
    monkeypatch.chdir(tmp_path)
    rows = list(machine.tests(Run(True, str(tmp_path))))
    assert [row.what for row in rows] == ["tests/test_a.py::test_bad[a b]", "tests/test_b.py", "pytest -m gpu"]
    assert all(row.failed for row in rows) and "1 failed, 1 passed" in rows[-1].note and "1 error" in rows[-1].note
    (tests / "test_b.py").unlink()
    (tests / "test_a.py").write_text(f"{mark}def test_good(): pass")
    (row,) = machine.tests(Run(True, str(tmp_path)))
    assert row.value.startswith("1 passed")


@pytest.mark.filterwarnings("ignore:called a synchronizing")
def test_places_that_wait_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    size = (50, 4, 8)
    (row,) = kernels._waits("waits", size, 0.5, False, torch.device("cpu"))
    assert row == ("waits", 0, "", "0", "")
    step = RowSGD.step

    def waiting(self, closure=None):
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return step(self, closure)

    monkeypatch.setattr(RowSGD, "step", waiting)
    (row,) = kernels._waits("waits", size, 1.0, True, torch.device("cpu"))
    assert row.value == 1 and "test_first_gpu.py" in row.note and "(3 times)" in row.note


def test_public_kernels_are_called_as_they_ask(monkeypatch):
    """The packages are not installed here: stand-ins with the same arguments (Liger 0.8, cut cross-entropy 25.1)."""
    seen = []

    def liger(input, weight, target, bias=None, accum_dtype=None, chunk_mem_const=1):
        seen.append(chunk_mem_const)
        return functional.cross_entropy(functional.linear(input, weight, bias).float(), target)

    def cut(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high"):
        assert filter_eps is None
        return functional.cross_entropy((e @ c.T).float(), targets)

    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional", "cut_cross_entropy"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["liger_kernel.transformers.functional"], "liger_fused_linear_cross_entropy", liger, raising=False)
    monkeypatch.setattr(sys.modules["cut_cross_entropy"], "linear_cross_entropy", cut, raising=False)
    monkeypatch.setattr(Run, "on_gpu", True)
    rows = list(kernels._rivals(Run(True, ""), "softmax", (8, 60, 16), 1))
    assert [row.what for row in rows] == [f"softmax: {name}" for name in kernels.RIVALS]
    assert len({row.note.rpartition("loss ")[2] for row in rows}) == 1  # all computed the same
    assert set(seen) == {1, -(-60 * 1024 // (8 * 16))}
