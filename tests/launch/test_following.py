"""How a job is followed whose server answers badly, late, or not at all: a server of the test's own, and a client that fails as told."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import requests
from ray.job_submission import JobStatus

from launch import attached, following, job
from launch.following import Log, LostContactError, UnknownJobError, follow, reason_of, within
from launch.options import check_jobs, parser


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(following, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(following, "SPEAK_SECONDS", 0.1)
    monkeypatch.setattr(following, "LOG_SECONDS", 1.0)


def details(status, **values):
    return SimpleNamespace(status=status, **values)


class Server:
    """Answers in turn; the last one again and again. The log is sent in parts, each stream from the beginning."""

    def __init__(self, *answers: object, log: str = "", parts: tuple[object, ...] = ()) -> None:
        self.answers, self.log, self.parts = list(answers), log, list(parts)

    def get_job_info(self, job_id):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            return answer()
        return details(answer)

    def get_job_logs(self, job_id):
        return self.log

    async def tail_job_logs(self, job_id):
        end = self.parts.pop(0) if self.parts else len(self.log)
        if isinstance(end, Exception):
            raise end
        for at in range(0, end, 7):
            yield self.log[at : min(end, at + 7)]


FAULTS = [
    requests.exceptions.ConnectionError("HTTPConnectionPool(host='a'): [Errno 111] Connection refused"),
    requests.exceptions.ReadTimeout("HTTPConnectionPool: Read timed out. (read timeout=15.0)"),
    requests.exceptions.JSONDecodeError("Expecting value", "<html>", 0),
    RuntimeError("Request failed with status code 503: <html>\nTraceback\n"),
    ConnectionResetError(104, "Connection reset by peer"),
    TypeError("JobDetails() got an unexpected keyword"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_failed_poll_is_tried_again(fault, capsys):
    server = Server(JobStatus.RUNNING, *[fault] * 12, JobStatus.RUNNING, JobStatus.SUCCEEDED, log="done\n")
    assert follow(server, "job", Log(), patience=30).status == JobStatus.SUCCEEDED
    said = capsys.readouterr()
    assert said.out == "done\n"
    lost, back = said.err.splitlines()
    assert "no contact with the job server (" in lost and "trying again for 30 s" in lost and "contact with the job server is back" in back
    assert "Traceback" not in said.err and "HTTPConnectionPool" not in said.err


def test_a_blip_is_not_worth_a_line(capsys):
    server = Server(JobStatus.RUNNING, FAULTS[0], JobStatus.SUCCEEDED)
    assert follow(server, "job", Log()).status == JobStatus.SUCCEEDED
    assert capsys.readouterr().err == ""


def test_contact_that_is_lost_for_good_ends_in_a_sentence(capsys):
    with pytest.raises(LostContactError, match=r"the head gave no answer for 0 s \(connection refused\)"):
        follow(Server(JobStatus.RUNNING, FAULTS[0]), "job", Log(), patience=0.3)


def test_a_head_that_was_started_anew_does_not_know_the_job():
    gone = RuntimeError("Request failed with status code 404: Job protoshard-1 does not exist.")
    with pytest.raises(LostContactError, match="the head no longer knows the job job: it was started anew"):
        follow(Server(JobStatus.RUNNING, gone), "job", Log())


def test_a_poll_that_hangs_holds_nobody():
    released = threading.Event()
    checked = []
    try:
        with pytest.raises(LostContactError, match=r"for 0 s \(no answer\)"):
            follow(Server(JobStatus.RUNNING, lambda: released.wait(60)), "job", Log(), lambda: checked.append(1), patience=0.3)
        with pytest.raises(TimeoutError):
            follow(Server(JobStatus.RUNNING), "job", Log(), until=time.monotonic() + 0.1)
        with pytest.raises(TimeoutError, match="no answer in 0"):
            within(0.05, lambda: released.wait(60))
    finally:
        released.set()
    assert len(checked) > 3


def test_the_log_is_printed_once_and_without_gaps(capsys):
    """A stream that ends as if the job had, one that breaks, one that cannot be opened; the rest comes at the end."""
    text = "".join(f"line {number}, \u00e9\n" for number in range(40))
    server = Server(
        *[JobStatus.RUNNING] * 8, JobStatus.SUCCEEDED, log=text, parts=(30, 0, OSError("broken"), 100, RuntimeError("closed"), 50)
    )
    follow(server, "job", Log())
    assert capsys.readouterr().out == text


def test_a_client_whose_server_never_answers(monkeypatch):
    """Ray's own has no time limit."""
    monkeypatch.setattr(following, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = object.__new__(following.Client)
        client._address, client._cookies, client._headers, client._verify = f"http://127.0.0.1:{server.getsockname()[1]}", None, {}, True
        with pytest.raises(requests.exceptions.ReadTimeout):
            client.get_job_info("job")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Max retries exceeded with url: / (Caused by NewConnectionError(': [Errno 111] Connection refused'))", "connection refused"),
        ("Request failed with status code 500: Traceback (most recent call last):\n  File", "status code 500"),
        ("('Connection aborted.', RemoteDisconnected('Remote end closed connection without response'))", "the connection was closed"),
        ("", "ValueError"),
        ("first\nsecond", "first"),
    ],
)
def test_reasons_are_short(text, words):
    assert reason_of(ValueError(text)) == words


class Cluster:
    """Enough of a cluster's jobs."""

    def __init__(self) -> None:
        self.jobs: dict[str, SimpleNamespace] = {}
        self.asked: list[str] = []

    def list_jobs(self):
        return list(self.jobs.values())

    def submit_job(self, entrypoint, submission_id, runtime_env=None, metadata=None):
        if submission_id in self.jobs:
            raise RuntimeError(f"Request failed with status code 500: Job with submission_id {submission_id} already exists.")
        values = {"submission_id": submission_id, "entrypoint": entrypoint, "metadata": metadata, "start_time": len(self.jobs)}
        self.jobs[submission_id] = details(JobStatus.RUNNING, driver_exit_code=None, message="", **values)
        if metadata is None:  # one that writes a stop file
            self.asked.append(entrypoint)
            self.jobs[submission_id].status = JobStatus.SUCCEEDED
            for other in self.jobs.values():
                if other.metadata and other.status == JobStatus.RUNNING:
                    other.status, other.driver_exit_code = JobStatus.FAILED, 75

    def get_job_info(self, job_id):
        return self.jobs[job_id]

    def get_job_status(self, job_id):
        return self.jobs[job_id].status

    def get_job_logs(self, job_id):
        return "step 1\nstep 2\n"

    async def tail_job_logs(self, job_id):
        yield "step 1\nstep 2\n"


ENDING = job.Ending("/shared/my runs", "a run/stop", 60.0)


def task(cluster: Cluster, name: str = "faces", entrypoint: str = "train") -> tuple[job.Task, object]:
    job_id, running = attached.id_for(cluster, name, entrypoint)
    return job.Task(job_id, entrypoint, {}, ENDING, attached.described(name, ENDING)), running


def test_a_job_of_a_name_is_not_started_twice(capsys):
    cluster = Cluster()
    first, running = task(cluster)
    assert (first.id, running) == ("faces", None)
    assert attached.detach(cluster, first, "http://head:8265", None) == 0
    assert "launch/multinode.sh --attach faces --address http://head:8265 follows it, and --stop faces stops it" in capsys.readouterr().err
    second, running = task(cluster)
    assert second.id == "faces" and running is cluster.jobs["faces"]
    assert attached.detach(cluster, second, "http://head:8265", running) == 0 and len(cluster.jobs) == 1
    with pytest.raises(ValueError, match="Job faces runs with another recipe or other options; choose another --name, or stop it first"):
        task(cluster, entrypoint="train --set a=1")
    job.submit(cluster, first)  # two wrappers at once: the cluster takes the id once, and both follow the same job
    assert len(cluster.jobs) == 1
    cluster.jobs["faces"].status = JobStatus.SUCCEEDED
    third, running = task(cluster)
    assert (third.id, running) == ("faces-2", None)
    assert task(cluster, name="")[0].id.startswith("protoshard-")


def test_attach_and_stop_find_jobs_by_name_and_id(capsys):
    cluster = Cluster()
    for _ in range(2):
        attached.detach(cluster, task(cluster)[0], "head:6379", None)
        cluster.jobs["faces"].status = JobStatus.SUCCEEDED
    assert attached.find(cluster, "faces").submission_id == "faces-2"
    with pytest.raises(ValueError, match=r"The cluster has no job dogs; running are: faces \(faces-2\)."):
        attached.find(cluster, "dogs")
    capsys.readouterr()
    assert attached.stop(cluster, "faces") == 0
    assert cluster.asked == ["cd '/shared/my runs' && mkdir -p 'a run' && echo faces-2 > 'a run/stop'"]
    said = capsys.readouterr()
    assert "job faces-2 has ended, as FAILED, with exit code 75" in said.err and said.out == ""
    assert attached.stop(cluster, "faces") == 0 and "has ended already" in capsys.readouterr().err
    assert attached.attach(cluster, "faces-2", "head:6379") == 75
    assert capsys.readouterr().out == "step 1\nstep 2\n"


@pytest.mark.parametrize("code", [-9, 137])
def test_a_driver_that_was_killed_is_no_traceback(capsys, code):
    """Of the driver itself, and of the shell in which Ray runs it."""
    ended = details(JobStatus.FAILED, driver_exit_code=code, message="", submission_id="faces")
    assert job.exit_code(ended) == 1
    assert "the driver of job faces was ended by SIGKILL (out of memory?): the same command continues" in capsys.readouterr().err


def test_an_id_is_of_one_job():
    """Another job may have the id that comes next, or take it at the same moment."""
    cluster = Cluster()
    attached.detach(cluster, task(cluster, "faces-2", "dogs")[0], "head:6379", None)
    attached.detach(cluster, task(cluster)[0], "head:6379", None)
    cluster.jobs["faces"].status = JobStatus.SUCCEEDED
    assert task(cluster)[0].id == "faces-3"
    with pytest.raises(ValueError, match="The Ray cluster has got another job faces-2 meanwhile; try again, or choose another --name"):
        job.submit(cluster, job.Task("faces-2", "train", {}, ENDING))


@pytest.mark.parametrize("address", ["", "head:6379"])
def test_a_job_that_the_head_has_forgotten_does_not_go_on(monkeypatch, address):
    def forgotten(*_):
        raise UnknownJobError("the head no longer knows the job faces: it was started anew")

    cluster = Cluster()
    monkeypatch.setattr(job, "follow", forgotten)
    with pytest.raises(RuntimeError, match="it was started anew: the same command continues from the newest checkpoint"):
        job.run(cluster, task(cluster)[0], lambda: None, address=address)


@pytest.mark.parametrize("name", ["-x", "a b", "a/b", "é", "x" * 65])
def test_names_that_no_job_can_have(name):
    with pytest.raises(ValueError, match="is no name of a job"):
        check_jobs(parser().parse_args(["stub", f"--name={name}", "--address", "head:6379"]))


class Unwell(BaseHTTPRequestHandler):
    """A dashboard behind a proxy that is broken."""

    def do_GET(self):
        body = json.dumps({"a": 1}).encode() if "logs" in self.path else b"<html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def unwell() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Unwell)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_server_that_answers_nonsense(unwell):
    """Through Ray's own client: neither its status nor its stream, nor its log, is what it should be."""
    client = object.__new__(following.Client)
    client._address, client._cookies, client._headers, client._verify, client._ssl_context = unwell, None, {}, True, None
    client._server_ray_version = None
    with pytest.raises(LostContactError, match="the head gave no answer for 0 s"):
        follow(client, "job", Log(), patience=0.3)
