"""What is said of a failure, from what Ray and the ranks say; and how many are too many."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from launch.failures import Failure, Outages
from launch.ray_worker import BadInputError, GivingUpError, OnFailure, RegroupError, placed
from pipeline import heartbeat
from pipeline.heartbeat import Beat


class DiedError(ActorDiedError):
    """With a text of its own."""

    def __init__(self, text: str, preempted: bool = False) -> None:
        super().__init__()
        self.error_msg, self._preempted = text, preempted


KILLED = """The actor died unexpectedly before finishing this task.
	class_name: RayTrainWorker
	pid: 12
	ip: 10.0.0.2
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a
connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer, (2) ray
stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV or another unexpected error."""
OF_NODE = (
    "The actor died unexpectedly.\n\tip: 10.0.0.3\nThe actor is dead because its node has died. Node Id: 5. missing too many heartbeats"
)
OF_MEMORY = "Task was killed due to the node running low on memory.\nMemory on the node (IP: 10.0.0.2) was 15.2GB / 16GB"


def gone(text: str, **values: bool) -> WorkerHealthCheckFailedError:
    return WorkerHealthCheckFailedError("A worker health check failed.", DiedError(text, **values))


def says(folder, rank, step=15, run="now", **values):
    known = {"doing": "a training step, forward (pipeline/x.py:1)", "is_waiting": False, "end": ""} | values
    heartbeat.write(str(folder), Beat(run, rank, 1, f"node{rank}", 100 + rank, step, **known))


LOST = "rank 1 on node1 has died; last seen after step 15 in a training step"


@pytest.mark.parametrize(
    ("errors", "ranks", "sentence"),
    [
        (
            {1: gone(KILLED)},
            {0: {}, 1: {}},
            "rank 1 on node1 died without a word (killed? out of memory?) after step 15 in a training step",
        ),
        # The others lose a rank and end with 76, which Ray reports first.
        (
            {0: gone(KILLED), 1: gone(KILLED)},
            {0: {"end": "lost", "doing": LOST}, 1: {}},
            "rank 1 on node1 died without a word (killed? out of memory?) after step 15",
        ),
        ({0: gone(KILLED)}, {0: {"end": "lost", "doing": LOST}}, LOST),
        ({1: gone(OF_NODE)}, {0: {}, 1: {}}, "rank 1 on node1 was lost with its host after step 15"),
        ({1: gone(OF_NODE)}, {}, "rank 1 on 10.0.0.3 was lost with its host"),
        ({0: gone(OF_MEMORY)}, {0: {}}, "rank 0 on node0 was ended by Ray, because the memory of its host ran low after step 15"),
        # One raises, the rest lose their connection to it.
        (
            {0: RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer [10.0.0.2]"), 2: KeyError("x")},
            {},
            "rank 2 failed: KeyError: 'x'",
        ),
        (
            {0: RuntimeError("Connection reset by peer")},
            {0: {}, 2: {"end": "error", "doing": "ZeroDivisionError: division by zero"}},
            "rank 2 on node2 failed after step 15: ZeroDivisionError: division by zero",
        ),
        ({0: gone(KILLED)}, {0: {}, 2: {"end": "hung", "doing": "saving"}}, "rank 2 on node2 stood still after step 15: saving"),
        ({0: RuntimeError("Connection reset by peer")}, {}, "rank 0 failed: RuntimeError: Connection reset by peer"),
        ({0: ValueError("")}, {0: {"step": -1}}, "rank 0 on node0 failed at the start: ValueError"),
    ],
)
def test_who_failed_first(tmp_path, errors, ranks, sentence):
    for rank, values in ranks.items():
        says(tmp_path, rank, **values)
    said = Failure(errors, str(tmp_path), set()).sentence
    assert said.startswith(sentence) and "\n" not in said and len(said) < 320


def test_words_of_an_earlier_failure_are_not_repeated(tmp_path):
    says(tmp_path, 0, run="before", end="error", doing="RuntimeError: of an earlier start")
    assert Failure({1: KeyError("x")}, str(tmp_path), {"before"}).sentence == "rank 1 failed: KeyError: 'x'"


def test_the_rest_is_in_a_file(tmp_path):
    says(tmp_path, 0)
    failure = Failure({0: gone(KILLED), 1: KeyError("x")}, str(tmp_path), set())
    for _ in range(2):
        failure.write(str(tmp_path / "logs"))
    text = (tmp_path / "logs" / "failures.txt").read_text()
    assert (tmp_path / "logs" / "failures.txt").stat().st_mode & 0o777 == 0o600
    assert text.count("--- rank 0: what Ray says") == 2 and "KeyError: 'x'" in text and "--- rank 0 on node0, process 100" in text


def test_failures_are_counted_per_outage():
    newest = ["step-5"]
    outages = Outages(2, lambda: tuple(newest))
    assert [outages.another() for _ in range(2)] == [True, True]
    newest.append("step-10")  # the run has got on
    assert [outages.another() for _ in range(3)] == [True, True, False]
    assert not Outages(0, lambda: ()).another()


def test_a_store_without_an_answer_is_no_progress():
    answers = iter([("step-5",), None, ("step-5",), None])
    outages = Outages(2, lambda: next(answers))
    assert [outages.another() for _ in range(3)] == [True, True, False]


def poll(callback, **errors):
    callback.after_worker_group_training_start(None)
    callback.after_worker_group_poll_status(SimpleNamespace(errors={int(rank[1:]): error for rank, error in errors.items()}))
    callback.before_controller_execute_failure_decision(None)


def test_what_is_said_is_what_is_done(tmp_path, capsys):
    callback = OnFailure(1, str(tmp_path), str(tmp_path / "logs"), starts=3)
    poll(callback, r1=KeyError("x"))
    assert "Failure 1, 1 allowed before the next checkpoint (rank 1 failed: KeyError: 'x'): restarting" in capsys.readouterr().out
    for _ in range(3):  # which never end a job
        poll(callback, r0=gone(OF_NODE, preempted=True))
    assert capsys.readouterr().out.count("Preemption, which does not count as a failure (rank 0 on 10.0.0.3") == 3
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    poll(callback, r1=KeyError("x"))
    with pytest.raises(GivingUpError, match=r"^Failure 2, 1 allowed .*KeyError.*: giving up; the same command continues"):
        poll(callback, r1=KeyError("x"))
    capsys.readouterr()
    callback.after_worker_group_training_start(None)
    with pytest.raises(BadInputError, match="no image"):
        callback.after_worker_group_poll_status(SimpleNamespace(errors={1: BadInputError("no image")}))
    callback.before_controller_execute_failure_decision(None)  # on that error, which ends the job
    assert capsys.readouterr().out == ""


def test_ranks_that_started_anew_have_no_words_of_the_start_before(tmp_path, capsys):
    """Else the rank that is killed before its first beat has ended, as it did to start anew, and another one is named."""
    callback = OnFailure(1, str(tmp_path))
    for rank in (0, 1):
        says(tmp_path, rank, run="before", end="stopped")
    poll(callback, r0=RegroupError("saved"), r1=RegroupError("saved"))
    poll(callback, r0=gone(KILLED))
    assert "(rank 0 on 10.0.0.2 died without a word" in capsys.readouterr().out


def test_starts_without_a_place_are_counted_in_a_row(tmp_path, capsys):
    callback = OnFailure(1, str(tmp_path), starts=3)
    for _ in range(2):
        callback.before_controller_execute_failure_decision(None)
        callback.before_controller_execute_failure_decision(None)
        callback.after_worker_group_training_start(None)
        poll(callback, r0=gone(OF_NODE, preempted=True))
    assert capsys.readouterr().out.count("waiting for hosts with a place for the ranks") == 2
    for _ in range(2):
        callback.before_controller_execute_failure_decision(None)
    with pytest.raises(GivingUpError, match="3 starts in a row found no place for the ranks: giving up"):
        callback.before_controller_execute_failure_decision(None)


def test_a_hang_that_ray_finds_counts_as_a_failure(tmp_path, capsys):
    callback = OnFailure(1, str(tmp_path))
    callback.after_worker_group_training_start(None)
    callback.before_controller_execute_failure_decision(None)
    assert "Failure 1, 1 allowed before the next checkpoint (the ranks stand still in a collective of NCCL" in capsys.readouterr().out


def test_where_ranks_are():
    assert placed(["a", "a", "b"]) == "ranks 0 to 1 on a, rank 2 on b"
    assert placed([str(number) for number in range(10)]).endswith("rank 7 on 7 and 2 more")
