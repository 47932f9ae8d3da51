"""The command line and what it refuses before anything is started; test_ray.py starts things."""

import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from launch import cluster as clusters
from launch import connecting, multinode, variables
from launch.hosts import Host
from launch.ray_driver import computing_nodes, layout
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
        (["stub", "--ranks", "3:2"], "--ranks 3:2: MIN is above MAX; give the smaller number first, 2:3."),
        (["stub", "--ranks-per-node", "0"], "--ranks-per-node is 0; a node needs at least 1 rank."),
        (["stub", "--from", ""], "--from is given an empty path"),
        (["stub", "--max-failures", "-1"], "--max-failures is -1;"),
        (["stub", "--env", "NO_SUCH_VARIABLE"], "--env NO_SUCH_VARIABLE: this shell has no such variable; export it, or give --env"),
        (["stub", "--env", "CUDA_VISIBLE_DEVICES=0"], "--env CUDA_VISIBLE_DEVICES: Ray gives each rank its GPUs;"),
        (["stub", "--env", "=1"], "--env =1 names no variable;"),
        ([], "RECIPE is missing;"),
        (["stub", "--attach", "faces", "--address", "head:6379"], "--attach faces is about a job that runs, so give no RECIPE with it."),
        (["--attach", "faces"], "--attach faces needs a cluster that outlives this command: give --address"),
        (["--stop", "faces"], "--stop faces needs a cluster that outlives this command"),
        (["--stop", "a", "--attach", "b", "--address", "head:6379"], "--attach and --stop exclude each other;"),
        (["--stop", "a", "--detach", "--address", "head:6379"], "--stop a is about a job that runs; leave out --detach."),
        (["stub", "--detach"], "--detach needs a cluster that outlives this command"),
        (["stub", "--name", "faces"], "--name faces needs a cluster that outlives this command"),
        (["stub", "--name", "a b", "--address", "head:6379"], "--name a b is no name of a job;"),
        (["--attach", "a", "--address", "head:6379", "--check"], "--attach a is about a job that runs; leave out --check."),
        (
            ["--stop", "a", "--address", "head:6379", "--dry-run", "--set", "a=1"],
            "--stop a is about a job that runs; leave out --dry-run, --set",
        ),
        (["stub", "--check", "--detach", "--address", "head:6379"], "--check starts no job; leave out --name and --detach."),
        (["stub", "--dashboard-host", "::", "--address", "head:6379"], "--dashboard-host is about a cluster that is started here;"),
        (["stub", "--remote-dir", "/nowhere"], "Host localhost cannot be used (/nowhere/"),
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


@pytest.mark.parametrize("where", [["--ranks-per-node", "300"], ["--ranks", "300"], ["--ranks", "2:300", "--address", "head:6379"]])
def test_ranks_that_would_get_no_image_are_refused_before_anything_starts(where, capsys):
    assert multinode.main(["faces_small", *where, "--dry-run"]) == 2
    assert "multinode.sh: run.batch is 128: its 128 images cannot give each of 300 ranks at least 1" in capsys.readouterr().err


def test_without_ssh(tmp_path, monkeypatch, capsys):
    (tmp_path / "hosts.txt").write_text("host.invalid\n")
    monkeypatch.setattr(clusters, "SSH", ["no-such-ssh"])
    assert multinode.main(["faces_small", "--hosts", str(tmp_path / "hosts.txt")]) == 2
    sentence = "Host host.invalid cannot be used (no-such-ssh: No such file or directory); install ssh on this machine"
    assert sentence in capsys.readouterr().err


def test_a_node_of_this_machine_does_not_know_how_its_user_came(monkeypatch):
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 1 10.0.0.2 22")
    here = clusters.Node(Host("localhost", "localhost", None, True), str(ROOT), sys.executable)
    try:
        assert here.expect("hello", time.monotonic() + 60)["address"] == "127.0.0.1"
    finally:
        here.close()
        here.wait(time.monotonic() + 30)


def test_a_proxy_of_the_shell_is_not_asked_for_the_cluster(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.com")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert requests.utils.should_bypass_proxies("http://127.0.0.1:8265", None) is False
    connecting.without_proxy("127.0.0.1")
    assert requests.utils.should_bypass_proxies("http://127.0.0.1:8265", None)


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


def passed_on(*arguments):
    return variables.passed_on(multinode.parser().parse_args(["stub", *arguments]))


@pytest.mark.parametrize(
    "name",
    [
        *("NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "FI_PROVIDER", "FI_EFA_USE_DEVICE_RDMA", "OFI_NCCL_PROTOCOL", "RDMAV_FORK_SAFE"),
        *(
            "UCX_NET_DEVICES",
            "OMPI_MCA_btl_tcp_if_include",
            "PYTORCH_ALLOC_CONF",
            "PYTORCH_CUDA_ALLOC_CONF",
            "TORCH_NCCL_TRACE_BUFFER_SIZE",
        ),
        *("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG"),
        *("NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "OMP_PROC_BIND", "MKL_NUM_THREADS", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"),
        *("PROTOSHARD_DATA", "PYTHONUNBUFFERED", "DS_SKIP_CUDA_CHECK"),
    ],
)
def test_variables_that_ranks_inherit(monkeypatch, name):
    monkeypatch.setenv(name, "9")
    assert passed_on()[name] == "9" and passed_on("--address", "head:6379")[name] == "9"


@pytest.mark.parametrize(
    "name",
    [
        "CUDA_VISIBLE_DEVICES",  # of this machine: all ranks of all hosts would share its list
        "OMPI_COMM_WORLD_RANK",  # of this process, if mpirun started it
        *("SOME_PASSWORD", "HOME", "NVIDIA_VISIBLE_DEVICES", "RANK", "RAY_ADDRESS"),
    ],
)
def test_variables_that_stay_here(monkeypatch, name):
    monkeypatch.setenv(name, "9")
    assert name not in passed_on()


@pytest.mark.parametrize("name", ["LD_LIBRARY_PATH", "CC", "CXX"])
def test_paths_of_this_machine_travel_to_its_like_only(monkeypatch, name):
    monkeypatch.setenv(name, "/opt/x")
    assert passed_on("--hosts", "hosts.txt")[name] == passed_on()[name] == "/opt/x"
    assert name not in passed_on("--address", "head:6379")
    assert passed_on("--address", "head:6379", "--env", name)[name] == "/opt/x"


def test_variables_by_name(monkeypatch):
    monkeypatch.setenv("SITE_TOKEN", "a=b")
    passed = passed_on("--env", "SITE_TOKEN", "OTHER=c=d", "--env", "NCCL_DEBUG=", "PYTHONPATH=/mine")
    assert (passed["SITE_TOKEN"], passed["OTHER"], passed["NCCL_DEBUG"]) == ("a=b", "c=d", "")
    assert passed["PYTHONPATH"] == f"/mine{os.pathsep}{ROOT}"


def test_the_docs_list_the_variables():
    page = (ROOT / "docs" / "clusters.md").read_text()
    assert [name for name in (*variables.PASSED_ON, *variables.SAME_MACHINES, *variables.OF_THIS_MACHINE) if f"`{name}`" not in page] == []


def test_layout_of_ranks():
    assert layout([{"CPU": 4}], None) == (2, {"CPU": 2.0})
    assert layout([{"CPU": 4}, {"CPU": 8}], 1) == (2, {"CPU": 4.0})
    assert layout([{"CPU": 4}], 3) == (3, {"CPU": 1.3333})  # three fit on the node, a fourth does not
    assert layout([{"CPU": 64, "GPU": 8}, {"CPU": 64, "GPU": 8}], None) == (16, {"CPU": 8.0, "GPU": 1})
    assert layout([{"CPU": 8, "rank_slots": 4}, {"CPU": 8, "rank_slots": 1}], None) == (5, {"CPU": 2.0, "rank_slots": 1})
    with pytest.raises(BadInputError, match="4 ranks per node need 4 GPUs, but a node has 2"):
        layout([{"CPU": 8, "GPU": 2}], 4)


def node(name, **resources):
    return {"NodeManagerHostname": name, "Resources": resources}


def test_nodes_that_take_part(capsys):
    a, b, c = node("a", CPU=64, GPU=8), node("b", CPU=64, GPU=8), node("c", CPU=16)
    for device in ("auto", "cuda"):
        assert computing_nodes([a, b, c, node("idle", memory=1)], device) == [{"CPU": 64, "GPU": 8}, {"CPU": 64, "GPU": 8}]
        assert capsys.readouterr().out == "without a GPU, so without a rank: c\n"
        assert computing_nodes([a], device) == [{"CPU": 64, "GPU": 8}]
    assert computing_nodes([a, c], "cpu") == [{"CPU": 64}, {"CPU": 16}]  # no rank reserves a GPU that it will not use
    assert computing_nodes([c], "auto") == [{"CPU": 16}]
    assert capsys.readouterr().out == ""


def test_nodes_that_cannot_do():
    with pytest.raises(
        BadInputError, match=r"engine.device is cuda, but Ray sees no GPU on a, b; look at nvidia-smi .* --set engine.device=cpu"
    ):
        computing_nodes([node("b", CPU=8), node("a", CPU=8)], "cuda")
    with pytest.raises(BadInputError, match="Ray sees GPUs on some hosts, but none on b; look at nvidia-smi there"):
        computing_nodes([node("a", CPU=8, GPU=2, rank_slots=2), node("b", CPU=8, rank_slots=2)], "auto")
    with pytest.raises(BadInputError, match="no node with processors"):
        computing_nodes([node("a", memory=1)], "auto")


@pytest.mark.skipif(subprocess.run(["which", "shellcheck"], capture_output=True).returncode != 0, reason="shellcheck is not installed")
def test_shellcheck():
    assert subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True).stdout == ""
