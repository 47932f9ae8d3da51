"""The index of a tar: made once for all ranks of a host, the same as what it was made of, and made again when the tar changes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from tar_sets import images, member

from dali_loaders import set_cache
from dali_loaders.sources import TarSource, tar_index
from dali_loaders.sources.webdataset import ShardedTarSource

LONG_AGO = (1, 1_700_000_000_123_456_789)  # a file of just now is not trusted to keep its time when it changes


@pytest.fixture
def tar(tmp_path, monkeypatch) -> Path:
    """Of two identities, with members that are passed over and a name that is no UTF-8."""
    monkeypatch.setattr(set_cache, "SMALLEST", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    path = tmp_path / "set.tar"
    write(
        path,
        [
            member("a/1.jpg"),
            member(b"\xd5\xc5/2.jpg", b"x" * 700),
            member("a/n.txt", b"text"),
            member("a/l.jpg", b"", type=b"2", linkname="1.jpg"),
        ],
    )
    return path


def write(path: Path, members: list[bytes]) -> None:
    path.write_bytes(b"".join(members) + bytes(1024))
    os.utime(path, ns=LONG_AGO)


def everything(source) -> tuple:
    return images(source), source.identities, source.account, source.labels.tolist()


def test_the_second_opening_reads_the_index(tar, monkeypatch):
    first = TarSource(str(tar))
    monkeypatch.setattr(tar_index, "_build", lambda _: pytest.fail("the headers were read again"))
    second = TarSource(str(tar))
    assert everything(second) == everything(first) == everything(pickle.loads(pickle.dumps(second)))
    assert second.identities == ["a", "\udcd5\udcc5"] and second.account.passed_over["no image by its content (.txt)"].examples == [
        "a/n.txt"
    ]
    second.labels[0] = 1  # as of torch, which wants to own what it gets
    assert TarSource(str(tar)).labels.tolist() == first.labels.tolist()
    assert everything(ShardedTarSource([str(tar)]))[1:] == everything(first)[1:]


def test_a_tar_that_changed_is_read_again(tar):
    first = TarSource(str(tar))
    write(tar, [member("b/1.jpg"), member("c/1.jpg")])
    os.utime(tar, ns=(1, LONG_AGO[1] + 1))
    assert TarSource(str(tar)).identities == ["b", "c"] and first.identities[0] == "a"


def _open(path: str, count: str, identities: multiprocessing.Queue) -> None:
    build = tar_index._build

    def counted(path: str) -> dict:
        time.sleep(0.3)  # all ranks are waiting by now
        with open(count, "a") as file:
            file.write("built\n")
        return build(path)

    tar_index._build = counted
    identities.put(TarSource(path).identities)


def test_one_rank_of_a_host_reads_and_the_others_share(tar, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_open, args=(str(tar), str(tmp_path / "count"), queue)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    assert [queue.get(timeout=60) for _ in ranks] == [["a", "\udcd5\udcc5"]] * 4
    for rank in ranks:
        rank.join()
    assert (tmp_path / "count").read_text() == "built\n"


def many(path: Path, images: int, per_identity: int = 10) -> None:
    """A tar of images of 100 bytes each, which are none."""
    info = tarfile.TarInfo()
    info.size = 100
    with open(path, "wb") as file:
        for number in range(images):
            info.name = f"id{number // per_identity:06}/{number % per_identity:03}.jpg"
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + number.to_bytes(8, "little") + bytes(504))
        file.write(bytes(1024))
    os.utime(path, ns=LONG_AGO)


def test_a_large_tar_is_opened_quickly(tmp_path):
    """Best of several, as others may be using the machine. Measured: 0.09 s, 2 ms, and tarfile 0.6 s."""
    path = tmp_path / "set.tar"
    many(path, 20_000)

    def seconds(action) -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    def first() -> None:
        Path(f"{path}.cache").unlink(missing_ok=True)
        TarSource(str(path))

    best = {
        name: min(seconds(action) for _ in range(3)) for name, action in {"first": first, "again": lambda: TarSource(str(path))}.items()
    }
    with tarfile.open(path) as tar:
        by_tarfile = seconds(tar.getmembers)
    assert best["first"] < by_tarfile / 2 and best["again"] < best["first"] / 5
    source = TarSource(str(path))
    order = np.random.default_rng(0).permutation(len(source))[:50]
    assert [int.from_bytes(bytes(image)[:8], "little") for image in source.read_many(order)] == order.tolist()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_million_images(tmp_path):
    many(tmp_path / "set.tar", 1_000_000)
    program = (
        "import sys, time, dali_loaders\nfrom dali_loaders.sources.tar import TarSource\n"
        "def memory(): return int(open('/proc/self/statm').read().split()[1]) * 4096 / 2**20\n"
        "before, start = memory(), time.perf_counter()\nsource = TarSource(sys.argv[1])\n"
        "print(len(source), time.perf_counter() - start, memory() - before)\n"
    )
    for seconds, mebibytes in ((60, 1000), (1, 150), (1, 150)):
        run = subprocess.run([sys.executable, "-c", program, str(tmp_path / "set.tar")], capture_output=True, text=True, check=True)
        count, took, grew = map(float, run.stdout.split())
        print(run.stdout)
        assert count == 1_000_000 and took < seconds and grew < mebibytes
