"""A job that goes on with fewer ranks when a host is lost, and with more when it is back. On two Ray nodes of this machine with the stub;
on separate hosts (long) with the real trainer."""

import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the launcher needs Ray")
from tests.launch.ray_nodes import Command, steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def taken(folder: Path) -> list[tuple[int, int]]:
    """(step, ranks that took it): the stub's sum over ranks says how many there were."""
    return [(int(line[0]), {1: 1, 3: 2, 6: 3}[round(float(line[1]) / max(1, int(line[0])))]) for line in steps(folder) if int(line[0])]


def test_a_lost_node_is_done_without_and_used_again_when_it_is_back(two_nodes, tmp_path):
    command = ("stub", "--address", two_nodes.head, "--ranks", "1:2", "--set", "steps=10000", "pause=0.05")
    job = Command(tmp_path, *command, env=two_nodes.env)
    try:
        job.until(lambda: len(taken(tmp_path)) > 8)
        two_nodes.kill(1)
        job.until(lambda: [ranks for _, ranks in taken(tmp_path)].count(1) > 8)
        two_nodes.start()
        job.until(lambda: taken(tmp_path)[-1][1] == 2)
        time.sleep(1)
        (tmp_path / "run" / "stop").touch()
    finally:
        code, log = job.wait(), job.said
    assert code == 75, log
    done = taken(tmp_path)
    turns = [number for number in range(1, len(done)) if done[number][1] != done[number - 1][1]]
    assert [done[0][1], *(done[number][1] for number in turns)] == [2, 1, 2], log
    lost, back = turns
    assert done[lost][0] == done[lost - 1][0] // 5 * 5 + 5 * (done[lost - 1][0] % 5 == 4), log  # from the newest checkpoint
    assert done[back][0] == done[back - 1][0] + 1, log  # after a save
    assert "there is a place for 1 of at most 2 ranks" in log and "there is a place for more ranks than 1: the ranks save" in log
    assert log.count("Failure") == 1 and not list((tmp_path / "run").glob("regroup"))
