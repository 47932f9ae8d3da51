"""launch/rayjob.yaml against the schemas of Kubernetes and the fields of KubeRay, launch/Dockerfile against what it copies and installs. No
cluster and no builder of images runs here."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import threading
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from launch import ray_driver, variables
from pipeline.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]

# Fields of KubeRay's ray.io/v1 that may be used, of its types RayJobSpec, RayClusterSpec, HeadGroupSpec and WorkerGroupSpec.
JOB = {
    "entrypoint", "submissionMode", "backoffLimit", "activeDeadlineSeconds", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
    "runtimeEnvYAML", "jobId", "metadata", "suspend", "submitterPodTemplate", "submitterConfig", "clusterSelector", "entrypointNumCpus",
    "entrypointNumGpus", "entrypointResources", "managedBy", "deletionStrategy", "rayClusterSpec",
}  # fmt: skip
CLUSTER = {
    "rayVersion", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "autoscalerOptions", "headServiceAnnotations", "suspend",
    "authOptions", "managedBy", "gcsFaultToleranceOptions",
}  # fmt: skip
HEAD = {"serviceType", "headService", "enableIngress", "rayStartParams", "template", "resources", "labels"}
WORKERS = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template", "scaleStrategy",
    "idleTimeoutSeconds", "suspend", "resources", "labels",
}  # fmt: skip


@pytest.fixture(scope="module")
def job():
    return yaml.safe_load((ROOT / "launch/rayjob.yaml").read_text())


@pytest.fixture(scope="module")
def groups(job):
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_fields_are_those_of_kuberay(job, groups):
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and set(job) == {"apiVersion", "kind", "metadata", "spec"}
    spec = job["spec"]
    cluster, (head, *workers) = spec["rayClusterSpec"], groups
    assert set(spec) <= JOB and set(cluster) <= CLUSTER and set(head) <= HEAD and workers
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    assert spec["shutdownAfterJobFinishes"] is True and isinstance(spec["backoffLimit"], int)  # a time to live needs the former
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    for group in workers:
        assert set(group) <= WORKERS and {"groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"} <= set(group)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert all(isinstance(value, str) for group in groups for value in group["rayStartParams"].values())


def test_pods_are_those_of_kubernetes(groups):
    for group in groups:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "protoshard"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):  # so that the check is known to be one
            kubernetes_validate.validate(pod | {"spec": pod["spec"] | {"contaners": []}}, kubernetes_validate.latest_version(), strict=True)


def test_pods_run_with_little_power_and_share_what_they_must(job, groups):
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for group in groups:
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
        assert spec["automountServiceAccountToken"] is False
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert set(mounts.values()) == set(volumes)
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert "persistentVolumeClaim" in volumes[mounts["/shared"]]
        names = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert names["GLOO_SOCKET_IFNAME"] and names["NCCL_SOCKET_IFNAME"] and not any("TOKEN" in name for name in names)


def test_the_entrypoint_is_a_job_of_this_project(job, groups):
    python, option, module, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (python, option, module) == ("python", "-m", "launch.ray_driver")
    options = ray_driver.parser().parse_args(arguments)
    run = resolve(options.recipe, options.overrides).run
    container = groups[1]["template"]["spec"]["containers"][0]
    folder = next(variable["value"] for variable in container["env"] if variable["name"] == "RUN_FOLDER")
    assert run.folder == folder and folder.startswith(f"{options.folder}/")
    ranks = groups[1]["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert run.batch % (ranks * run.accumulation) == 0


def test_the_job_has_the_variables_of_others(job):
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == {"env_vars": variables.DEFAULTS}


def test_a_pod_that_is_taken_back_asks_the_run_to_save(groups, tmp_path):
    spec = groups[1]["template"]["spec"]
    command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    limit = int(re.search(r"-lt (\d+)", command[-1])[1])
    assert limit + 30 <= spec["terminationGracePeriodSeconds"]
    environment = {"RUN_FOLDER": str(tmp_path), "HOSTNAME": "pod-1", "PATH": "/usr/bin:/bin"}
    subprocess.run(command, env=environment, timeout=20, check=True)
    assert not (tmp_path / "stop").exists()  # no run is going on: at the end of a job pods go too
    (tmp_path / "ranks").mkdir()
    asking = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "stop").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert asking.poll() is None  # the pod stays until the run has obeyed
        threading.Timer(0.1, (tmp_path / "stop").unlink).start()
        assert asking.wait(20) == 0
    finally:
        asking.kill()


KNOWN = {"FROM", "RUN", "COPY", "WORKDIR", "ENV", "USER", "CMD", "LABEL", "ARG", "ENTRYPOINT"}


def instructions(text):
    """(name, arguments) of a Dockerfile: comments and continued lines as its builder reads them."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [
        (name.upper(), rest.strip())
        for name, _, rest in (line.partition(" ") for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).split("\n"))
    ]


def test_the_dockerfile():
    found = instructions((ROOT / "launch/Dockerfile").read_text())
    assert found[0][0] == "FROM" and {name for name, _ in found} <= KNOWN
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", found[0][1]), "a tag that does not move to another Python or Debian"
    users = [value for name, value in found if name == "USER"]
    assert users[-1] == "1000:1000", "as rayjob.yaml runs it"
    for name, value in found:
        if name == "RUN":
            assert subprocess.run(["bash", "-n", "-c", value], capture_output=True).returncode == 0, value
            if shutil.which("shellcheck"):
                subprocess.run(["shellcheck", "-s", "sh", "-"], input=value, text=True, check=True)
            if "apt-get install" in value:
                assert "apt-get update" in value and "--no-install-recommends" in value and "rm -rf /var/lib/apt/lists" in value
            if "install_into_venv" in value:
                extras = re.search(r"install_into_venv ([\w ]+)", value)[1].split()
                assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
        if name == "COPY" and value != ". .":
            *sources, _ = value.split()
            assert all((ROOT / source).exists() for source in sources), value
        if name in ("CMD", "ENTRYPOINT"):
            assert isinstance(json.loads(value), list), "else a shell stands between signals and the program"


def test_the_image_holds_what_the_job_needs_and_nothing_of_this_machine():
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    def is_left_out(path):
        parts = [path, *(str(parent) for parent in Path(path).parents)]
        return any(
            fnmatch.fnmatch(part, pattern.removeprefix("**/")) or fnmatch.fnmatch(part, pattern) for part in parts for pattern in patterns
        )

    for needed in (
        "launch/ray_driver.py",
        "launch/environment.sh",
        "pipeline/cli.py",
        "partial_fc/__init__.py",
        "pyproject.toml",
        "README.md",
    ):
        assert (ROOT / needed).exists() and not is_left_out(needed), needed
    for path in (".git/config", ".venv/bin/python", "runs/a/metrics.jsonl", "data/x.tar", "pipeline/__pycache__/cli.pyc"):
        assert is_left_out(path), path
