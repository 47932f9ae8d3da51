"""Jobs on a cluster that others keep: found by name or id, attached to, and asked to stop, by whoever reaches the cluster."""

import secrets
import time
from contextlib import suppress
from typing import Any

from ray.job_submission import JobDetails, JobStatus

from launch.console import say, shown
from launch.following import Client, Log, follow, reason_of, within
from launch.job import PATIENCE, Ending, Task, ask, attach_command, exit_code, submit

ANSWER_SECONDS = 60.0  # for lists and whole logs
BEGIN_SECONDS = 60.0  # that a detached job has to begin
TAIL = 40  # lines of an older log


def described(name: str, ending: Ending) -> dict[str, str]:
    """What a job carries with it, so that it can be asked to stop from elsewhere."""
    return {
        "protoshard": name or "-",
        "folder": ending.folder,
        "stop_file": ending.file,
        "patience": str(ending.patience),
    }


def listed(client: Client) -> list[JobDetails]:
    """All that were submitted to the cluster, in the order of their begin. ValueError: it does not tell."""
    try:
        found = within(ANSWER_SECONDS, client.list_jobs)
    except Exception as error:
        raise ValueError(f"The Ray cluster does not list its jobs ({reason_of(error)}); try again.") from None
    return sorted((details for details in found if details.submission_id), key=lambda details: details.start_time or 0)


def jobs(client: Client) -> list[JobDetails]:
    """Those that multinode.sh has submitted."""
    return [details for details in listed(client) if "protoshard" in (details.metadata or {})]


def find(client: Client, job: str) -> JobDetails:
    """By id, or the newest of that name. ValueError where there is none."""
    known = jobs(client)
    for details in reversed(known):
        if job in (details.submission_id, name_of(details)):
            return details
    running = [shown_name(details) for details in known if not details.status.is_terminal()]
    raise ValueError(f"The cluster has no job {job}; running are: {', '.join(running) or 'none'}.")


def name_of(details: JobDetails) -> str:
    return str((details.metadata or {}).get("protoshard", "-"))


def shown_name(details: JobDetails) -> str:
    name = name_of(details)
    return str(details.submission_id) if name in ("-", details.submission_id) else f"{name} ({details.submission_id})"


def id_for(client: Client, name: str, entrypoint: str) -> tuple[str, JobDetails | None]:
    """The id of the next job of that name, and the running one if there is one: then that id is its. Two that ask at once get the same id,
    which the cluster takes once. ValueError: another command runs under that name."""
    if not name:
        return f"protoshard-{secrets.token_hex(4)}", None
    known = listed(client)
    named = [details for details in known if name_of(details) == name]
    for details in named:
        if not details.status.is_terminal():
            if details.entrypoint != entrypoint:
                raise ValueError(
                    f"Job {shown_name(details)} runs with another recipe or other options; choose another --name, or stop it first, with "
                    f"--stop {name}."
                )
            return str(details.submission_id), details
    taken = {details.submission_id for details in known}
    number = len(named) + 1
    while (job_id := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return job_id, None


def detach(client: Client, task: Task, address: str, running: JobDetails | None) -> int:
    """Submits the job, unless it is `running`, and leaves it. 1 if it ends at once, otherwise than well."""
    if running is None:
        submit(client, task)
    deadline = time.monotonic() + BEGIN_SECONDS
    while time.monotonic() < deadline:
        with suppress(Exception):
            details = within(ANSWER_SECONDS, lambda: client.get_job_info(task.id))
            if details.status.is_terminal() and details.status != JobStatus.SUCCEEDED:
                Log().take(0, within(ANSWER_SECONDS, lambda: client.get_job_logs(task.id)))
                return exit_code(details)
            if details.status != JobStatus.PENDING:
                break
        time.sleep(0.5)
    begun = "was running already" if running else "runs"
    say(f"job {task.id} {begun}; {attach_command(task.id, address)} follows it, and --stop {task.id} stops it")
    return 0


def attach(client: Client, job: str, address: str) -> int:
    """Follows a job to its end. An interruption ends the following, and not the job."""
    details = find(client, job)
    job_id = str(details.submission_id)
    log = skipped(client, job_id)
    say(f"job {job_id} ({details.status}); Ctrl-C ends this, and not the job")
    try:
        return exit_code(follow(client, job_id, log, patience=PATIENCE))
    except KeyboardInterrupt:
        say(f"job {job_id} goes on; stop it with launch/multinode.sh --stop {job_id} --address {address}")
        raise


def stop(client: Client, job: str) -> int:
    """Asks the run to save and stop, and waits until it has. 0 once it has ended."""
    details = find(client, job)
    job_id = str(details.submission_id)
    if details.status.is_terminal():
        say(f"job {job_id} has ended already, as {details.status}")
        return 0
    about: dict[str, Any] = details.metadata or {}
    ending = Ending(about["folder"], about["stop_file"], float(about["patience"]))
    say(f"asking job {job_id} to save and stop, and waiting up to {shown(ending.patience)} (run.timeout) for it")
    log = skipped(client, job_id, lines=0)
    reason = ask(client, job_id, ending)
    if reason:
        raise RuntimeError(f"job {job_id} could not be asked to stop ({reason}); `ray job stop {job_id}` ends it without a save")
    try:
        details = follow(client, job_id, log, patience=PATIENCE, until=time.monotonic() + ending.patience)
    except TimeoutError:
        raise RuntimeError(
            f"job {job_id} has not stopped within {shown(ending.patience)}; `ray job stop {job_id}` ends it without a save"
        ) from None
    say(f"job {job_id} has ended, as {details.status}, with exit code {details.driver_exit_code}")
    return 0


def skipped(client: Client, job_id: str, lines: int = TAIL) -> Log:
    """A log of which the last lines so far are printed, and counted as all of it."""
    log = Log()
    with suppress(Exception):  # then all of it comes
        text = within(ANSWER_SECONDS, lambda: client.get_job_logs(job_id))
        tail = "".join(text.splitlines(keepends=True)[-lines:]) if lines else ""
        log.printed = len(text) - len(tail)
        log.take(log.printed, tail)
    return log
