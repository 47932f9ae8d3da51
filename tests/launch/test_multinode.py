"""The command line and what it refuses before anything is started; test_ray.py starts things."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch import multinode
from launch.ray_driver import layout
from launch.ray_driver import parser as driver_parser
from launch.ray_worker import BadInputError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "multinode.sh"
STUB = ROOT / "tests" / "launch" / "stub"


def run_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(STUB)}
    return subprocess.run(["bash", str(SCRIPT), *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["stab"], "There is no recipe 'stab'; did you mean 'stub'?"),
        (["stub", "--ranks-per-node", "0"], "--ranks-per-node is 0; a node needs at least 1 rank."),
        (["stub", "--max-failures", "-1"], "--max-failures is -1;"),
        (["stub", "--hosts", "none.txt"], "Hosts file none.txt cannot be read"),
        (["stub", "--address", "here"], "--address here is not the address of a Ray cluster"),
        (["stub", "--address", f"127.0.0.1:{free_port()}"], "No Ray cluster answers at 127.0.0.1:"),
        (["stub", "--address", f"http://127.0.0.1:{free_port()}"], "No Ray cluster answers at http://127.0.0.1:"),
        (["stub", "--address", "http://host.invalid:8265"], "No Ray cluster answers at http://host.invalid:8265"),
    ],
)
def test_bad_input_ends_in_one_sentence(tmp_path, arguments, sentence):
    done = run_script(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("multinode.sh: " + sentence) and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_unreachable_host_is_named_and_nothing_stays(tmp_path):
    (tmp_path / "hosts.txt").write_text("host.invalid\nlocalhost\n")
    done = run_script(tmp_path, "stub", "--hosts", "hosts.txt")
    assert done.returncode == 2
    assert done.stderr.startswith("multinode.sh: Host host.invalid cannot be used") and "ssh -o BatchMode=yes host.invalid" in done.stderr


def test_ranks_per_node_and_slots_exclude_each_other(tmp_path):
    (tmp_path / "hosts.txt").write_text("localhost slots=2\n")
    done = run_script(tmp_path, "stub", "--hosts", "hosts.txt", "--ranks-per-node", "2")
    assert (done.returncode, "leave out --ranks-per-node" in done.stderr) == (2, True)


def test_help_has_an_example(tmp_path):
    done = run_script(tmp_path, "--help")
    assert done.returncode == 0 and "launch/multinode.sh glint360k" in done.stdout


@pytest.mark.parametrize("value", ["data.train=my faces.tar", "loss.x=[1, 2]", "a.b='q' \"r\" $HOME `id` ; #", "a.b=", "a.b=--c\nd"])
def test_overrides_reach_the_job_as_they_are(value):
    options = multinode.parser().parse_args(["stub", "--set", value, "run.note=second", "--set", "third=3"])
    words = shlex.split(multinode.entrypoint(options))
    assert words[:3] == [sys.executable, "-m", "launch.ray_driver"]
    assert driver_parser().parse_args(words[3:]).overrides == [value, "run.note=second", "third=3"]


def test_the_interpreter_is_looked_for_in_the_remote_checkout(monkeypatch):
    monkeypatch.setattr(sys, "executable", str(ROOT / ".venv/bin/python"))
    options = multinode.parser().parse_args(["stub", "--remote-dir", "/srv/protoshard"])
    assert shlex.split(multinode.entrypoint(options))[0] == "/srv/protoshard/.venv/bin/python"
    assert "--folder=/srv/protoshard" in shlex.split(multinode.entrypoint(options))


def test_variables_that_ranks_inherit(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "9")
    monkeypatch.setenv("SOME_PASSWORD", "x")
    passed = multinode.passed_on(multinode.parser().parse_args(["stub"]))
    assert passed["NCCL_DEBUG"] == "INFO" and passed["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "9" and "SOME_PASSWORD" not in passed


def test_layout_of_ranks():
    assert layout([{"CPU": 4}], None) == (2, {"CPU": 2.0})
    assert layout([{"CPU": 4}, {"CPU": 8}], 1) == (2, {"CPU": 4.0})
    assert layout([{"CPU": 4}], 3) == (3, {"CPU": 1.3333})  # three fit on the node, a fourth does not
    assert layout([{"CPU": 64, "GPU": 8}, {"CPU": 64, "GPU": 8}, {"CPU": 16}], None) == (16, {"CPU": 8.0, "GPU": 1})
    assert layout([{"CPU": 8, "rank_slots": 4}, {"CPU": 8, "rank_slots": 1}], None) == (5, {"CPU": 2.0, "rank_slots": 1})


def test_layouts_that_cannot_be():
    with pytest.raises(BadInputError, match="4 ranks per node need 4 GPUs, but a node has 2"):
        layout([{"CPU": 8, "GPU": 2}], 4)
    with pytest.raises(BadInputError, match="no node with processors"):
        layout([{"memory": 1}], None)


@pytest.mark.skipif(subprocess.run(["which", "shellcheck"], capture_output=True).returncode != 0, reason="shellcheck is not installed")
def test_shellcheck():
    assert subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True).stdout == ""
