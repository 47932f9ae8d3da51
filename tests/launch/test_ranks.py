"""`--ranks`: what it may say, how many ranks have a place, and when they are asked to start anew; hosts that come back. No Ray runs."""

import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("ray", reason="the launcher needs Ray")
from ray.train.v2.api.config import ScalingConfig

from launch import cluster as clusters
from launch import elastic
from launch.elastic import Places, answers_at, lost, places
from launch.hosts import Host
from launch.ranks import Ranks, check_slots, parse
from launch.ray_driver import chosen
from launch.ray_worker import AskedToStopError, GivingUpError, checkpoints
from launch.returns import Returns
from pipeline import checkpoint

HELLO = {"event": "hello", "address": "10.0.0.1", "machine": "%s", "ray": "2.60.0", "python": "3.11.7", "prefix": "/x"}
READY = {"event": "ready", "head": "h:1", "dashboard": "http://h:2", "token_file": "t"}


@pytest.mark.parametrize(("text", "ranks"), [("3", (3, 3)), ("2:3", (2, 3)), (" 4:4 ", (4, 4))])
def test_numbers_of_ranks(text, ranks):
    assert parse(text) == ranks and parse(str(parse(text))) == ranks


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3:2", "--ranks 3:2: MIN is above MAX; give the smaller number first, 2:3."),
        ("0", "--ranks 0: at least 1 rank is needed."),
        ("0:4", "--ranks 0:4: at least 1 rank is needed."),
        ("two", "--ranks two is no number of ranks; give N, or MIN:MAX such as 6:8."),
        ("2:", "is no number of ranks"),
        ("-1", "is no number of ranks"),
    ],
)
def test_what_is_no_number_of_ranks(text, words):
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert words in str(caught.value)


def test_more_ranks_than_slots_are_refused_before_anything_starts():
    hosts = [Host(name, name, slots, False) for name, slots in (("a", 2), ("b", 1))]
    check_slots(Ranks(2, 3), hosts, None)
    with pytest.raises(ValueError, match="--ranks 2:4: the hosts have a place for 3 ranks; lower it, or give hosts more slots=N"):
        check_slots(Ranks(2, 4), hosts, None)
    check_slots(Ranks(2, 4), [Host("a", "a", None, False)], None)  # its GPUs are not known yet


def test_more_ranks_than_gpus_are_refused():
    assert chosen(None, 3, "") == (3, 3) and chosen("2:4", 3, "") == (2, 4)
    with pytest.raises(ValueError, match="--ranks 4: the cluster has a place for 3 ranks, each with a GPU of its own; lower it, or"):
        chosen("4", 3, " and a GPU")
    with pytest.raises(ValueError, match="--ranks 4:6: the cluster has a place for 1 rank, each with its share of the processors"):
        chosen("4:6", 1, "")


def node(name, alive=True, **resources):
    return {
        "NodeID": name,
        "NodeManagerHostname": name,
        "Alive": alive,
        "Resources": resources,
        "NodeManagerAddress": "",
        "NodeManagerPort": 0,
    }


def test_places_are_counted_by_node():
    nodes = [node("a", CPU=8.0, GPU=2.0), node("b", CPU=8.0), node("c", CPU=1.0, GPU=8.0)]
    assert places(nodes, {"CPU": 2.0, "GPU": 1}) == {"a": 2, "b": 0, "c": 0}
    assert places([node("a", CPU=2.0)], {"CPU": 0.6666}) == {"a": 3}
    assert places([node("a", CPU=0.3)], {"CPU": 0.1}) == {"a": 3}  # which is 2.99... in floating point
    assert places(nodes, {"CPU": 1.0}, {"a": {"CPU": 3.0}}) == {"a": 3, "b": 0, "c": 0}
    assert lost([node("a", alive=False), node("b", alive=False), node("a")]) == ["b"]


def test_a_node_answers_where_something_listens():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()[:2]
        assert answers_at(address)
    assert not answers_at(address)


def everything(nodes):
    return {one["NodeID"]: one["Resources"] for one in nodes}


@pytest.fixture
def cluster(monkeypatch):
    """Nodes of a cluster that does not exist, of which some may be draining or gone without a word."""
    there = SimpleNamespace(nodes=[], leaving=set(), silent=set(), free={}, said=[])
    monkeypatch.setattr(elastic.ray, "nodes", lambda: there.nodes)
    monkeypatch.setattr(elastic, "draining", lambda: there.leaving)
    monkeypatch.setattr(elastic, "reached", lambda nodes: [one for one in nodes if one["NodeID"] not in there.silent])
    monkeypatch.setattr(elastic, "told", there.said.append)
    monkeypatch.setattr(elastic.ray._private.state.state, "available_resources_per_node", lambda: there.free or everything(there.nodes))
    monkeypatch.setattr(elastic.time, "sleep", lambda seconds: None)
    return there


def policy(folder, ranks, wait=600.0):
    made = Places(ScalingConfig(num_workers=ranks.most, resources_per_worker={"CPU": 1}), ranks, str(folder), wait, autoscaled=False)
    made.after_controller_start(None)
    return made


def group(*names):
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=name)) for name in names]
    return SimpleNamespace(workers=workers, num_workers=len(workers))


def count_of(made):
    return getattr(made.make_decision_for_non_running_worker_group(), "num_workers", None)


def test_a_start_takes_the_ranks_that_have_a_place(cluster, tmp_path):
    cluster.nodes = [node(name, CPU=1.0) for name in "abc"]
    made = policy(tmp_path, Ranks(2, 3))
    assert count_of(made) == 3
    made.make_decision_for_running_worker_group(group("a", "b", "c"), None)
    cluster.silent = {"c"}  # cut off, and Ray does not know yet
    assert count_of(made) == 2 and cluster.said == ["there is a place for 2 of at most 3 ranks"]
    made.make_decision_for_running_worker_group(group("a", "b"), None)
    cluster.leaving = {"b"}
    assert count_of(made) is None and "waiting up to 10 min for hosts: there is a place for 1 of 2 ranks" in cluster.said[-1]
    assert count_of(made) is None and len(cluster.said) == 2


def test_places_that_others_have_do_not_count_a_second_time(cluster, tmp_path):
    cluster.nodes = [node(name, CPU=1.0) for name in "abc"]
    cluster.free = {"a": {"CPU": 1.0}, "b": {"CPU": 1.0}, "c": {"CPU": 0.0}}
    made = policy(tmp_path, Ranks(2, 3))
    assert [count_of(made), count_of(made)] == [3, 2]


def test_it_can_be_asked_to_stop_while_it_waits(cluster, tmp_path):
    made = policy(tmp_path, Ranks(2, 2))
    assert count_of(made) is None
    (tmp_path / "stop").touch()
    with pytest.raises(AskedToStopError, match="stopped while the ranks waited for hosts: the same command continues"):
        count_of(made)
    assert not (tmp_path / "stop").exists()


def test_it_gives_up_in_the_end(cluster, tmp_path):
    cluster.nodes = [node("a", CPU=1.0), node("b", alive=False, CPU=1.0)]
    made = policy(tmp_path, Ranks(2, 2), wait=0.0)
    assert count_of(made) is None
    with pytest.raises(GivingUpError, match=r"there is a place for 1 of 2 ranks; without b, .* when it is back, or go on .* --ranks 1"):
        count_of(made)


def test_ranks_are_asked_to_start_anew_once_a_host_is_back_for_good(cluster, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(elastic.time, "monotonic", lambda: now[0])
    cluster.nodes = [node("a", CPU=1.0), node("b", CPU=1.0)]
    cluster.free = {"a": {}, "b": {}, "c": {"CPU": 1.0}}
    made = policy(tmp_path, Ranks(2, 3))
    for second, is_there in ((0, False), (3, True), (6, False), (9, True), (12, True), (16, True)):
        now[0] = second
        cluster.nodes[2:] = [node("c", CPU=1.0)] if is_there else []
        assert not (tmp_path / "regroup").exists()
        made.make_decision_for_running_worker_group(group("a", "b"), None)
    assert (tmp_path / "regroup").read_text() == "there is a place for more ranks than 2\n" and len(cluster.said) == 1
    now[0] = 60
    made.make_decision_for_running_worker_group(group("a", "b"), None)
    assert len(cluster.said) == 1  # they will
    (tmp_path / "regroup").unlink()  # by ranks that have just started, for which it came too early
    now[0] = 63
    made.make_decision_for_running_worker_group(group("a", "b"), None)
    assert (tmp_path / "regroup").exists() and len(cluster.said) == 2


def test_places_of_other_jobs_ask_for_nothing(cluster, tmp_path, monkeypatch):
    """On a cluster that jobs share; nor do those of a host that is cut off."""
    now = [0.0]
    monkeypatch.setattr(elastic.time, "monotonic", lambda: now[0])
    cluster.nodes = [node(name, CPU=2.0) for name in "ab"]
    cluster.free = {"a": {"CPU": 0.0}, "b": {"CPU": 0.0}}
    made = policy(tmp_path, Ranks(1, 4))
    for now[0] in range(0, 60, 5):
        made.make_decision_for_running_worker_group(group("a", "b"), None)
        assert not (tmp_path / "regroup").exists()
    assert count_of(made) == 2  # with what the ranks themselves have held
    made.make_decision_for_running_worker_group(group("a", "b"), None)
    cluster.free, cluster.silent = {"a": {"CPU": 0.0}, "b": {"CPU": 1.0}}, {"b"}
    for now[0] in range(100, 160, 5):
        made.make_decision_for_running_worker_group(group("a", "b"), None)
        assert not (tmp_path / "regroup").exists()
    cluster.silent = set()
    for now[0] in range(200, 220, 5):
        made.make_decision_for_running_worker_group(group("a", "b"), None)
    assert (tmp_path / "regroup").exists() and count_of(made) == 3


def test_ranks_leave_a_host_that_is_to_be_taken_away(cluster, tmp_path):
    cluster.nodes = [node(name, CPU=1.0) for name in "abc"]
    cluster.leaving = {"c"}
    made = policy(tmp_path, Ranks(2, 2))
    made.make_decision_for_running_worker_group(group("a", "b"), None)
    assert not (tmp_path / "regroup").exists()
    made.looked = -60.0
    made.make_decision_for_running_worker_group(group("b", "c"), None)
    assert (tmp_path / "regroup").read_text() == "c is to be taken away\n"


class StubNode:
    """A host that may be away."""

    def __init__(self, is_there, why=""):
        self.is_there, self.why, self.left, self.sent = is_there, why, False, []

    def has_left(self):
        return self.left

    def expect(self, event, deadline):
        if not self.is_there():
            raise ValueError(self.why)
        return {"event": event}

    def send(self, order):
        self.sent.append(order)

    def close(self):
        self.left = True

    def wait(self, deadline):
        pass


def test_a_lost_host_is_tried_until_it_is_back(caplog):
    back, said, tries = threading.Event(), [], []
    nodes = [StubNode(lambda: True), StubNode(lambda: True)]

    def begin(place):
        tries.append(place)
        if len(tries) > 2 and not back.is_set():
            raise ValueError("the disk is full")
        return StubNode(back.is_set, f"no answer within {len(tries)} s")

    returns = Returns(nodes, ["a", "b"], [{}, {"head": "x"}], begin, said.append, retry=0.01)
    returns.check()
    nodes[1].left = True
    deadline = time.monotonic() + 60
    while len(tries) < 4:
        returns.check()
        assert time.monotonic() < deadline
    back.set()
    while nodes[1].left:
        returns.check()
        assert time.monotonic() < deadline
    assert nodes[1].sent == [{"head": "x"}] and {*tries} == {1}
    while not said[-1].startswith("host b is back"):
        assert time.monotonic() < deadline
    assert said[0] == "host b was lost: trying every 0.01 s to reach it" and said[-1].startswith("host b is back in the cluster after")
    assert said[1:-1] == ["host b is not back yet: no answer within 1 s", "host b is not back yet: the disk is full"]
    nodes[0].left = True
    with pytest.raises(RuntimeError, match="Host a, the head of the Ray cluster, was lost, and the job with it: the same"):
        returns.check()
    returns.close()


@pytest.mark.parametrize("where", ["folder", "store"])
def test_what_a_job_has_saved_is_known_wherever_it_is(tmp_path, where):
    """A checkpoint of the same name is another one after --resume none has begun the run anew."""
    place = str(tmp_path / "checkpoints") if where == "folder" else f"memory://{tmp_path.name}/checkpoints"
    assert checkpoints(place) == set()
    checkpoint.save(place, 10, {"x": checkpoint.whole(torch.zeros(3))}, {"run": "first"})
    first = checkpoints(place)
    assert {name for name, _ in first} == {"step-00000010"} == {name for name, _ in checkpoints(place)}
    checkpoint.store_of(place).remove("step-00000010")
    checkpoint.save(place, 10, {"x": checkpoint.whole(torch.ones(3))}, {"run": "second"})
    assert len(checkpoints(place) - first) == 1


def test_a_cluster_takes_back_a_host_that_was_lost(tmp_path, monkeypatch, capsys):
    """In place of Python on the hosts: a node that says what is expected of it, and ends when the file `lost` is there."""
    program = tmp_path / "python"
    says = [f"printf 'ray-node {json.dumps(event)}\\n' $$" for event in (HELLO, READY)]
    watch = f'while read -r line; do if [ "$role" = b ] && [ -e {tmp_path}/lost ]; then rm {tmp_path}/lost; exit; fi; done'
    order = """while read -r order; do case "$order" in *head*) break;; esac; done"""  # signs of life may come before it
    roles = """case "$order" in *'"head": null'*) role=a;; *) role=b;; esac"""
    program.write_text(f'#!/bin/sh\n{says[0]}\n{order}\n{roles}\necho "$order" >> {tmp_path}/orders\n{says[1]}\n{watch}\n')
    program.chmod(0o755)
    monkeypatch.setattr("launch.returns.RETRY", 0.1)
    monkeypatch.setattr(clusters, "BEAT_SECONDS", 0.05)
    hosts = [Host(name, name, 1, True) for name in "ab"]
    with clusters.started(hosts, root="/", python=str(program), ranks_per_node=None) as running:
        running.check()
        (tmp_path / "lost").touch()
        deadline = time.monotonic() + 60
        while len((tmp_path / "orders").read_text().splitlines()) < 3:
            running.check()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    orders = [json.loads(line) for line in (tmp_path / "orders").read_text().splitlines()]
    assert [order["head"] for order in orders] == [None, "h:1", "h:1"] and orders[1] == orders[2]
    assert "host b was lost: trying every" in capsys.readouterr().err
