"""The command `protoshard status`."""

from __future__ import annotations

import argparse
import os
from importlib import import_module

from pipeline.commands import command


def add(commands: argparse._SubParsersAction) -> None:
    """Adds it to the commands of `protoshard`."""
    status = command(
        commands, "status", _status, "say how a run stands, whether its ranks live and what they do", "protoshard status runs/faces_small"
    )
    status.add_argument("run", metavar="RUN|JOB", help="the folder of a run; with --address the name or id of a job")
    status.add_argument("--address", metavar="RAY_ADDRESS", help="the cluster of the job, as for launch/multinode.sh")
    status.add_argument("--json", action="store_true", help="print one JSON object")


def _status(options: argparse.Namespace) -> None:
    from pipeline import status

    if options.address is not None:
        of_job = import_module("launch.job_status")  # stands above this, and needs Ray
        options.run = of_job.run_folder(options.run, options.address)
        if not os.path.isdir(options.run):
            raise ValueError(f"The run's folder is {options.run} on the cluster, which this machine does not see; run this command there")
    found = status.of_run(options.run)
    print(status.as_json(found) if options.json else status.as_text(found))
