"""Stands in for Slurm: sbatch, srun and scontrol on this machine, with every task of every node here. `sbatch` reads the directives as
Slurm does, runs the script from a copy elsewhere, and again when it asks for it; `install` puts the three programs into a folder.

In $SLURM_STUB: tell (the test writes what Slurm would do when srun has started: a signal to the batch shell), calls (what was called)."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COUNT, TIME = r"[1-9]\d*", r"(\d+-)?\d+(:\d\d){0,2}"
# Options of sbatch that this project uses, or tells to use: their short name, and what Slurm takes as their value (None: none).
OPTIONS: dict[str, tuple[str | None, str | None]] = {
    "job-name": ("J", r"[\w.-]+"),
    "nodes": ("N", rf"{COUNT}(-{COUNT})?"),
    "ntasks": ("n", COUNT),
    "ntasks-per-node": (None, COUNT),
    "gpus-per-node": (None, rf"([\w.]+:)?{COUNT}"),
    "cpus-per-task": ("c", COUNT),
    "mem": (None, r"\d+[KMGT]?"),
    "time": ("t", TIME),
    "signal": (None, r"([RB]+:)?(\w+)(@\d{1,5})?"),
    "requeue": (None, None),
    "no-requeue": (None, None),
    "open-mode": (None, r"append|truncate"),
    "output": ("o", r"\S+"),
    "error": ("e", r"\S+"),
    "partition": ("p", r"[\w,.-]+"),
    "account": ("A", r"[\w.-]+"),
    "exclusive": (None, None),
}
SHORT = {short: name for name, (short, _) in OPTIONS.items() if short}


def parse(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """(options, what stands behind them). ValueError, in sbatch's words."""
    found, rest = {}, list(words)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        name = name if word.startswith("--") else SHORT.get(name, name)
        if name not in OPTIONS:
            raise ValueError(f"sbatch: unrecognized option '{word}'")
        form = OPTIONS[name][1]
        if form is None:
            if equals:
                raise ValueError(f"sbatch: option '--{name}' doesn't allow an argument")
        else:
            if not equals:
                value = rest.pop(0) if rest else ""
            if not re.fullmatch(form, value):
                raise ValueError(f"sbatch: invalid --{name} specification {value!r}")
            if name == "signal" and not hasattr(signal, f"SIG{re.fullmatch(form, value)[2]}"):  # type: ignore[index]
                raise ValueError(f"sbatch: Invalid --signal specification {value!r}")
        found[name] = value
    return found, rest


def directives(script: str) -> dict[str, str]:
    """Of a script: of its lines before the first command, as Slurm reads them."""
    lines = Path(script).read_text().splitlines()
    if not lines[0].startswith("#!"):
        raise ValueError("sbatch: error: This does not look like a batch script. The first line must start with #! ...")
    found: dict[str, str] = {}
    for line in lines[1:]:
        if line.startswith("#SBATCH"):
            options, rest = parse(shlex.split(line.removeprefix("#SBATCH"), comments=True))
            if rest:
                raise ValueError(f"sbatch: {rest} in {line!r} is no option")
            found |= options
        elif line.strip() and not line.startswith("#"):
            break
    return found


def note(*call: str) -> None:
    with open(Path(os.environ["SLURM_STUB"], "calls"), "a") as file:
        file.write(json.dumps(call) + "\n")


def sbatch(arguments: list[str]) -> int:
    """Runs the job to its end, with every requeue, and returns the exit code of its last start."""
    given, (script, *rest) = parse(arguments)
    options = directives(script) | given
    stub, job = Path(os.environ["SLURM_STUB"]), "4711"
    nodes, tasks = int(options.get("nodes", "1")), int(options.get("ntasks-per-node", "1"))
    spool = Path(tempfile.mkdtemp(dir=stub))
    batch = shutil.copy(script, spool / "slurm_script")
    environment = os.environ | {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "node1" if nodes == 1 else f"node[1-{nodes}]",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_NTASKS": str(nodes * tasks),
        "SLURM_TASKS_PER_NODE": str(tasks) if nodes == 1 else f"{tasks}(x{nodes})",
        "SLURM_SUBMIT_DIR": os.getcwd(),
        "SLURM_STUB_SIGNAL": options["signal"],
    }
    if "gpus-per-node" in options:
        environment["SLURM_GPUS_ON_NODE"] = options["gpus-per-node"]
    if "cpus-per-task" in options:
        environment["SLURM_CPUS_PER_TASK"] = options["cpus-per-task"]
    log = options["output"].replace("%j", job)
    (stub / "requeued").unlink(missing_ok=True)
    for restart in range(12):
        environment["SLURM_RESTART_COUNT"] = str(restart)
        with open(log, "a" if options.get("open-mode") == "append" else "w") as output:
            shell = subprocess.Popen(["bash", str(batch), *rest], env=environment, stdout=output, stderr=subprocess.STDOUT)
            while shell.poll() is None:
                tell = stub / "tell"
                if tell.exists():
                    tell.unlink()
                    shell.send_signal(signal.SIGUSR1)
                time.sleep(0.05)
        if not (stub / "requeued").exists():
            return shell.returncode
        (stub / "requeued").unlink()
        assert "requeue" in options, "scontrol: the job may not be requeued"
    raise AssertionError("requeued forever")


def srun(arguments: list[str]) -> int:
    """One process for each task. The highest exit code counts, that of a signal is 128 and its number."""
    note("srun", *arguments)
    while arguments[0].startswith("--"):
        assert arguments.pop(0).partition("=")[0] in ("--kill-on-bad-exit", "--wait", "--cpus-per-task")
    codes = Path(os.environ["SLURM_STUB"], "codes")
    if codes.exists() and (lines := codes.read_text().split()):  # in place of tasks
        codes.write_text(" ".join(lines[1:]))
        if lines[0].endswith("refused"):
            Path(os.environ["PROTOSHARD_REFUSED"]).touch()
        return int(lines[0].removesuffix("refused"))
    tasks = int(os.environ["SLURM_NTASKS"])
    per_node = tasks // int(os.environ["SLURM_JOB_NUM_NODES"])
    processes = []

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            process.send_signal(number)

    for each in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(each, pass_on)
    for task in range(tasks):
        own = {"PROCID": task, "LOCALID": task % per_node, "NODEID": task // per_node}
        environment = os.environ | {f"SLURM_{name}": str(value) for name, value in own.items()}
        environment["SLURM_STEP_TASKS_PER_NODE"] = os.environ["SLURM_TASKS_PER_NODE"]
        processes.append(subprocess.Popen(arguments, env=environment))
    return max(code if (code := process.wait()) >= 0 else 128 - code for process in processes)


def scontrol(arguments: list[str]) -> int:
    note("scontrol", *arguments)
    if arguments[:2] == ["show", "hostnames"]:
        match = re.fullmatch(r"(\w+)\[(\d+)-(\d+)\]", arguments[2])
        names = [f"{match[1]}{n}" for n in range(int(match[2]), int(match[3]) + 1)] if match else [arguments[2]]
        print("\n".join(names))
        return 0
    assert arguments[0] == "requeue" and arguments[1] == os.environ["SLURM_JOB_ID"]
    Path(os.environ["SLURM_STUB"], "requeued").touch()
    return 0


def install(folder: Path) -> None:
    for name in ("sbatch", "srun", "scontrol"):
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {__file__} {name} "$@"\n')
        program.chmod(0o755)


if __name__ == "__main__":
    try:
        sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
