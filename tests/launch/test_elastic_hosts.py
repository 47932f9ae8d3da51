"""Elastic ranks on separate hosts, with the real trainer on the dogs set: workers and hosts are lost and come back. `pytest --long -s`
prints how long the run took to go on, and how far losses are from those of an undisturbed run."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the launcher needs Ray")
from pipeline.recipes.data import find_data

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(2400)]
ROOT = Path(__file__).resolve().parents[2]
DATA = {name: Path(find_data(f"dogs/{name}.tar")) for name in ("train", "test")}
if not all(path.exists() for path in DATA.values()):
    pytest.skip("the dogs set is not here", allow_module_level=True)
EPOCHS, BATCH, EVERY = 2, 64, 10
SETTINGS = [f"data.train={DATA['train'].resolve()}", f"evaluation.data={DATA['test'].resolve()}", "data.image_size=32", "data.threads=1"]
SETTINGS += [f"run.batch={BATCH}", "run.log_every=1", "engine.precision=float32", "backbone.width=64"]
SETTINGS += [f"checkpoint.every_steps={EVERY}", "evaluation.at_start=false", "run.timeout=5"]


class Job:
    """multinode.sh on node1, or `launcher`, for these hosts with a rank each."""

    def __init__(self, hosts, folder: Path, *arguments: str, settings: list[str], launcher=None) -> None:
        folder.mkdir(exist_ok=True)
        self.hosts, self.folder, self.log = hosts, folder, folder / f"log-{len(list(folder.glob('log-*')))}.txt"
        (folder / "hosts.txt").write_text("".join(f"{host.name} slots=1\n" for host in hosts))
        command = ["env", "OMP_NUM_THREADS=1", "bash", ROOT / "launch" / "multinode.sh", "dogs_small", "--hosts", "hosts.txt", *arguments]
        command += [word for setting in [*SETTINGS, "run.folder=run", *settings] for word in ("--set", setting)]
        with open(self.log, "w") as log:
            self.process = (launcher or hosts[0]).popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)

    def losses(self) -> dict[int, float]:
        return losses(self.folder / "run")

    def wait_for(self, condition: Callable[[], object], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def wait_for_step(self, step: int, seconds: float = 240) -> None:
        self.wait_for(lambda: max(self.losses(), default=0) >= step, seconds)

    def has_resumed(self) -> bool:
        return "resumed from run/checkpoints/step-" in self.log.read_text()

    def ranks(self) -> int:
        """Of the newest start."""
        found = [line for line in self.log.read_text().splitlines() if "ranks: " in line and " steps " in line]
        return int(found[-1].partition("ranks: ")[2].split()[0]) if found else 0

    def goes_on(self, fault: Callable[[], None], seconds: float = 240) -> float:
        """Seconds from the fault to a step that had not been done before it."""
        step, began = max(self.losses()), time.monotonic()
        fault()
        self.wait_for_step(step + 3, seconds)  # two may have been under way
        return time.monotonic() - began

    def finish(self, seconds: float = 400) -> str:
        code = self.process.wait(seconds)
        assert code == 0, self.log.read_text()
        return self.log.read_text()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(120)


def kill(host, name: str) -> None:
    for pid, words in host.processes().items():
        if name in words:
            os.kill(pid, signal.SIGKILL)


def losses(run: Path) -> dict[int, float]:
    path = run / "metrics.jsonl"
    complete = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []
    return {line["step"]: line["loss"] for line in map(json.loads, complete) if "loss" in line}


def eer(run: Path) -> float:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [value for line in lines for name, value in line.items() if name.endswith("/eer")][-1]


def settings_of(backbone: str, epochs: float = EPOCHS, seed: int = 0) -> list[str]:
    return [f"backbone.name={backbone}", f"run.epochs={epochs}", f"run.seed={seed}"]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """Undisturbed runs on 3 ranks of this machine, by backbone."""
    made: dict[tuple, Path] = {}

    def run(backbone: str, epochs: float = EPOCHS, seed: int = 0, ranks: int = 3) -> Path:
        key = backbone, epochs, seed, ranks
        if key not in made:
            folder = tmp_path_factory.mktemp("quiet")
            settings = [word for setting in [*SETTINGS, *settings_of(backbone, epochs, seed)] for word in ("--set", setting)]
            command = [
                sys.executable,
                "-m",
                "pipeline.cli",
                "train",
                "dogs_small",
                "--ranks",
                f"{ranks}",
                *settings,
                "--set",
                "run.folder=run",
            ]
            env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
            subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True, timeout=900)
            made[key] = folder / "run"
        return made[key]

    return run


def deviation(found: dict[int, float], expected: dict[int, float]) -> float:
    assert found.keys() == expected.keys()
    return max(abs(found[step] / loss - 1) for step, loss in expected.items())


def nothing_left(hosts) -> None:
    deadline = time.monotonic() + 90  # a host that was cut off learns late that the cluster is gone
    while any(host.left() for host in hosts) and time.monotonic() < deadline:
        time.sleep(1)
    assert [host.left() for host in hosts] == [[] for _ in hosts]


@pytest.mark.parametrize("backbone", ["small_nobn", "small"])
def test_three_hosts_train_evaluate_and_resume(hosts, quiet, tmp_path, backbone):
    short = Job(hosts, tmp_path / "job", settings=settings_of(backbone))
    try:
        short.wait_for_step(35)
        (tmp_path / "job" / "run" / "stop").touch()
        assert short.process.wait(240) == 75, short.log.read_text()
        job = Job(hosts, tmp_path / "job", settings=settings_of(backbone))
        try:
            assert "resumed from run/checkpoints/step-" in job.finish()
        finally:
            job.close()
    finally:
        short.close()
    worst = deviation(job.losses(), losses(quiet(backbone)))
    print(f"\n{backbone}: losses of 3 hosts over ssh, stopped once, differ by {worst:.1e}; EER {eer(tmp_path / 'job' / 'run'):.4f}")
    assert worst < 1e-4
    assert eer(tmp_path / "job" / "run") == pytest.approx(eer(quiet(backbone)), abs=1e-3)
    nothing_left(hosts)


def test_a_worker_killed_and_a_host_cut_off(hosts, quiet, tmp_path):
    job = Job(hosts, tmp_path / "job", settings=settings_of("small_nobn"))
    try:
        job.wait_for_step(25)
        killed = job.goes_on(lambda: kill(hosts[1], "RayTrainWorker"))
        print(f"\na worker killed: goes on after {killed:.0f} s")
        job.wait_for_step(55)
        cut = job.goes_on(lambda: (hosts[2].cut(), time.sleep(5), hosts[2].restore()))
        print(f"a host cut off for 5 s: goes on after {cut:.0f} s")
        job.finish()
    finally:
        job.close()
    worst = deviation(job.losses(), losses(quiet("small_nobn")))
    print(f"losses differ by {worst:.1e}")
    assert killed < 30 and worst < 1e-4
    nothing_left(hosts)


def test_the_launcher_is_killed_and_then_the_driver(hosts, quiet, tmp_path):
    """The same command, given again at once, goes on from the newest checkpoint."""
    job = Job(hosts, tmp_path / "job", settings=settings_of("small_nobn"))
    try:
        job.wait_for_step(25)
        for name in ("launcher", "driver"):
            began = time.monotonic()
            job.process.kill() if name == "launcher" else kill(hosts[0], "launch.ray_driver")
            assert job.process.wait(120) != 0
            ended = time.monotonic() - began
            job = Job(hosts, tmp_path / "job", settings=settings_of("small_nobn"))
            job.wait_for(job.has_resumed)  # the old ranks train until the nodes end
            job.wait_for_step(max(job.losses()) + 1)
            print(f"\nthe {name} killed: the command ends after {ended:.0f} s, a new one goes on after {time.monotonic() - began:.0f} s")
        job.finish()
    finally:
        job.close()
    worst = deviation(job.losses(), losses(quiet("small_nobn")))
    print(f"losses differ by {worst:.1e}")
    assert worst < 1e-4
    nothing_left(hosts)


def test_two_drivers_once_the_head_is_cut_off(hosts, quiet, tmp_path):
    """The older one still trains, on the head alone, and sees the run's folder. The younger one waits for it, or is refused; the two never
    write into one run."""
    desk, settings = hosts[0].network.desk, settings_of("small_nobn", 6)
    old = Job(hosts, tmp_path / "job", "--ranks", "1:3", settings=settings, launcher=desk)
    new = None
    try:
        old.wait_for_step(25)
        hosts[0].cut()
        began, refused = time.monotonic(), 0
        while True:
            new = Job(hosts[1:], tmp_path / "job", "--ranks", "2", settings=settings)
            code = new.process.wait(600)
            said = new.log.read_text()
            if code == 0:
                break
            refused += 1
            assert code == 2 and time.monotonic() - began < 300, said
            print(f"\nrefused {time.monotonic() - began:.0f} s after the head was cut off: {said.splitlines()[-2:]}")
        assert old.process.wait(60) == 1, old.log.read_text()
        assert "node1, the head of the Ray cluster, was lost" in old.log.read_text()
    finally:
        old.close()
        if new is not None:
            new.close()
    found, expected = losses(tmp_path / "job" / "run"), losses(quiet("small_nobn", 6))
    last = max(expected)
    print(f"refused {refused} times; last loss {found[last]:.6f}, undisturbed {expected[last]:.6f}")
    assert found.keys() == expected.keys() and found[last] == pytest.approx(expected[last], rel=1e-3)
    hosts[0].restore()
    nothing_left(hosts)


@pytest.mark.parametrize("backbone", ["small_nobn", "small"])
def test_a_host_lost_for_good_and_back_later(hosts, quiet, tmp_path, backbone):
    job = Job(hosts, tmp_path / "job", "--ranks", "2:3", settings=settings_of(backbone, 6))
    try:
        job.wait_for_step(25)
        cut = job.goes_on(hosts[2].cut)
        assert job.ranks() == 2, job.log.read_text()
        job.wait_for_step(max(job.losses()) + 40)
        hosts[2].restore()
        began = time.monotonic()
        job.wait_for(lambda: job.ranks() == 3, 300)
        grown = time.monotonic() - began
        log = job.finish()
    finally:
        job.close()
    found, expected = job.losses(), losses(quiet(backbone, 6))
    last = max(expected)
    print(f"\n{backbone}: a host cut off: goes on with 2 after {cut:.0f} s, with 3 again {grown:.0f} s after it was back")
    print(f"last loss {found[last]:.6f}, undisturbed {expected[last]:.6f}; EER {eer(tmp_path / 'job' / 'run'):.4f}")
    assert cut < 60 and found.keys() == expected.keys() and "is back in the cluster" in log
    if backbone == "small_nobn":
        assert found[last] == pytest.approx(expected[last], rel=1e-3)
    else:
        spread = [eer(quiet(backbone, 6, seed)) for seed in (0, 1, 2)]
        print(f"EER of three seeds: {spread}")
        assert min(spread) - 0.01 <= eer(tmp_path / "job" / "run") <= max(spread)
    nothing_left(hosts)


def test_twenty_faults_at_random_moments(hosts, quiet, tmp_path):
    faults, dice = 20, random.Random(16)
    job = Job(hosts, tmp_path / "job", "--ranks", "2:3", "--max-failures", "9", settings=settings_of("small_nobn", 12))
    try:
        for _ in range(faults):
            job.wait_for_step(max(job.losses(), default=0) + dice.randint(2, 25), 600)
            host = dice.choice(hosts[1:])
            if dice.random() < 0.7:
                kill(host, "RayTrainWorker")
            else:
                host.cut()
                time.sleep(dice.choice([1, 20]))
                host.restore()
        log = job.finish(1200)
    finally:
        job.close()
    found, expected = job.losses(), losses(quiet("small_nobn", 12))
    last = max(expected)
    done = starts = most = 0
    for words in re.finditer(r"after step (\d+) |, steps (\d+) to", log):
        if words[2]:
            starts, most, done = starts + 1, max(most, done - int(words[2])), int(words[2])
        else:
            done = max(done, int(words[1]))
    print(
        f"\n{faults} faults, {starts - 1} restarts: last loss {found[last]:.6f}, undisturbed {expected[last]:.6f}; most steps lost {most}"
    )
    assert most <= 2 * EVERY  # a save may have been under way
    assert found.keys() == expected.keys() and found[last] == pytest.approx(expected[last], rel=1e-3)
    nothing_left(hosts)
