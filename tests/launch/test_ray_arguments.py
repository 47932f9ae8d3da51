"""What is handed to Ray and torchrun, against the installed signatures and command lines; no cluster is started."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.runtime_env import RuntimeEnv
from ray.scripts.scripts import cli
from ray.train.torch import TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.nccl_ras import NCCLRASCallback
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import ExecutionGroup
from torch.distributed.run import get_args_parser

from launch import job, multinode, ray_driver, ray_node, variables
from launch.following import Client
from launch.options import check_jobs
from launch.ray_worker import Backend, BadInputError, OnFailure, ProcessGroup, why_no_gpu
from pipeline.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]


def node(name, **resources):
    return {"NodeID": name, "NodeManagerHostname": name, "Alive": True, "Resources": resources}


def bind(function, *arguments, **named):
    """TypeError unless `function` has these parameters by name; what its **kwargs would swallow does not count."""
    inspect.signature(function).bind(*arguments, **named)
    unknown = named.keys() - inspect.signature(function).parameters.keys()
    assert not unknown, f"{function.__name__} has no {unknown}"


@pytest.fixture
def trainer(monkeypatch, tmp_path):
    """A function from the nodes of a cluster and overrides to the trainer that the driver makes, with the real classes of Ray Train."""

    monkeypatch.setenv(job.OF_JOB, "job-1")
    monkeypatch.chdir(tmp_path)

    def make(nodes, *overrides, own_cluster=False):
        made = []

        def fit(self):
            made.append(self)
            return SimpleNamespace(return_value={"eer": 0.1})

        monkeypatch.setattr(ray_driver, "ray", SimpleNamespace(init=lambda **named: bind(ray.init, **named), nodes=lambda: nodes))
        monkeypatch.setattr(ray_driver.ElasticTrainer, "fit", fit)
        arguments = ["faces_small", f"--folder={tmp_path}", *(f"--set={override}" for override in overrides)]
        arguments += ["--own-cluster"] * own_cluster
        with ExitStack() as kept:
            assert ray_driver.fit(ray_driver.parser().parse_args(arguments), kept) == {"eer": 0.1}
        return made[0]

    return make


@pytest.mark.parametrize("own", [True, False])
def test_actors_that_would_do_nothing_are_not_started(trainer, own):
    made = trainer([node("a", CPU=2.0)], own_cluster=own)
    usual = {type(callback).__name__ for callback in TorchTrainer._create_default_callbacks(made)}
    ours = {type(callback).__name__ for callback in made._create_default_callbacks()}
    assert usual - ours == {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if own else set())


@pytest.mark.parametrize("options", [[], ["--address", "head:6379"]])
def test_the_driver_knows_whether_the_cluster_is_its_own(options):
    words = shlex.split(multinode.entrypoint(multinode.parser().parse_args(["stub", *options])))
    assert ray_driver.parser().parse_args(words[3:]).own_cluster is (not options)


def test_trainer_on_gpus(trainer):
    nodes = [node("a", CPU=64.0, GPU=8.0), node("b", CPU=64.0, GPU=8.0)]
    made = trainer(nodes, "engine.device=cuda", "run.timeout=5")
    assert (made.scaling_config.num_workers, made.scaling_config.use_gpu) == (16, True)
    assert made.scaling_config.resources_per_worker == {"CPU": 8.0, "GPU": 1}
    assert (made.backend_config.backend, made.backend_config.timeout_s) == ("nccl", 300)
    decided = made.run_config.failure_config  # not by Ray
    assert {decided.max_failures, decided.controller_failure_limit, decided.max_preemption_failures} == {-1}
    (callback,) = made.run_config.callbacks
    assert (callback.outages.allowed, callback.starts) == (3, 10)
    assert isinstance(next(kind for kind in made._create_default_callbacks() if isinstance(kind, NCCLRASCallback)), NCCLRASCallback)
    assert NCCLRASCallback()._action == "fail" and NCCLRASCallback()._confirm_duration_s == 300


def test_trainer_without_gpus(trainer):
    made = trainer([node("a", CPU=4.0)])
    assert (made.scaling_config.num_workers, made.scaling_config.use_gpu, made.backend_config.backend) == (2, False, "gloo")
    made = trainer([node("a", CPU=4.0, GPU=1.0)], "engine.device=cpu")
    assert (made.scaling_config.num_workers, made.scaling_config.use_gpu, made.backend_config.backend) == (2, False, "gloo")


@pytest.mark.parametrize("head", [None, "10.0.0.1:6379"])
@pytest.mark.parametrize("slots", [None, 8])
def test_ray_start_knows_its_options(head, slots, tmp_path):
    order = {"address": "127.0.0.1", "alone": False, "token": "t", "head": head, "slots": slots}
    command = ray_node.start_command(order, str(tmp_path))
    assert command[1:4] == ["-m", "ray.scripts.scripts", "start"]
    parsed = cli.commands["start"].make_context("start", command[4:]).params
    assert parsed["head"] is (head is None) and parsed["address"] == head and parsed["temp_dir"] == str(tmp_path / "r")


@pytest.mark.parametrize("alone", [True, False])
def test_a_cluster_of_this_machine_alone_keeps_to_loopback(alone, tmp_path):
    order = {"address": "127.0.0.1", "alone": alone, "token": "t", "head": None, "slots": None}
    env = ray_node.environment(order, str(tmp_path))
    assert env["RAY_worker_niceness"] == "0"
    assert env["RAY_AUTH_TOKEN"] == "t" and env.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") == ("0" if alone else None)
    assert env.get(ray_node.MEETING_FOLDER) == (str(tmp_path) if alone else None)
    assert not any(word.partition("=")[2] == "t" for word in ray_node.start_command(order, str(tmp_path)))


def test_what_ray_stores_is_among_the_logs_of_the_job(trainer, tmp_path):
    """Where only the run's folder need be written, and where it is removed some day after a driver that was killed."""
    made = trainer([node("a", CPU=4.0)], "run.folder=run")
    stored = Path(made.run_config.storage_path)
    assert stored.parent == tmp_path / "run" / "logs" / "job-1" and not stored.exists()  # at the end of the job
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    kept = ray_driver.storage_folder("run", str(stored.parent))
    assert os.stat(kept).st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(BadInputError, match=r"run.folder=file/run cannot be written \([A-Z]"):
        ray_driver.storage_folder("file/run", str(tmp_path / "file" / "run" / "logs" / "job"))


def test_a_job_of_another_launcher_has_logs_too(trainer, monkeypatch, tmp_path):
    """It names itself, and tells its workers, which take their logs along when --resume none renames the run's folder."""
    made = trainer([node("a", CPU=4.0)], "run.folder=run")
    assert made.backend_config.logs == str(tmp_path / "run" / "logs" / "job-1")
    monkeypatch.delenv(job.OF_JOB)
    told = []
    monkeypatch.setattr(ray_driver, "join", told.append)
    made = trainer([node("a", CPU=4.0)], "run.folder=run")
    assert told == [{job.OF_JOB: Path(made.backend_config.logs).name}] and re.fullmatch(r"protoshard-[0-9a-f]{8}", told[0][job.OF_JOB])
    assert made.run_config.callbacks[0].logs == made.backend_config.logs and (Path(made.backend_config.logs) / "driver.log").exists()


def test_no_logs_are_written_into_a_folder_that_is_no_run(trainer, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "image.jpg").write_bytes(b"\0")
    (tmp_path / "data" / "stop").touch()
    with pytest.raises(BadInputError, match=r"run.folder=data holds no run, but other things \(image.jpg\)"):
        trainer([node("a", CPU=4.0)], "run.folder=data")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["image.jpg", "stop"]


def test_a_larger_node_does_not_take_all_ranks(trainer):
    equal = [node(name, CPU=64.0, GPU=8.0) for name in "ab"]
    assert trainer(equal, "engine.device=cuda").scaling_config.placement_strategy == "PACK"
    larger = [node("a", CPU=128.0), node("b", CPU=64.0)]
    assert trainer(larger, "engine.device=cpu").scaling_config.placement_strategy == "SPREAD"
    slots = [node("a", CPU=128.0, rank_slots=2.0), node("b", CPU=64.0, rank_slots=2.0)]
    assert trainer(slots, "engine.device=cpu").scaling_config.placement_strategy == "PACK"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no PYTHONSAFEPATH")
def test_the_launcher_runs_its_own_checkout(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").write_text("raise SystemExit('of another checkout')\n")
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "multinode.sh"), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "RECIPE" in done.stdout.upper(), done.stderr


def test_job_client_has_what_is_called(capsys):
    client = create_autospec(Client, instance=True)  # its methods refuse other arguments than the real ones

    async def log(job_id):
        yield "step 1\n"

    client.tail_job_logs.side_effect = log
    client.get_job_logs.return_value = "step 1\nstep 2\n"
    client.get_job_info.return_value = SimpleNamespace(status=JobStatus.SUCCEEDED)
    client.get_job_status.return_value = JobStatus.STOPPED
    env_vars = variables.passed_on(multinode.parser().parse_args(["stub"]))
    ending = job.Ending("run", "stop", 1.0)
    assert job.run(client, job.Task("protoshard-1", "true", env_vars, ending), check=lambda: None) == 0
    job.stop(client, "protoshard-1")
    assert capsys.readouterr().out == "step 1\nstep 2\n"
    bind(JobSubmissionClient, "http://127.0.0.1:8265")
    RuntimeEnv(**client.submit_job.call_args.kwargs["runtime_env"])
    assert client.submit_job.call_args.kwargs.keys() <= inspect.signature(JobSubmissionClient.submit_job).parameters.keys()
    assert job.ask(client, "protoshard-1", ending) == "stop cannot be written on the cluster"  # a stopped job has not asked
    requests = inspect.signature(JobSubmissionClient._do_request).parameters
    assert [name for name in inspect.signature(Client._do_request).parameters if name != "options"] == list(requests)[:3]


def test_overridden_methods_have_the_parameters_of_ray():
    pairs = [(Backend.on_start, _TorchBackend.on_start)]
    for kind, names in (
        (WorkerGroupCallback, ("after_worker_group_poll_status", "after_worker_group_training_start")),
        (ControllerCallback, ("before_controller_execute_failure_decision",)),
    ):
        pairs += [(getattr(OnFailure, name), getattr(kind, name)) for name in names]
    for ours, theirs in pairs:
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    bind(ExecutionGroup.execute, None, why_no_gpu)
    assert ProcessGroup(timeout_s=60).backend_cls is Backend


def test_names_of_variables_exist_in_ray():
    folders = [Path(ray.__file__).parent / name for name in ("_private", "_common", "train/v2/_internal")]
    text = "".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    names = {name for name in variables.passed_on(multinode.parser().parse_args(["stub"])) if name.startswith("RAY_")}
    names |= {
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_ADDRESS",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
        "RAY_USAGE_STATS_ENABLED",
    }
    assert {name for name in names if not re.search(rf"\b{name}\b", text)} == set()


class Group:
    """Workers on one GPU each, of which the last one's torch sees none."""

    def execute(self, function, *arguments):
        assert function is why_no_gpu
        return [None, why_no_gpu()]


def test_gpus_that_torch_cannot_use_end_in_a_sentence(monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(BadInputError, match=r"Ray has a GPU for a rank on .*, but torch .* is built without CUDA"):
        Backend()._join(Group(), ProcessGroup(backend="nccl"))
    monkeypatch.setattr("pipeline.distributed.gpu_fault", lambda ranks: None)
    assert why_no_gpu() is None


def commands(page: str, program: str) -> list[list[str]]:
    """The words after `program` in commands of a page, with lines that go on joined."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = re.findall(rf"^\s*(?:[A-Z_]+=\S+ |srun )*{re.escape(program)} +(\S[^#\n]*)", text, re.MULTILINE)
    found = [shlex.split(line) for line in lines if "[--" not in line]
    assert found, (page, program)
    return found


def test_the_weights_of_a_new_run_reach_the_job():
    options = multinode.parser().parse_args(["stub", "--set", "a=1", "--from", "my run", "--set", "b=2"])
    words = shlex.split(multinode.entrypoint(options))[3:]
    assert ray_driver.parser().parse_args(words).overrides == ["a=1", "start.weights=my run", "b=2"]


@pytest.mark.parametrize("page", ["README.md", "docs/clusters.md", "docs/fine_tuning.md"])
def test_launcher_commands_of_the_docs(page):
    for words in commands(page, "launch/multinode.sh"):
        options = multinode.parser().parse_args(words)
        check_jobs(options)
        if options.recipe not in (None, "RECIPE"):
            resolve(options.recipe, options.overrides)


def test_torchrun_commands_of_the_docs():
    for words in commands("docs/clusters.md", ".venv/bin/torchrun"):
        parsed = get_args_parser().parse_args(words)
        assert parsed.module and parsed.training_script == "pipeline.cli" and parsed.training_script_args[0] == "train"
        recipe, *rest = parsed.training_script_args[1:]
        resolve(recipe, rest[1:])


def test_ray_commands_of_the_docs():
    text = (ROOT / "docs" / "clusters.md").read_text()
    found = re.findall(r"`\.venv/bin/ray\s+start\s+([^`]+)`", text)
    assert len(found) == 2
    for line in found:
        cli.commands["start"].make_context("start", shlex.split(line))
