"""Only files are opened: a pipe, a socket or a device in the place of one is refused at once, whatever is to be read."""

import errno
import fcntl
import os
import socket

import pytest
from pictures import write_folder

from dali_loaders import open_source, pack, regular
from dali_loaders.account import ReadError
from dali_loaders.identities import read_identities
from dali_loaders.packing import PackConfig
from dali_loaders.regular import open_regular, read_regular
from dali_loaders.sources import select
from pipeline.evaluation.bin_pairs import read_bin
from pipeline.evaluation.pair_lists import read_list

KINDS = {"named pipe": "pipe", "socket": "socket", "device": "zeros", "folder": "folder"}


@pytest.fixture
def strange(tmp_path, monkeypatch):
    """Paths of things that are no files."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        yield tmp_path


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [open_regular, read_regular, lambda path: open(path, opener=open_regular)])  # noqa: SIM115
def test_what_is_no_file_is_refused_without_waiting(strange, read, kind):
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=f"is a {kind}, not a file") as refused:
        read(str(strange / KINDS[kind]))
    assert refused.value.errno == errno.EINVAL  # and no fault of the machine, which would be tried again and end a run
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.timeout(20)
def test_a_pipe_with_a_writer_is_refused_too(strange):
    writer = os.open(strange / "pipe", os.O_RDWR)
    with pytest.raises(OSError, match="is a named pipe"):
        read_regular(str(strange / "pipe"))
    os.close(writer)


@pytest.mark.parametrize("size", [0, 1, 7000, (1 << 16) + 1])
def test_files_are_read_whole(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    assert read_regular(str(tmp_path / "file")) == read_regular(os.fsencode(tmp_path / "file")) == data
    assert read_regular(str(tmp_path / "file"), 32) == data[:32]
    descriptor = open_regular(str(tmp_path / "file"))
    assert not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_NONBLOCK and not os.get_inheritable(descriptor)
    os.close(descriptor)


def test_files_whose_size_says_little_are_read_whole():
    """Those of /proc have none; so have those of some file systems."""
    assert read_regular("/proc/self/maps").count(b"\n") > 10


def test_a_file_that_claims_too_much_is_not_read(tmp_path):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="is larger than 512 MiB"):
        read_regular(str(tmp_path / "sparse"))


def test_a_file_that_grows_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(regular, "LARGEST", 1 << 20)
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(os, "read", lambda descriptor, size: b"x" * size)
    assert len(read_regular(str(tmp_path / "file"))) <= (1 << 20) + (1 << 16)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_whose_place_something_else_takes(strange, kind):
    path = write_folder(strange / "set", identities=2, images=2)
    source = open_source(str(path))
    name = source.name(1)
    os.unlink(name)
    os.rename(strange / KINDS[kind], name)
    with pytest.raises(ReadError, match=f"^is a {kind}, not a file$"):
        source.read(1)


def pipe_at(path) -> str:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return str(path)


@pytest.mark.timeout(60)
def test_whatever_else_is_read_by_name(tmp_path):
    """Lists, landmarks, names, caches and what a broken-off pack left."""
    source = open_source(str(write_folder(tmp_path / "set", identities=2, images=2)))
    pipe = pipe_at(tmp_path / "pipe")
    for option in ("subset", "exclude"):
        with pytest.raises(ValueError, match=rf"data\.{option}: .*pipe cannot be read \(is a named pipe, not a file\)"):
            select(source, **{option: pipe})
    with pytest.raises(ValueError, match=r"pipe cannot be read as CSV \(is a named pipe, not a file\)"):
        pack(source, str(tmp_path / "out.rec"), PackConfig(landmarks=pipe))
    with pytest.raises(ValueError, match=r"pipe cannot be read as a list of pairs \(is a named pipe, not a file\)"):
        read_list(pipe)
    with pytest.raises(ValueError, match=r"the pair set cannot be opened \(is a named pipe, not a file\)"):
        read_bin(pipe)
    pipe_at(tmp_path / "out.rec.partial")
    with pytest.raises(ValueError, match=r"cannot write \S+out\.rec: Not a directory"):
        pack(source, str(tmp_path / "out.rec"))
    os.unlink(tmp_path / "out.rec.partial")
    pack(source, str(tmp_path / "out.rec"))
    pipe_at(tmp_path / "out.identities.txt")
    with pytest.raises(ValueError, match="is a named pipe, not a file"):
        read_identities(str(tmp_path / "out.rec"))


@pytest.mark.timeout(60)
def test_a_pipe_in_the_place_of_a_cache(tmp_path, monkeypatch):
    from dali_loaders import set_cache

    monkeypatch.setattr(set_cache, "SMALLEST", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    pack(open_source(str(write_folder(tmp_path / "set", identities=2, images=2))), str(tmp_path / "out.rec"))
    pipe_at(tmp_path / "out.rec.cache")
    assert len(open_source(str(tmp_path / "out.rec"))) == 4
