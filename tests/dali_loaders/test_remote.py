"""Remote sets, at addresses of fsspec's file system in memory, with failures: copied whole or not at all, once per machine."""

import errno
import io
import multiprocessing
import os
import pickle
import threading
import time
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from pictures import picture

from dali_loaders import fetching, open_source, pack, remote
from dali_loaders.account import ReadError
from dali_loaders.fetching import fetch, is_copied
from dali_loaders.remote import is_remote, retried
from dali_loaders.sources.remote_folder import RemoteFolderSource


class Flaky(MemoryFileSystem):
    """Raises the errors of `failures`, one for each call, before it answers."""

    protocol = "flaky"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    failures: list = []  # noqa: RUF012
    asked: list = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.asked.append((path, start, end))
        if self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, bytes):
                return failure
            raise failure
        return super().cat_file(path, start, end, **kwargs)


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """No test waits between tries; the pauses are listed."""
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    Flaky.store.clear(), Flaky.failures.clear(), Flaky.asked.clear()
    return pauses


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def put(files):
    for name, data in files.items():
        Flaky().pipe_file(f"/bucket/{name}", data)


def put_rec(folder):
    rec = str(folder.with_suffix(".rec"))
    pack(open_source(str(folder)), rec)
    put({name: folder.with_name(name).read_bytes() for name in ("set.rec", "set.idx", "set.identities.txt")})
    return "flaky://bucket/set.rec"


def left(cache):
    return sorted(str(path.relative_to(cache)) for path in Path(cache).rglob("*")) if os.path.exists(cache) else []


def test_what_is_remote():
    for address in ("s3://b/a.rec", "gs://b/a", "https://h/a.tar", "memory://a", "filecache::s3://b/a", "abfs+x://a"):
        assert is_remote(address)
    assert (
        is_copied("s3://b/a.rec")
        and is_copied("s3://b/*.parquet#face:id")
        and not is_copied("s3://b/set.v1")
        and not is_copied("s3://b/tar/")
    )
    for path in ("a.rec", "/a://b", "./s3://b", "C:/a.rec", "a,s3://b", ""):
        assert not is_remote(path)


def test_a_record_file_comes_with_what_stands_beside_it(folder, cache):
    path = fetch(put_rec(folder), cache)
    assert os.path.basename(path) == "set.rec"
    a, b = open_source(str(folder)), open_source(path)
    assert a.identities == b.identities and [a.read(index) for index in range(24)] == [b.read(index) for index in range(24)]
    Flaky.asked.clear()
    assert fetch("flaky://bucket/set.rec", cache) == path and not Flaky.asked


def test_an_index_that_is_not_there_is_rebuilt_in_the_copy(folder, cache):
    address = put_rec(folder)
    Flaky().rm("/bucket/set.idx")
    assert len(open_source(fetch(address, cache))) == 24


def test_patterns(cache):
    put({f"s-{number:03}.tar": bytes([number]) * 9 for number in range(3)} | {"other.tar": b"-"})
    for pattern in ("s-*.tar", "s-{000..002}.tar", "s-{002..000}.tar", "s-{000,002,001}.tar"):
        path = Path(fetch(f"flaky://bucket/{pattern}", cache))
        assert path.name == pattern and sorted(os.listdir(path.parent)) == ["s-000.tar", "s-001.tar", "s-002.tar"]
        assert (path.parent / "s-002.tar").read_bytes() == b"\2" * 9
    assert fetch("flaky://bucket/other.tar#image:label", cache).endswith("/other.tar#image:label")
    with pytest.raises(ValueError, match=r"flaky://bucket/s-\{000\.\.003\}\.tar does not exist, or lacks files \(/bucket/s-003\.tar\)"):
        fetch("flaky://bucket/s-{000..003}.tar", cache)
    with pytest.raises(ValueError, match="does not exist, or lacks files"):
        fetch("flaky://bucket/t-*.tar", cache)
    put({"a/x.tar": b"1", "b/x.tar": b"2"})
    path = Path(fetch("flaky://bucket/*/x.tar", cache))
    assert [(path.parent.parent / name / "x.tar").read_bytes() for name in "ab"] == [b"1", b"2"]


def test_large_files_are_copied_in_pieces(cache, monkeypatch):
    monkeypatch.setattr(fetching, "_PIECE", 1000)
    data = os.urandom(12_345)
    put({"a.tar": data})
    assert Path(fetch("flaky://bucket/a.tar", cache)).read_bytes() == data
    assert len(Flaky.asked) == 13


def test_what_passes_is_tried_again_with_growing_pauses(cache, waits):
    put({"a.tar": b"whole"})
    Flaky.failures += [TimeoutError("slow"), b"sho", ConnectionResetError(errno.ECONNRESET, "connection reset")]
    assert Path(fetch("flaky://bucket/a.tar", cache)).read_bytes() == b"whole"
    assert len(waits) == 3 and all(0.25 * 2**place <= pause <= 0.75 * 2**place for place, pause in enumerate(waits))


@pytest.mark.parametrize(
    ("failures", "says", "pauses"),
    [
        ([TimeoutError("slow")] * 4, r"cannot be read \(slow, 4 times\); check the connection", 3),
        ([b"short"] * 4, r"cannot be read \(a\.tar gave 5 bytes where 9 were asked for, 4 times\)", 3),
        ([RuntimeError("of its own kind")] * 4, r"cannot be read \(of its own kind, 4 times\)", 3),
        ([PermissionError("403")], r"may not be read \(403\); check the credentials", 0),
        ([FileNotFoundError("a.tar")], "does not exist, or lacks files", 0),
    ],
)
def test_what_stays_ends_in_a_sentence_and_leaves_nothing(failures, says, pauses, cache, waits):
    put({"a.tar": b"the whole"})
    Flaky.failures += failures
    with pytest.raises(ValueError, match="flaky://bucket/a.tar " + says):
        fetch("flaky://bucket/a.tar", cache)
    assert len(waits) == pauses and left(cache) == []


def _not_found(cause):
    error = FileNotFoundError("a.tar")
    error.__cause__ = cause
    return error


class StatusError(Exception):
    def __init__(self, status):
        super().__init__(f"status {status}")
        self.status = status


@pytest.mark.parametrize(
    ("cause", "pauses"),
    [(OSError("cannot connect"), 3), (StatusError(503), 3), (StatusError(404), 0), (FileNotFoundError(), 0), (ValueError(), 0)],
)
def test_not_found_because_of_the_connection(cause, pauses, cache, waits):
    """As fsspec's HTTP file system tells of a server that does not answer."""
    put({"a.tar": b"the whole"})
    Flaky.failures += [_not_found(cause)] * (pauses + 1)
    with pytest.raises(ValueError, match="cannot be read" if pauses else "does not exist"):
        fetch("flaky://bucket/a.tar", cache)
    assert len(waits) == pauses


def test_a_server_that_does_not_send_parts(cache, monkeypatch):
    class Whole(io.BytesIO):
        def read(self, *_):
            raise ValueError("no ranges")

    put({"a.tar": b"the whole"})
    monkeypatch.setattr(fetching, "_PIECE", 5)
    monkeypatch.setattr(Flaky, "open", lambda *_, **__: Whole())
    with pytest.raises(ValueError, match=r"a\.tar: its server does not send parts of a file \(no ranges\)"):
        fetch("flaky://bucket/a.tar", cache)
    assert not Flaky.asked and left(cache) == []


def test_random_numbers_of_the_user_are_left_alone(waits):
    import random

    random.seed(1)
    state = random.getstate()
    with pytest.raises(OSError):
        retried(lambda: (_ for _ in ()).throw(OSError("no")))
    assert random.getstate() == state


def test_no_cache_folder():
    with pytest.raises(ValueError, match=r"flaky://bucket/a\.tar is remote: set data\.cache to a local folder"):
        fetch("flaky://bucket/a.tar", "")


def test_an_unknown_protocol_and_a_missing_package(cache, monkeypatch):
    with pytest.raises(ValueError, match=r"nothing://a cannot be opened: Protocol not known: nothing\."):
        fetch("nothing://a", cache)
    absent = {"class": "absent_package.System", "err": "Install absent_package to use it"}
    monkeypatch.setitem(known_implementations, "absent", absent)
    with pytest.raises(ValueError, match=r"absent://a cannot be opened: Install absent_package to use it\."):
        fetch("absent://a", cache)


def test_a_newer_version_replaces_the_older_one(cache):
    put({"a.tar": b"old", "b.tar": b"other"})
    other, old = fetch("flaky://bucket/b.tar", cache), fetch("flaky://bucket/a.tar", cache)
    put({"a.tar": b"new"})  # of the same size; the time differs
    new = fetch("flaky://bucket/a.tar", cache)
    assert Path(new).read_bytes() == b"new" and not os.path.exists(old) and os.path.exists(other)


def test_a_copy_of_which_a_part_was_taken_is_made_again(cache):
    put({"a.tar": b"the whole"})
    path = fetch("flaky://bucket/a.tar", cache)
    Path(path).write_bytes(b"the")
    assert fetch("flaky://bucket/a.tar", cache) == path and Path(path).read_bytes() == b"the whole"


def test_a_set_that_changes_while_it_is_copied(cache, monkeypatch):
    put({"a.tar": b"old"})
    copied = fetching._copy
    monkeypatch.setattr(fetching, "_copy", lambda *arguments: (copied(*arguments), put({"a.tar": b"new"})))
    with pytest.raises(ValueError, match="has changed while it was copied"):
        fetch("flaky://bucket/a.tar", cache)
    assert left(cache) == []


def test_a_full_disk(cache, monkeypatch):
    put({"a.tar": bytes(3 << 20)})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(fetching.os, "write", full)
        with pytest.raises(ValueError, match=r"the cache folder .* cannot be written: No space left on device; choose another data\.cache"):
            fetch("flaky://bucket/a.tar", cache)
    assert left(cache) == []
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"has 3 MB to copy, but .* has 1 MB left"):
        fetch("flaky://bucket/a.tar", cache)
    assert left(cache) == []


def test_a_cache_that_is_no_folder(tmp_path):
    put({"a.tar": b"x"})
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"the cache folder .*file cannot be written"):
        fetch("flaky://bucket/a.tar", str(tmp_path / "file"))


def test_an_interrupted_copy_leaves_nothing(cache):
    put({"a.tar": b"x"})
    Flaky.failures.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fetch("flaky://bucket/a.tar", cache)
    assert left(cache) == []


def test_a_killed_copy_goes_on_and_is_never_visible(cache, monkeypatch):
    put({f"{number}.tar": bytes([number]) * 9 for number in range(3)})
    monkeypatch.setattr(fetching.shutil, "rmtree", lambda *_, **__: None)  # a killed process does not clean up
    Flaky.failures += [b"\0" * 9, KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        fetch("flaky://bucket/{0..2}.tar", cache)
    monkeypatch.undo()
    assert [name for name in left(cache) if name.endswith(".tar")] == [f"{left(cache)[0]}/0.tar"] and left(cache)[0].endswith(".part")
    Flaky.asked.clear()
    path = Path(fetch("flaky://bucket/{0..2}.tar", cache))
    assert [asked[0] for asked in Flaky.asked] == ["/bucket/1.tar", "/bucket/2.tar"]
    assert sorted(os.listdir(path.parent)) == ["0.tar", "1.tar", "2.tar"] and len(os.listdir(cache)) == 1


def test_threads_that_fetch_at_once_copy_once(cache, monkeypatch):
    put({"a.tar": b"x"})
    monkeypatch.setattr(remote.time, "sleep", time.sleep)
    started = threading.Barrier(4)
    paths = []

    def run():
        started.wait()
        paths.append(fetch("flaky://bucket/a.tar", cache))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1 and len(Flaky.asked) == 1


def _fetch_file(address, cache, begin, found):
    begin.wait()
    found.put(os.stat(fetch(address, cache)).st_ino)


def test_processes_that_fetch_at_once_copy_once(tmp_path, cache):
    (tmp_path / "a.tar").write_bytes(os.urandom(5 << 20))
    context = multiprocessing.get_context("fork")
    begin, found = context.Barrier(3), context.SimpleQueue()
    processes = [context.Process(target=_fetch_file, args=(f"file://{tmp_path}/a.tar", cache, begin, found)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len({found.get() for _ in processes}) == 1
    assert len(left(cache)) == 2


@pytest.fixture
def images():
    put({f"set/person{n // 4:02}/{n % 4:02}.jpg": picture(n) for n in range(24)} | {"set/README.md": b"about"})


@pytest.mark.parametrize("cached", [False, True])
def test_a_remote_folder_is_the_same_set_as_a_local_one(cached, images, folder, cache):
    a, b = open_source(str(folder)), RemoteFolderSource("flaky://bucket/set/", cache if cached else "")
    assert a.identities == b.identities and a.labels.tolist() == b.labels.tolist()
    assert [a.read(index) for index in range(24)] == [b.read(index) for index in range(24)]
    assert b.name(5) == "flaky://bucket/set/person01/01.jpg"
    assert (b.account.seen, b.account.used) == (25, 24)
    asked = len(Flaky.asked)
    assert pickle.loads(pickle.dumps(b)).read(7) == picture(7)
    assert len(Flaky.asked) == asked + (not cached)


def test_images_that_vanish_change_or_fail(images, waits):
    source = RemoteFolderSource("flaky://bucket/set")
    Flaky().rm("/bucket/set/person00/00.jpg")
    put({"set/person00/01.jpg": picture(1) + b"more"})
    for index, reason in ((0, "vanished"), (1, "changed since it was listed")):
        with pytest.raises(ReadError, match=f"^{reason}$"):
            source.read(index)
    assert not waits
    Flaky.failures += [TimeoutError("slow"), b"short", OSError("reset")]
    assert source.read(2) == picture(2) and len(waits) == 3
    Flaky.failures += [TimeoutError("too slow")] * 4
    with pytest.raises(ReadError, match=r"^too slow$"):
        source.read(2)


def test_an_image_of_another_version_is_asked_for_again(images, cache):
    assert RemoteFolderSource("flaky://bucket/set", cache).read(0) == picture(0)
    newer = picture(0)[:-3] + b"\0\xff\xd9"
    put({"set/person00/00.jpg": newer})
    assert RemoteFolderSource("flaky://bucket/set", cache).read(0) == newer


def test_a_cache_that_cannot_be_written_is_done_without(images, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    source = RemoteFolderSource("flaky://bucket/set", str(tmp_path / "file"))
    assert [source.read(index) for index in range(3)] == [picture(index) for index in range(3)]
    assert caplog.text.count("images are read from flaky://bucket/set again") == 1


def test_a_remote_folder_without_images(images):
    with pytest.raises(ValueError, match="flaky://bucket/none does not exist, is empty or cannot be reached"):
        RemoteFolderSource("flaky://bucket/none")
    with pytest.raises(ValueError, match=r"1\.jpg is one file, and no folder"):
        put({"one/1.jpg": b"1"})
        RemoteFolderSource("flaky://bucket/one/1.jpg")
    put({"hub/train-00000-of-00001.parquet": b""})
    with pytest.raises(ValueError, match=r"holds \.parquet files; name them by a pattern, such as flaky://bucket/hub/\*\.parquet"):
        RemoteFolderSource("flaky://bucket/hub")
