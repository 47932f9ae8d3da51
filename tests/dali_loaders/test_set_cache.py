"""A cache is used for the files it was made of and no others; a damaged one, or none at all, costs time only."""

import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dali_loaders import set_cache
from dali_loaders.set_cache import cached

ARRAYS = {"a": np.arange(1000), "b": np.array([1.5, 2.5], np.float32), "none": np.zeros(0, np.int64)}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(set_cache, "SMALLEST", 1)
    monkeypatch.setattr(set_cache.tempfile, "tempdir", str(tmp_path.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture
def sources(tmp_path) -> list[str]:
    """Two files of yesterday and one that is missing."""
    for name in ("a.rec", "a.idx"):
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, ns=(1, 1_700_000_000_123_456_789))
    return [str(tmp_path / name) for name in ("a.rec", "a.idx", "a.identities.txt")]


class Opening:
    """Opens a set and counts how often it was really read."""

    def __init__(self, sources: list[str]) -> None:
        self.sources, self.built = sources, 0

    def build(self) -> dict:
        self.built += 1
        return {name: iter(np.array_split(array, 3)) for name, array in ARRAYS.items()}

    def __call__(self, kind: str = "test 1") -> None:
        arrays = cached(self.sources[0], self.sources, kind, self.build)
        assert arrays.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            assert np.array_equal(arrays[name], array) and arrays[name].dtype == array.dtype and arrays[name].flags.writeable


def test_the_second_opening_reads_nothing(sources, tmp_path):
    opening = Opening(sources)
    for _ in range(3):
        opening()
    assert opening.built == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.idx", "a.rec", "a.rec.cache"]


@pytest.mark.parametrize("change", ["size", "time", "head", "tail", "replaced", "appears", "kind"])
def test_another_source_is_read_again(sources, change, monkeypatch):
    monkeypatch.setattr(set_cache, "_HEAD", 50)
    opening = Opening(sources)
    opening()
    path = Path(sources[1])
    times = (1, path.stat().st_mtime_ns)
    if change == "appears":
        Path(sources[2]).write_bytes(b"")
        os.utime(sources[2], ns=times)
    elif change == "time":
        os.utime(path, ns=(1, times[1] + 1))
    elif change == "replaced":
        path.with_suffix(".new").write_bytes(b"x" * 99 + b"y")
        os.utime(path.with_suffix(".new"), ns=times)
        path.with_suffix(".new").replace(path)
    elif change != "kind":
        path.write_bytes({"size": b"x" * 101, "head": b"y" * 100, "tail": b"x" * 99 + b"y"}[change])
        os.utime(path, ns=times)
    kind = "test 2" if change == "kind" else "test 1"
    opening(kind)
    assert opening.built == 2
    opening(kind)
    assert opening.built == 2


def test_small_sets_and_those_of_the_future_keep_no_file(sources, tmp_path, monkeypatch):
    opening = Opening(sources)
    os.utime(sources[0], ns=(1, 1 << 62))  # a change within the same tick of the clock would not show
    opening()
    opening()
    os.utime(sources[0], ns=(1, 1))
    monkeypatch.setattr(set_cache, "SMALLEST", 1000)
    opening()
    assert opening.built == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.idx", "a.rec"]


def test_a_set_just_written_is_read_once_a_change_would_show(sources, monkeypatch):
    waits = []
    monkeypatch.setattr(set_cache.time, "sleep", waits.append)
    opening = Opening(sources)
    os.utime(sources[0])
    opening()
    opening()
    assert opening.built == 1 and len(waits) == 1 and 0 < waits[0] <= 2


def test_files_beside_the_cache(sources, tmp_path, monkeypatch):
    """No lock stays, nothing lies in a folder called ~, and who may not read the set may not read its cache."""
    os.chmod(sources[0], 0o640)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(set_cache.os.path, "expanduser", lambda path: path)  # of a user without a home
    monkeypatch.chdir(tmp_path)
    Opening(sources)()
    assert os.stat(f"{sources[0]}.cache").st_mode & 0o777 == 0o640
    assert not list(tmp_path.parent.glob("protoshard-*.lock"))
    assert set_cache._places("a.rec") == ["a.rec.cache"]


def test_a_lock_that_was_removed_is_no_lock(tmp_path):
    """Of processes that wait for each other only one goes on at a time, though each removes the file of the lock."""
    inside, most = [], []

    def enter(_: int) -> None:
        with set_cache.alone_on_this_host(str(tmp_path)):
            inside.append(1)
            most.append(len(inside))
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(200)))
    assert max(most) == 1 and not list(tmp_path.parent.glob("protoshard-*.lock"))


def test_a_full_disk_has_no_place_for_a_lock(sources, monkeypatch):
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(set_cache.tempfile, "gettempdir", none)
    Opening(sources)()


def test_a_source_that_changes_while_it_is_read_is_not_kept(sources, tmp_path):
    opening = Opening(sources)
    build = opening.build

    def change_and_build():
        os.utime(sources[0], ns=(1, 5))
        return build()

    opening.build = change_and_build
    opening()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.idx", "a.rec"]


def test_the_users_cache_folder_serves_where_the_sets_cannot_be_written(sources, tmp_path, monkeypatch):
    mkstemp = set_cache.tempfile.mkstemp

    def refuse(dir, **names):
        if dir == str(tmp_path):
            raise PermissionError(13, "Permission denied")
        return mkstemp(dir=dir, **names)

    monkeypatch.setattr(set_cache.tempfile, "mkstemp", refuse)
    opening = Opening(sources)
    opening()
    opening()
    assert opening.built == 1 and len(list((tmp_path / "user" / "protoshard").iterdir())) == 1


def test_a_full_disk_costs_only_time(sources, tmp_path, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    opening = Opening(sources)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # half of what the arrays need
        opening()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert opening.built == 3 and "File too large" in caplog.text  # for both places, and without one
    assert not list((tmp_path / "user" / "protoshard").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.idx", "a.rec", "user"]


def test_arrays_in_use_survive_that_the_cache_is_deleted(sources):
    arrays = cached(sources[0], sources, "test 1", Opening(sources).build)
    os.unlink(f"{sources[0]}.cache")
    assert np.array_equal(arrays["a"], ARRAYS["a"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_cache_is_never_trusted(sources, data):
    opening = Opening(sources)
    opening()
    cache = Path(f"{sources[0]}.cache")
    whole = cache.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    cache.write_bytes(data.draw(st.sampled_from([whole[:at], flipped, whole[at:], b"", whole[:at] + whole[at + 1 :]])))
    opening()  # compares the arrays
