"""Commands that are broken off end with a sentence, an exit code of their own, and no temporary files."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from dali_loaders.faces import FacesConfig, write_faces
from dali_loaders.packing import partial
from dali_loaders.sources import FolderSource
from pipeline.cli import main

ENDS = {signal.SIGTERM: (143, "terminated"), signal.SIGHUP: (129, "terminated"), signal.SIGINT: (130, "interrupted")}


@pytest.fixture(autouse=True)
def usual_handlers():
    """Other tests left theirs, and under nohup or in the background of a shell signals are ignored."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        assert signal.signal(number, handler) is usual[number]


@pytest.fixture
def faces(tmp_path):
    write_faces(str(tmp_path / "faces"), FacesConfig(identities=3, images_per_identity=4, size=16), workers=1)
    return tmp_path / "faces"


@pytest.fixture
def signalled(monkeypatch):
    """A signal comes while the tenth image is read."""

    def install(number):
        read = FolderSource.read

        def read_and_signal(self, index):
            if index == 9:
                os.kill(os.getpid(), number)
            return read(self, index)

        monkeypatch.setattr(FolderSource, "read", read_and_signal)

    monkeypatch.setattr(partial, "SECONDS", 0.0)
    return install


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_leaves_nothing_behind(faces, tmp_path, signalled, capsys, number):
    signalled(number)
    before = set(os.listdir(tmp_path))
    code, word = ENDS[number]
    assert main(["data", "pack", str(faces), str(tmp_path / "out.rec"), "--workers", "1"]) == code
    assert capsys.readouterr().err.splitlines()[1:] == [f"protoshard: {word}; nothing was written"]  # behind "starting"
    assert set(os.listdir(tmp_path)) == before


def test_what_is_to_be_resumed_stays(faces, tmp_path, signalled, monkeypatch, capsys):
    command = ["data", "pack", str(faces), str(tmp_path / "out.rec"), "--workers", "1", "--resume"]
    with monkeypatch.context():
        signalled(signal.SIGTERM)
        assert main(command) == 143
    assert "the same command goes on where it stopped" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command) == 0
    assert capsys.readouterr().out == f"12 images of 3 identities in {tmp_path / 'out.rec'}\n"
    assert not (tmp_path / "out.rec.partial").exists()


def test_pack_says_what_it_left_out(faces, tmp_path, capsys):
    next((faces / "000001").iterdir()).write_bytes(b"")
    assert main(["data", "pack", str(faces), str(tmp_path / "out.rec")]) == 1
    assert "left out: 1 of 12 images" in capsys.readouterr().out
    assert "\tempty\n" in (tmp_path / "out.left_out.txt").read_text()


def run(*arguments, **options):
    return subprocess.Popen([sys.executable, "-m", "pipeline.cli", *arguments], stderr=subprocess.PIPE, **options)


@pytest.mark.parametrize(("arguments", "code"), [(["config", "faces_small"], 141), (["--help"], 0)])  # argparse sees to its own output
def test_a_reader_that_has_gone(arguments, code):
    """As in `protoshard config faces_small | head -0`."""
    read, write = os.pipe()
    os.close(read)
    job = run(*arguments, stdout=write)
    os.close(write)
    assert (job.communicate(timeout=60)[1], job.returncode) == (b"", code)


def test_a_full_disk_behind_the_output():
    with open("/dev/full", "wb") as full:
        job = run("config", "faces_small", stdout=full)
        assert job.communicate(timeout=60)[1] == b"protoshard: No space left on device\n"
    assert job.returncode == 2


@pytest.mark.parametrize("recipe", ["faces_small", "no_such_recipe"])
def test_a_full_disk_behind_output_and_errors(recipe):
    with open("/dev/full", "wb") as full:
        assert subprocess.call([sys.executable, "-m", "pipeline.cli", "config", recipe], stdout=full, stderr=full) == 2


def test_names_that_the_terminal_cannot_show(faces, capfd):
    """Of the set, and of an identity, which is named because it has one image."""
    path = faces.rename(os.fsdecode(os.fsencode(faces) + b"\xc4"))
    os.mkdir(path / os.fsdecode(b"\xd5\xc5"))
    next((path / "000001").iterdir()).rename(path / os.fsdecode(b"\xd5\xc5") / "0.jpg")
    assert main(["data", "check", str(path)]) == 0
    output = capfd.readouterr().out
    assert "\\udcc4: 12 images" in output and "\n  \\xd5\\xc5\n" in output


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_of_which_an_import_makes_an_error(monkeypatch, capsys, number):
    """As C extensions do that are being initialised."""

    def resolve(recipe, overrides):
        try:
            os.kill(os.getpid(), number)
        except BaseException as error:
            raise ImportError("generic_type: is already registered") from error

    monkeypatch.setattr("pipeline.resolve.resolve", resolve)
    code, word = ENDS[number]
    before = [signal.getsignal(each) for each in ENDS]
    assert main(["config", "faces_small"]) == code
    assert capsys.readouterr().err == f"protoshard: {word}\n"
    assert [signal.getsignal(each) for each in ENDS] == before


PROGRAM = """
import atexit, os, sys
from pipeline import endings
from pipeline.distributed import join
atexit.register(os.abort)  # as threads of gloo may do while the interpreter ends
def main():
    {join}
    print("done")
    {end}
endings.end_with(main)
"""


@pytest.mark.parametrize(
    ("end", "code", "said"), [("return 0", 0, ""), ("return 75", 75, ""), ("raise RuntimeError('bad luck')", 1, "RuntimeError: bad luck")]
)
def test_the_exit_code_of_a_program_that_was_in_a_process_group(end, code, said):
    program = PROGRAM.format(join="join('cpu')", end=end)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, "done\n") and said in done.stderr
    if not said:
        assert done.stderr == ""


def test_a_program_without_a_process_group_ends_as_any_other():
    program = PROGRAM.format(join="", end="return 0").replace("os.abort", "print, 'at exit'")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\nat exit\n", "")


def test_a_group_of_one_ends_before_the_interpreter_with_all_of_its_threads():
    """Even where DDP was imported, whose imports would keep the group."""
    program = """
        import atexit, glob
        from pipeline.distributed import join
        count = lambda: sum("gloo" in open(name).read() for name in glob.glob("/proc/self/task/*/comm"))
        atexit.register(lambda: print(count()))
        join("cpu")
        import torch
        from torch.nn.parallel import DistributedDataParallel
        DistributedDataParallel(torch.nn.Linear(1, 1))(torch.ones(1, 1)).sum().backward()
        print(count() > 0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n0\n", "")
