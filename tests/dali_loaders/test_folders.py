"""A folder: every file in it is an image, or passed over with a reason, or the folder is refused; names of any bytes keep apart."""

from __future__ import annotations

import errno
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from pictures import picture

from dali_loaders import open_source, pack
from dali_loaders.account import ReadError
from dali_loaders.identities import checksum
from dali_loaders.names import Names, printable
from dali_loaders.sources import FolderSource, TarSource, walk


def reasons(source) -> dict[str, int]:
    account = source.account
    assert account.seen == account.used + sum(passed.count for passed in account.passed_over.values()) and account.used == len(source)
    return {reason: passed.count for reason, passed in account.passed_over.items()}


def put(path: Path, data: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data or picture(1))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_folders_that_cannot_be_listed_stop_the_opening(folder, monkeypatch, number):
    scandir = os.scandir

    def refuse(path):
        if os.fsdecode(path).endswith(("person02", "person04")):
            raise OSError(number, os.strerror(number), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(
        ValueError, match=rf"2 folder\(s\) of \S+set cannot be listed, the first is \S+person02 \({os.strerror(number).lower()}"
    ):
        FolderSource(str(folder))


class Breaking:
    """A listing that ends in an error, as of a disk that fails."""

    def __init__(self, listing, after: int) -> None:
        self.listing, self.after = listing, after

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listing.close()

    def __iter__(self):
        for count, entry in enumerate(self.listing):
            if count == self.after:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            yield entry


def test_a_listing_that_breaks_in_the_middle_stops_the_opening(folder, monkeypatch):
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Breaking(scandir(path), 2 if os.fsdecode(path).endswith("person03") else 1 << 30))
    with pytest.raises(ValueError, match=r"1 folder\(s\) .* the first is \S+person03 \(input/output error\)"):
        FolderSource(str(folder))


def test_a_link_that_cannot_be_looked_at_stops_the_opening(folder, monkeypatch):
    (folder / "person00" / "link.jpg").symlink_to("01.jpg")
    stat = os.stat

    def refuse(path, **options):
        if os.fsdecode(path).endswith("link.jpg"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(ValueError, match=r"the first is \S+person00 \(permission denied\)"):
        FolderSource(str(folder))


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")
def test_as_another_user(folder):
    """Permissions do not stop root."""
    program = (
        "import os, sys\nfrom dali_loaders.sources import FolderSource\nos.setuid(65534)\nsource = FolderSource(sys.argv[1])\n"
        "print(list(source.account.passed_over))\ntry:\n    source.read(4)\nexcept ValueError as error:\n    print(error)\n"
    )
    with tempfile.TemporaryDirectory() as public:  # pytest's own folders are closed to others
        os.chmod(public, 0o755)
        path = Path(shutil.copytree(folder, Path(public) / "set"))
        (path / "person01" / "00.jpg").chmod(0)
        (path / ".trash").mkdir(mode=0)
        run = partial(
            subprocess.run, [sys.executable, "-c", program, str(path)], env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True
        )
        done = run(text=True, check=False)
        assert done.stdout.splitlines() == ["['in a hidden folder that cannot be listed']", "permission denied"], done.stderr
        (path / "person02").chmod(0)
        done = run(text=True, check=False)
        assert "1 folder(s) of" in done.stderr and "person02 (permission denied)" in done.stderr


def test_links_pipes_sockets_and_folders_that_are_named_like_images(folder):
    at = folder / "person00"
    (at / "nowhere.jpg").symlink_to("missing.jpg")
    (at / "circle.jpg").symlink_to("circle.jpg")
    (at / "below.jpg").symlink_to("00.jpg/x")
    (at / "good.jpg").symlink_to("../person01/01.jpg")
    os.mkfifo(at / "pipe.jpg")
    (at / "to_pipe.jpg").symlink_to("pipe.jpg")
    (folder / "album.jpg").mkdir()
    put(folder / "album.jpg" / "1.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(at)  # the path of a socket must be short
        server.bind("socket.jpg")
        os.chdir(here)
        source = FolderSource(str(folder))
    assert reasons(source) == {"symbolic link that leads nowhere": 3, "no regular file": 3}
    assert "album.jpg" in source.identities and len(source) == 26
    assert source.read([source.name(index) for index in range(26)].index(str(at / "good.jpg"))) == picture(5)


def test_links_that_may_be_folders_of_identities(folder):
    """As of a disk that is not mounted: their identities would be missing."""
    for name in ("person90", "person91", ".cache", "notes.txt", "person00/x.jpg"):
        (folder / name).symlink_to("/none/such")
    with pytest.raises(
        ValueError, match=r"2 symbolic link\(s\) of \S+ lead nowhere and may be folders of identities, the first is person90:"
    ):
        FolderSource(str(folder))
    for name in ("person90", "person91"):
        (folder / name).unlink()
    assert reasons(FolderSource(str(folder))) == {"symbolic link that leads nowhere": 3}


def test_folders_that_link_to_each_other_are_listed_in_little_time(tmp_path):
    """12 folders, each with links to the other 11, have over 10**8 paths without a circle."""
    for name in "abcdefghijkl":
        put(tmp_path / name / "1.jpg")
        for other in set("abcdefghijkl") - {name}:
            (tmp_path / name / other).symlink_to(f"../{other}")
    source = FolderSource(str(tmp_path))
    assert len(source) == 12 * 12 and source.identities[:3] == ["a", "a/b", "a/c"]
    assert reasons(source) == {
        "symbolic link to a folder that has other names": 12 * 11 * 10,
        "symbolic link to a folder that holds it": 132,
    }


def test_a_file_that_vanishes_or_turns_into_a_pipe(folder):
    source = FolderSource(str(folder))
    (folder / "person00" / "01.jpg").unlink()
    (folder / "person00" / "02.jpg").unlink()
    os.mkfifo(folder / "person00" / "02.jpg")
    with pytest.raises(ReadError, match=r"^vanished$"):
        source.read(1)
    with pytest.raises(ReadError, match=r"^is a named pipe, not a file$"):  # and does not wait for a writer
        source.read(2)


GBK = "\u5f20\u4e09".encode("gbk")


def test_names_that_are_not_utf_8_are_the_same_in_every_form(tmp_path):
    folders = [GBK, b"a", "e\u0301".encode(), "\u00e9".encode(), b"two\nlines", b"tab\tbed", b"Anna", b"anna", "\ue000".encode(), b"\xff"]
    with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        for number, name in enumerate(folders):
            put(Path(os.fsdecode(os.fsencode(tmp_path / "set") + b"/" + name + b"/1.jpg")), picture(number))
            info = tarfile.TarInfo(name.decode(errors="surrogateescape") + "/1.jpg")
            info.size = len(picture(number))
            tar.addfile(info, io.BytesIO(picture(number)))
    source, tar_source = FolderSource(str(tmp_path / "set")), TarSource(str(tmp_path / "set.tar"))
    pack(source, str(tmp_path / "set.rec"))
    record_source = open_source(str(tmp_path / "set.rec"))
    assert [name.encode(errors="surrogateescape") for name in source.identities] == sorted(folders)
    assert source.identities == tar_source.identities == record_source.identities
    assert checksum(source.identities) == checksum(tar_source.identities) == checksum(record_source.identities)
    for index in range(len(folders)):
        assert source.read(index) == tar_source.read(index) == record_source.read(index) == picture(folders.index(sorted(folders)[index]))
        for name in (source.name(index), tar_source.name(index)):
            assert name.isprintable() and name.encode()
    assert tar_source.name(0) == "set.tar:Anna/1.jpg"


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX"])
def test_names_do_not_depend_on_the_locale(tmp_path, locale):
    put(Path(os.fsdecode(os.fsencode(tmp_path / "set") + b"/" + GBK + b"/1.jpg")))
    program = (
        "import sys\nfrom dali_loaders.sources import FolderSource\nsource = FolderSource(sys.argv[1])\n"
        "print(ascii(source.identities), source.name(0)[-14:])"
    )
    environment = {**os.environ, "LC_ALL": locale, "PYTHONPATH": os.getcwd(), "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "set")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout == "['\\udcd5\\udcc5\\udcc8\\udcfd'] \\xc8\\xfd/1.jpg\n", done.stderr


def test_printable_names():
    assert printable(b"\xd5\xc5 a\n\t\x1b") == "\\xd5\\xc5 a\\n\\t\\x1b"
    assert printable("\udcd5/\u5f20\u200b.jpg") == "\\xd5/\u5f20\\u200b.jpg"
    names = Names.of([b"", b"a", b"bc", b""])
    assert list(names) == [names[0], names[1], names[2], names[3]] == [b"", b"a", b"bc", b""] and len(names) == 4
    assert list(Names.of([])) == []


HEIC, AVIF = b"\0\0\0\x18ftypheic" + bytes(20), b"\0\0\0\x1cftypavif" + bytes(20)


def test_what_is_an_image_by_its_content_is_read_whatever_its_name(tmp_path):
    image = cv2.imdecode(np.frombuffer(picture(1), np.uint8), cv2.IMREAD_COLOR)
    for extension in (".jpg", ".png", ".webp", ".bmp", ".tif", ".ppm", ".pgm"):
        data = cv2.imencode(extension, image if extension != ".pgm" else image[..., 0])[1].tobytes()
        for name in ("noextension", "a.txt", "a.dat", "1234.5678"):
            put(tmp_path / f"of{extension}" / name, data)
    for name in ("1.jfif", "2.JPE", "3.gif", "4.pnm"):
        put(tmp_path / "known" / name, b"believed")
    put(tmp_path / "gif" / "animation", b"GIF89a" + bytes(30))
    assert len(FolderSource(str(tmp_path))) == 7 * 4 + 4 + 1


def test_what_is_passed_over_has_a_reason(folder):
    at = folder / "person00"
    for name, data in {
        "n.txt": b"BMW is a brand of cars, and P6 is none",
        "n": b"x",
        "v.mp4": b"\0\0\0\x18ftypmp42",
        "a.jpg.bak": b"x",
    }.items():
        put(at / name, data)
    put(at / "1.heic", HEIC)
    put(at / "1.avif", AVIF)
    for name in (".x.jpg", "._00.jpg", "Thumbs.db", "@eaDir/00.jpg/SYNO.jpg", ".cache/1.jpg", "__MACOSX/._1.jpg", "..."):
        put(at / name)
    put(folder / "__MACOSX" / "person00" / "x.jpg")
    put(folder / "only_text" / "a.txt", b"text")
    (folder / "empty").mkdir()
    (folder / "empty_below" / "one").mkdir(parents=True)
    put(folder / "README.md", b"about")
    source = FolderSource(str(folder))
    assert reasons(source) == {
        "no image by its content (.txt)": 2,
        "no image by its content (no extension)": 1,
        "no image by its content (.mp4)": 1,
        "no image by its content (.bak)": 1,
        "no image by its content (.md)": 1,
        "HEIC image, which is not decoded; convert it to JPEG": 1,
        "AVIF image, which is not decoded; convert it to JPEG": 1,
        "hidden file": 2,
        "macOS metadata (._ file)": 1,
        "Windows metadata": 1,
        "thumbnail of a NAS (@eaDir)": 1,
        "in a hidden folder": 1,
        "macOS metadata (__MACOSX)": 2,
        "identity folder without an image": 3,
    }
    assert source.account.passed_over["identity folder without an image"].examples == ["empty", "empty_below/one", "only_text"]
    assert len(source) == 24 and len(source.identities) == 6


def test_files_that_are_images_by_name_are_not_looked_at(folder, monkeypatch):
    monkeypatch.setattr(FolderSource, "_head", lambda *_: pytest.fail("a file was opened"))
    assert len(FolderSource(str(folder))) == 24


def test_images_outside_of_identity_folders_are_counted(folder):
    put(folder / "b.jpg")
    put(folder / "a.jpg")
    with pytest.raises(ValueError, match=r"set holds a\.jpg outside any identity folder, and 1 more; expected IDENTITY"):
        FolderSource(str(folder))


def test_one_order_of_walking(tmp_path):
    """Real folders first, then links, each in the order of names: what is found does not depend on the file system."""
    for name in ("b/x", "a/y", "a/c/z"):
        put(tmp_path / name, b"x")
    (tmp_path / "link").symlink_to("a")
    found = [entry.name for entry in walk.walk(walk.FileSystem(), os.path.realpath(os.fsencode(tmp_path)))]
    assert found == [b"", b"a", b"a/y", b"a/c", b"a/c/z", b"b", b"b/x", b"link", b"link/y", b"link/c", b"link/c/z"]


def test_the_checksum_of_the_order(folder, tar):
    """It tells two orders apart, and knows no path."""
    source = FolderSource(str(folder))
    assert (
        source.order_checksum()
        == TarSource(str(tar)).order_checksum()
        == FolderSource(str(shutil.copytree(folder, folder.with_name("copy")))).order_checksum()
    )
    assert Names.of([b"ab", b"c"]).checksum() != Names.of([b"a", b"bc"]).checksum()
    (folder / "person00" / "00.jpg").rename(folder / "person00" / "0.jpg")
    assert FolderSource(str(folder)).order_checksum() != source.order_checksum()
