"""One task of `srun`, as slurm.sbatch starts it, is one rank: it finds its place in Slurm's variables and trains. Arguments and exit codes
are those of `protoshard train`."""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline import endings
from pipeline.network_card import address_towards, card_of

NODES, REFUSED = "PROTOSHARD_NODES", "PROTOSHARD_REFUSED"  # names of all nodes; the file that tells slurm.sbatch of bad input
FIRST_PORT, PORTS = 20000, 10000  # below those that Linux gives to whoever connects


def main(arguments: list[str]) -> int:
    from pipeline.cli import main as protoshard

    try:
        os.environ.update(place(os.environ))
    except ValueError as error:
        endings.say(str(error))
        code = 2
    else:
        code = protoshard(["train", *arguments])
    if code == 2 and REFUSED in os.environ:
        Path(os.environ[REFUSED]).touch()
    return code


def place(slurm: Mapping[str, str]) -> dict[str, str]:
    """What torch reads, from Slurm's variables. ValueError: this is no task of Slurm, or shares a GPU."""
    try:
        rank, ranks, local = (int(slurm[f"SLURM_{name}"]) for name in ("PROCID", "NTASKS", "LOCALID"))
        node, counts = int(slurm["SLURM_NODEID"]), tasks_of_nodes(slurm["SLURM_STEP_TASKS_PER_NODE"])
        nodes, job = slurm[NODES].split(), int(slurm["SLURM_JOB_ID"])
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is not set: this module is started by launch/slurm.sbatch, through sbatch") from None
    gpus = slurm.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdigit() and 0 < int(gpus) != counts[node]:
        raise ValueError(
            f"{nodes[node]} has {gpus} GPUs for {counts[node]} ranks, and each rank takes one: submit with --ntasks-per-node {gpus}"
        )
    found = {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(counts[node]),
        "MASTER_ADDR": nodes[0] if len(nodes) > 1 else "127.0.0.1",
        "MASTER_PORT": str(FIRST_PORT + job % PORTS),
    }
    # gloo would take the address of the host's name, which Debian maps to 127.0.1.1.
    interface = "lo" if len(nodes) == 1 else card_of(address_towards(nodes[0] if node else nodes[1]))
    if interface and not slurm.get("GLOO_SOCKET_IFNAME"):
        found["GLOO_SOCKET_IFNAME"] = interface
    return found


def tasks_of_nodes(text: str) -> list[int]:
    """Of each node, from Slurm's "2(x3),1": three nodes with 2 tasks and one with 1."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE is {text!r}, which is no list of counts such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


if __name__ == "__main__":
    endings.end_with(lambda: main(sys.argv[1:]))
