"""What ranks look at before they train, and what the driver says of a cluster that it cannot join; no Ray is started."""

from __future__ import annotations

import os

import pytest

from launch import ray_driver, ray_worker
from launch.ray_worker import BadInputError, seen_by_all


def look(folders: list[str]) -> str:
    """Of a rank on a host of its own, whose run folder is its own entry of `folders`."""
    ray_worker.SEEN_SECONDS = 0.5
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    try:
        seen_by_all(folders[int(os.environ["RANK"])])
    except BadInputError as error:
        return str(error)
    finally:
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
    return "seen"


def test_ranks_look_for_the_run_folder_of_rank_0(ranks, tmp_path):
    ours, own = str(tmp_path / "run" / "new"), str(tmp_path / "own")
    assert ranks(2).run(look, [ours, ours]) == ["seen", "seen"]
    said = ranks(2).run(look, [ours, own])
    assert said[0] == said[1] and f"does not see what the first host writes into {ours}; give a run.folder" in said[0]
    assert os.listdir(ours) == [] and not os.path.exists(own)
    (tmp_path / "file").touch()
    no_folder = str(tmp_path / "file" / "run")
    sentence = f"run.folder={no_folder} cannot be written (Not a directory): choose another folder"
    assert ranks(2).run(look, [no_folder, ours]) == [sentence, sentence]
    assert ranks(2).run(look, ["s3://bucket/run", "s3://bucket/run"]) == ["seen", "seen"]


def test_a_cluster_of_another_version_is_bad_input(monkeypatch):
    asked = []

    def init(**named):
        asked.append(named)
        raise RuntimeError(
            "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\nThis process was started with:\n    Ray: 2.60.0\n"
        )

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray_driver.ray, "init", init)
    with pytest.raises(BadInputError, match=r"Version mismatch: .*Ray: 2\.9\.0 .*; start the cluster's nodes from the \.venv of this"):
        ray_driver.join({"NAME": "job"})
    # for actors that would look for a cluster themselves
    assert asked[0]["runtime_env"] == {"env_vars": {"NAME": "job", "RAY_ADDRESS": "10.0.0.1:6379"}}
