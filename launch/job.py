"""A Ray job from submission to exit code. When the launcher is interrupted, the run is asked to save and stop."""

import logging
import os
import secrets
import shlex
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from ray.job_submission import JobDetails, JobStatus

from launch.console import say, shown
from launch.following import Client, Log, LostContactError, UnknownJobError, follow, reason_of, within

logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it reports every closed connection
SUBMIT_SECONDS = 60
STOP_SECONDS = 15
ASK_SECONDS = 60  # for a small job that writes a file
OWN_PATIENCE, PATIENCE = 180.0, 1800.0  # seconds without contact: of a cluster that was started for the job, of one that others keep
OF_JOB = "PROTOSHARD_JOB"  # the variable in which a job finds its name


@dataclass(frozen=True)
class Ending:
    """How a job is asked to stop: by a file that rank 0 looks for at the end of each step."""

    folder: str  # where relative paths start, on the cluster
    file: str  # FOLDER/stop of the run
    patience: float  # seconds


@dataclass(frozen=True)
class Task:
    """What is submitted."""

    id: str
    entrypoint: str
    env_vars: dict[str, str]
    ending: Ending
    metadata: dict[str, str] = field(default_factory=dict)


def run(client: Client, task: Task, check: Callable[[], None], *, address: str = "") -> int:
    """Submits the job, prints its log until it ends and returns its exit code. `check` is called all along and may raise.

    A first interruption asks the run to stop, which it does with exit code 75. Whatever ends this call early (a second one, an error) stops
    a job on a cluster that others keep, whose `address` is given; but where the contact to it is lost, it goes on."""
    log, patience = Log(), PATIENCE if address else OWN_PATIENCE
    try:
        submit(client, task)
        say(f"job {task.id} submitted")
        try:
            details = follow(client, task.id, log, check, patience)
        except KeyboardInterrupt as interruption:
            details = end(client, task, check, log, interruption, patience)
    except LostContactError as error:
        if not address or isinstance(error, UnknownJobError):
            raise RuntimeError(f"{error}: the same command continues from the newest checkpoint") from None
        raise RuntimeError(f"{error}; job {task.id} goes on, attach with {attach_command(task.id, address)}") from None
    except BaseException:
        if address:  # otherwise the cluster ends, and the job with it
            stop(client, task.id)
        raise
    return exit_code(details)


def attach_command(job: str, address: str) -> str:
    return f"launch/multinode.sh --attach {job} --address {address}"


def exit_code(details: JobDetails) -> int:
    """Of a job that has ended; says what its own log does not."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    code = details.driver_exit_code
    if code is None:  # it never ran, or lost its node
        say(f"job {details.submission_id} ended as {details.status}: {reason_of(RuntimeError(details.message or 'no reason given'))}")
    elif code < 0 or code > 128:  # the shell that Ray runs it in says 128 + the signal
        number = -code if code < 0 else code - 128
        with suppress(ValueError):
            cause = " (out of memory?)" if number == signal.SIGKILL else ""
            say(f"the driver of job {details.submission_id} was ended by {signal.Signals(number).name}{cause}: the same command continues")
        return 1
    return code or 1


def end(client: Client, task: Task, check: Callable[[], None], log: Log, interruption: BaseException, patience: float) -> JobDetails:
    """Follows a job that is asked to stop to its end. Raises `interruption` where it cannot be asked, or does not end in time."""
    limit = shown(task.ending.patience)
    say(f"asking the run to save and stop, and waiting up to {limit} (run.timeout) for it; a second signal ends it at once")
    reason = ask(client, task.id, task.ending)
    if reason:
        say(f"the run could not be asked ({reason}): it is ended")
        raise interruption
    try:
        return follow(client, task.id, log, check, patience, until=time.monotonic() + task.ending.patience)
    except TimeoutError:
        say(f"the run has not stopped within {limit}: it is ended")
        raise interruption from None


def ask(client: Client, job_id: str, ending: Ending) -> str | None:
    """Writes the stop file, by a job, because the cluster sees the run's folder and this machine may not; also before the run has made its
    folder. Tries again where there is no contact. Returns why that failed."""
    run, file = shlex.quote(os.path.dirname(ending.file)), shlex.quote(ending.file)
    command = f"cd {shlex.quote(ending.folder)} && mkdir -p {run} && echo {job_id} > {file}"
    deadline, asking, reason = time.monotonic() + ASK_SECONDS, f"{job_id}-stop-{secrets.token_hex(4)}", "no answer in time"
    is_submitted = False
    while (left := deadline - time.monotonic()) > 0:
        try:
            if not is_submitted:
                within(left, lambda: submit_once(client, asking, command))
                is_submitted = True
            status = within(left, lambda: client.get_job_status(asking))
            if status.is_terminal():
                return None if status == JobStatus.SUCCEEDED else f"{ending.file} cannot be written on the cluster"
        except Exception as error:
            reason = reason_of(error)
        time.sleep(0.2)
    return reason


def submit_once(client: Client, job_id: str, entrypoint: str, **options: object) -> None:
    """A second try of the same job does nothing: the first one may have been heard, and its answer lost. ValueError: the cluster has
    another job of that id."""
    try:
        client.submit_job(entrypoint=entrypoint, submission_id=job_id, **options)  # type: ignore[arg-type]
    except RuntimeError as error:
        if "already exists" not in str(error):
            raise
        if client.get_job_info(job_id).entrypoint != entrypoint:
            raise ValueError(f"The Ray cluster has got another job {job_id} meanwhile; try again, or choose another --name.") from None


def submit(client: Client, task: Task) -> None:
    """Tries again for SUBMIT_SECONDS, because a new cluster answers before it takes jobs. RuntimeError: it took none."""
    deadline = time.monotonic() + SUBMIT_SECONDS
    options = {"runtime_env": {"env_vars": task.env_vars | {OF_JOB: task.id}}, "metadata": task.metadata}
    while True:
        try:
            return within(SUBMIT_SECONDS, lambda: submit_once(client, task.id, task.entrypoint, **options))
        except ValueError:
            raise
        except Exception as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the Ray cluster takes no job ({reason_of(error)})") from None
        time.sleep(1.0)


def stop(client: Client, job_id: str) -> None:
    """Asks the job to stop and waits until it has; a cluster that no longer answers has no job to stop."""

    def act() -> None:
        client.stop_job(job_id)
        while not client.get_job_status(job_id).is_terminal():
            time.sleep(0.2)

    with suppress(Exception):
        within(STOP_SECONDS, act)
