"""The command `protoshard status`."""

from __future__ import annotations

import argparse
import os
from importlib import import_module

from pipeline.commands import command


def add(commands: argparse._SubParsersAction) -> None:
    """Adds it to the commands of `protoshard`."""
    status = command(
        commands,
        "status",
        _status,
        "say how a run stands (starting, running, waiting, finished, stopped, failed, or gone without a word), whether its ranks live and "
        "what they do; looks twice, which takes some seconds, or half a minute for a thousand ranks",
        "protoshard status runs/faces_small",
    )
    status.add_argument("run", metavar="RUN|JOB", help="the folder of a run; with --address the name or id of a job")
    status.add_argument(
        "--address",
        metavar="RAY_ADDRESS",
        help="the cluster of the job, http://head:8265 or head:6379; needs a checkout with Ray on a machine that sees the run's folder",
    )
    status.add_argument("--json", action="store_true", help="print one JSON object")


def _status(options: argparse.Namespace) -> None:
    from pipeline import status

    job_runs = False
    if options.address is not None:
        try:
            of_job = import_module("launch.job_status")  # stands above this
        except ModuleNotFoundError as error:
            if error.name not in ("launch", "launch.job_status"):
                raise
            raise ValueError("--address needs a checkout, whose launch/ is not installed here: use one, or give the run's folder") from None
        options.run, job_runs = of_job.run_folder(options.run, options.address)
        if not os.path.isdir(options.run):
            raise ValueError(f"The run's folder is {options.run} on the cluster, which this machine does not see; run this command there")
    found = status.of_run(options.run, job_runs=job_runs)
    print(status.as_json(found) if options.json else status.as_text(found))
