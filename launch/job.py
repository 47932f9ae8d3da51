"""A Ray job from submission to exit code: its log is followed. When the launcher is interrupted, the run is asked to save and stop."""

import asyncio
import logging
import secrets
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it reports every closed connection
SUBMIT_SECONDS = 60
STOP_SECONDS = 15
POLL_SECONDS = 1.0
ASK_SECONDS = 60  # for a small job that writes a file
OF_JOB = "PROTOSHARD_JOB"  # the variable in which a job finds its name


@dataclass
class Ending:
    """How a job is asked to stop: by a file that rank 0 looks for at the end of each step."""

    folder: str  # where relative paths start, on the cluster
    file: str  # FOLDER/stop of the run
    patience: float  # seconds


@dataclass
class Log:
    """What of a job's log was printed."""

    printed: int = 0  # characters


def run(client: JobSubmissionClient, entrypoint: str, env_vars: dict[str, str], check: Callable[[], None], ending: Ending) -> int:
    """Submits the command, prints its log until it ends and returns its exit code. `check` is called all along and may raise.

    A first interruption asks the run to stop, which it does with exit code 75. Whatever ends this call early (a second one, an error) stops
    the job."""
    job_id, log = f"protoshard-{secrets.token_hex(4)}", Log()
    try:
        submit(client, job_id, entrypoint, env_vars | {OF_JOB: job_id})
        try:
            details = asyncio.run(follow(client, job_id, check, log))
        except KeyboardInterrupt as interruption:
            details = end(client, job_id, check, log, ending, interruption)
    except BaseException:
        stop(client, job_id)
        raise
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.driver_exit_code is None:  # it never ran, or lost its node
        print(f"Ray job {job_id} ended as {details.status}: {details.message}", flush=True)
    return details.driver_exit_code or 1


def end(
    client: JobSubmissionClient, job_id: str, check: Callable[[], None], log: Log, ending: Ending, interruption: BaseException
) -> JobDetails:
    """Follows a job that is asked to stop to its end. Raises `interruption` where it cannot be asked, or does not end in time."""
    print("multinode.sh: asking the run to save and stop; a second signal ends it at once", file=sys.stderr, flush=True)
    if not ask(client, job_id, ending):
        raise interruption
    try:
        return asyncio.run(asyncio.wait_for(follow(client, job_id, check, log), ending.patience))
    except TimeoutError:
        raise interruption from None


def ask(client: JobSubmissionClient, job_id: str, ending: Ending) -> bool:
    """Writes the stop file, by a job, because the cluster sees the run's folder and this machine may not. False if that fails, as where the
    run has not begun."""
    command = f"cd {shlex.quote(ending.folder)} && echo {job_id} > {shlex.quote(ending.file)}"
    deadline = time.monotonic() + ASK_SECONDS
    try:
        asking = client.submit_job(entrypoint=command)
        while not (status := client.get_job_status(asking)).is_terminal() and time.monotonic() < deadline:
            time.sleep(0.2)
    except (RuntimeError, OSError):
        return False
    return status == JobStatus.SUCCEEDED


def submit(client: JobSubmissionClient, job_id: str, entrypoint: str, env_vars: dict[str, str]) -> None:
    """Tries again for SUBMIT_SECONDS, because a new cluster answers before it takes jobs. The fixed name keeps a second try from starting a
    second job."""
    deadline = time.monotonic() + SUBMIT_SECONDS
    while True:
        try:
            client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env={"env_vars": env_vars})
            return
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_SECONDS)


async def follow(client: JobSubmissionClient, job_id: str, check: Callable[[], None], log: Log) -> JobDetails:
    printing = asyncio.create_task(print_log(client, job_id, log))
    while True:
        details = await asyncio.to_thread(client.get_job_info, job_id)
        if details.status.is_terminal():
            await asyncio.wait([printing], timeout=5 * POLL_SECONDS)
            return details
        check()
        await asyncio.sleep(POLL_SECONDS)


async def print_log(client: JobSubmissionClient, job_id: str, log: Log) -> None:
    """Prints the log until the job ends. After a lost connection the server sends it again from the start; what was printed is skipped."""
    while True:
        received = 0
        try:
            async for text in client.tail_job_logs(job_id):
                fresh = text[max(0, log.printed - received) :]
                received += len(text)
                log.printed = max(log.printed, received)
                print(fresh, end="", flush=True)
            return
        except (RuntimeError, aiohttp.ClientError):
            await asyncio.sleep(POLL_SECONDS)


def stop(client: JobSubmissionClient, job_id: str) -> None:
    """Asks the job to stop and waits until it has; a cluster that no longer answers has no job to stop."""
    deadline = time.monotonic() + STOP_SECONDS
    try:
        client.stop_job(job_id)
        while not client.get_job_status(job_id).is_terminal() and time.monotonic() < deadline:
            time.sleep(0.2)
    except (RuntimeError, OSError):
        pass
