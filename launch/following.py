"""Following a Ray job from another machine: its status is asked for until it has ended, and its log printed once, without gaps, whatever
happens to the connection."""

from __future__ import annotations

import asyncio
import queue
import re
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol

from ray.job_submission import JobDetails, JobSubmissionClient

from launch.console import say, shown

CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 15.0  # time limit of each request
POLL_SECONDS = 1.0
SPEAK_SECONDS = 10.0  # without contact, before a line says so
SILENT_SECONDS = 300.0  # of a log, before its connection is made anew: one that died without a word looks the same
UNKNOWN = 3  # answers in a row that the head does not know the job
LOG_SECONDS = 5.0  # for the rest of the log of a job that has ended


_OF_RAY = re.compile(r"^(\S+ \S+\s+INFO job_manager\.py:\d+ -- .*|Running entrypoint for job .*)\n", re.MULTILINE)  # of its first lines


class Client(JobSubmissionClient):
    """Whose every request has a time limit: a head that was cut off would hold its caller for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, **{"timeout": (CONNECT_SECONDS, ANSWER_SECONDS), **options})


class LostContactError(RuntimeError):
    """The head gave no answer for longer than anybody wants to wait."""


class UnknownJobError(LostContactError):
    """The head answers, but no longer knows the job."""


class Jobs(Protocol):
    """What of a client is used here."""

    def get_job_info(self, job_id: str) -> JobDetails: ...

    def get_job_logs(self, job_id: str) -> str: ...

    def tail_job_logs(self, job_id: str) -> Any: ...


class Log:
    """What of a job's log was printed. The server sends a log from its beginning each time; what was printed is skipped."""

    def __init__(self) -> None:
        self.printed = 0  # characters
        self._alone, self._is_unheard = threading.Lock(), False

    def take(self, start: int, text: str) -> None:
        """The part of the log that begins at character `start`."""
        with self._alone:
            fresh = text[max(0, self.printed - start) :]
            self.printed = max(self.printed, start + len(text))
            fresh = _OF_RAY.sub("", fresh)
            try:
                if fresh and not self._is_unheard:
                    print(fresh, end="", flush=True)
            except OSError:  # nobody reads it any more, or a full disk: the job goes on
                self._is_unheard = True


def follow(
    client: Jobs,
    job_id: str,
    log: Log,
    check: Callable[[], None] = lambda: None,
    patience: float = 180.0,
    until: float | None = None,
) -> JobDetails:
    """What the job server says of a job that has ended. The calling thread never waits for the network, so that signals reach it at once.

    check     called every second; may raise
    patience  seconds without an answer before LostContactError
    until     time.monotonic() at which TimeoutError is raised"""
    answers: queue.Queue[JobDetails | Exception] = queue.Queue()
    over = threading.Event()
    printing = _Printing(client, job_id, log, over)
    threading.Thread(target=_poll, args=(client, job_id, answers, over), name="poll", daemon=True).start()
    printing.start()
    last, unknown, is_told, reason = time.monotonic(), 0, False, "no answer"
    try:
        while True:
            check()
            answer: JobDetails | Exception | None = None
            with suppress(queue.Empty):
                answer = answers.get(timeout=POLL_SECONDS)
            now = time.monotonic()
            if until is not None and now > until:
                raise TimeoutError
            if answer is not None and not isinstance(answer, Exception):
                if is_told:
                    say(f"contact with the job server is back, after {now - last:.0f} s")
                    printing.again()
                last, unknown, is_told, reason = now, 0, False, "no answer"
                if answer.status.is_terminal():
                    printing.finish()
                    return answer
                continue
            if answer is not None:
                unknown = unknown + 1 if _is_unknown(answer) else 0
                reason = reason_of(answer)
                if unknown >= UNKNOWN:
                    raise UnknownJobError(f"the head no longer knows the job {job_id}: it was started anew")
            if now - last > SPEAK_SECONDS and not is_told:
                is_told = True
                say(f"no contact with the job server ({reason}): trying again for {shown(patience)}; the job may go on meanwhile")
            if now - last > patience:
                raise LostContactError(f"the head gave no answer for {shown(patience)} ({reason})")
    finally:
        over.set()


def reason_of(error: BaseException) -> str:
    """In a few words: what errors of requests, urllib3 and aiohttp say spans lines, and repeats itself."""
    text = str(error).strip()
    for pattern, words in (
        (r"refused", "connection refused"),
        (r"reset by peer", "connection reset"),
        (r"[Tt]imed? ?out", "no answer in time"),
        (r"No route to host", "no route to the host"),
        (r"Network is unreachable", "the network is unreachable"),
        (r"[Rr]emote end closed|RemoteDisconnected|[Ss]erver disconnected", "the connection was closed"),
        (r"status code (\d+)", ""),
    ):
        if match := re.search(pattern, text):
            return words or f"status code {match[1]}"
    return text.splitlines()[0][:120].rstrip(".") if text else type(error).__name__


def within(seconds: float, action: Callable[[], Any]) -> Any:
    """What `action` returns, in a thread that is left behind where it takes longer: TimeoutError. Its own exceptions are raised here."""
    results: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def act() -> None:
        try:
            results.put((action(), None))
        except BaseException as error:  # SystemExit too, with which Ray leaves where it finds no cluster
            results.put((None, error))

    threading.Thread(target=act, daemon=True).start()
    try:
        value, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} s") from None
    if error is not None:
        raise error
    return value


def _poll(client: Jobs, job_id: str, answers: queue.Queue[JobDetails | Exception], over: threading.Event) -> None:
    while not over.is_set():
        try:
            answers.put(client.get_job_info(job_id))
        except Exception as error:  # of requests, JSON, pydantic, Ray: any of them is one failed poll
            answers.put(error)
        over.wait(POLL_SECONDS)


def _is_unknown(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and "404" in str(error) and "does not exist" in str(error)


class _Printing:
    """The thread that prints the log. It connects again when the stream ends while the job goes on, which may be after an error or not."""

    def __init__(self, client: Jobs, job_id: str, log: Log, over: threading.Event) -> None:
        self._client, self._id, self._log, self._over = client, job_id, log, over
        self._again, self._finishing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def again(self) -> None:
        """The present connection may be dead."""
        self._again.set()

    def finish(self) -> None:
        """Once the job has ended: prints what is missing yet."""
        self._finishing.set()
        self._thread.join(LOG_SECONDS)
        with suppress(Exception):
            self._log.take(0, within(LOG_SECONDS, lambda: self._client.get_job_logs(self._id)))

    def _run(self) -> None:
        while not self._over.is_set():
            self._again.clear()
            with suppress(Exception):
                asyncio.run(self._read())
            if self._finishing.is_set():
                return
            self._over.wait(POLL_SECONDS)

    async def _read(self) -> None:
        received = 0
        stream = self._client.tail_job_logs(self._id).__aiter__()
        while True:
            more = asyncio.ensure_future(_next(stream))
            silent_since = time.monotonic()
            while not (await asyncio.wait([more], timeout=0.5))[0]:
                if self._over.is_set() or self._again.is_set() or time.monotonic() - silent_since > SILENT_SECONDS:
                    more.cancel()
                    return
            text = more.result()
            if text is None:
                return
            self._log.take(received, text)
            received += len(text)


def _next(stream: Any) -> Coroutine[Any, Any, str | None]:
    async def read() -> str | None:
        try:
            return await stream.__anext__()
        except StopAsyncIteration:
            return None

    return read()
