"""A Ray job from submission to exit code: its log is followed, and it is stopped when the launcher is."""

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it reports every closed connection
CONNECT_SECONDS = 5
SUBMIT_SECONDS = 60
STOP_SECONDS = 15
POLL_SECONDS = 1.0


def connect(address: str, patience: float = 0.0) -> JobSubmissionClient:
    """Client of the job server of `address`: its http://host:port, or host:port of the head's control store.

    Tries again for `patience` seconds, which a cluster just started needs. ValueError: nothing there, or it refuses."""
    reach(address)
    deadline = time.monotonic() + patience
    while True:
        try:
            return JobSubmissionClient(address)
        except SystemExit:  # Ray's own way out when the control store does not answer
            reason = "no control store answers there"
        except Exception as error:  # Ray raises anything from ConnectionError to AuthenticationError
            reason = str(error).strip().partition("\n")[0].rstrip(".")
        if time.monotonic() > deadline:
            raise ValueError(
                f"The Ray cluster at {address} accepts no jobs ({reason}); give --address its dashboard (http://host:8265) "
                f"or head address (host:6379), with RAY_AUTH_MODE and RAY_AUTH_TOKEN if it asks for a token."
            )
        time.sleep(0.5)


def reach(address: str) -> None:
    """ValueError unless something listens there: Ray itself would wait for minutes, or exit."""
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None:
        raise ValueError(f"--address {address} is not the address of a Ray cluster; give http://host:8265 or host:6379.")
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error) or "no answer"
        raise ValueError(f"No Ray cluster answers at {address} ({reason}); check the address, or leave it out to start one.") from None


def run(client: JobSubmissionClient, entrypoint: str, env_vars: dict[str, str], check: Callable[[], None]) -> int:
    """Submits the command, prints its log until it ends and returns its exit code. `check` is called all along and may raise.

    Whatever ends this call early (Ctrl-C, an error) stops the job."""
    job_id = f"protoshard-{secrets.token_hex(4)}"
    try:
        submit(client, job_id, entrypoint, env_vars)
        details = asyncio.run(follow(client, job_id, check))
    except BaseException:
        stop(client, job_id)
        raise
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.driver_exit_code is None:  # it never ran, or lost its node
        print(f"Ray job {job_id} ended as {details.status}: {details.message}", flush=True)
    return details.driver_exit_code or 1


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


async def follow(client: JobSubmissionClient, job_id: str, check: Callable[[], None]) -> JobDetails:
    printing = asyncio.create_task(print_log(client, job_id))
    while True:
        details = await asyncio.to_thread(client.get_job_info, job_id)
        if details.status.is_terminal():
            await asyncio.wait([printing], timeout=5 * POLL_SECONDS)
            return details
        check()
        await asyncio.sleep(POLL_SECONDS)


async def print_log(client: JobSubmissionClient, job_id: str) -> None:
    """Prints the log until the job ends. After a lost connection the server sends it again from the start; what was printed is skipped."""
    printed = 0
    while True:
        received = 0
        try:
            async for text in client.tail_job_logs(job_id):
                fresh = text[max(0, printed - received) :]
                received += len(text)
                printed = max(printed, received)
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
