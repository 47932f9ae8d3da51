"""Tars as programs write them: long names, big numbers, sparse members, several archives in a row, cuts and damage at any byte."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import picture
from tar_sets import images, member, needs_tar, signed, unpacked, write

from dali_loaders.account import ChangedError, ReadError
from dali_loaders.sources import FolderSource, TarSource


def opened(tmp_path: Path, *parts: bytes, end: bytes = bytes(1024)) -> TarSource:
    (tmp_path / "set.tar").write_bytes(b"".join(parts) + end)
    return TarSource(str(tmp_path / "set.tar"))


def names(source: TarSource) -> list[str]:
    return [source.name(index).removeprefix("set.tar:") for index in range(len(source))]


@needs_tar
@pytest.mark.parametrize("form", ["v7", "ustar", "oldgnu", "gnu", "posix"])
def test_forms_of_the_program_tar(folder, form):
    if form not in ("v7", "ustar"):
        deep = folder / ("long" * 30) / ("name" * 30)
        deep.mkdir(parents=True)
        (deep / ("image" * 40 + ".jpg")).write_bytes(picture(99))
        os.link(deep / ("image" * 40 + ".jpg"), deep / "linked.jpg")
    tar = folder.with_suffix(".tar")
    subprocess.run(["tar", "-c", "-C", str(folder), "--format", form, "-f", str(tar), "."], check=True)
    assert images(TarSource(str(tar))) == images(FolderSource(str(folder)))


@needs_tar
@pytest.mark.parametrize(
    "form", [["--format=gnu"], *(["--format=posix", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0"))]
)
def test_sparse_members(tmp_path, form):
    (tmp_path / "in" / "a").mkdir(parents=True)
    for number, pieces in {1: 1, 2: 30}.items():  # GNU's header has room for 4 pieces, and continues in further ones
        with open(tmp_path / "in" / "a" / f"{number}.jpg", "wb") as file:
            for piece in range(pieces):
                file.seek(piece * 100_000)
                file.write(picture(number))
            file.truncate(pieces * 100_000)
    (tmp_path / "in" / "a" / "3.jpg").write_bytes(picture(3))
    tar = tmp_path / "set.tar"
    subprocess.run(["tar", "-c", "-S", "-C", str(tmp_path / "in"), *form, "-f", str(tar), "a"], check=True)
    assert tar.stat().st_size < 200_000
    source = TarSource(str(tar))
    assert images(source) == images(FolderSource(str(tmp_path / "in")))
    assert [bytes(image) for image in source.read_many(source.labels + range(3))] == [source.read(index) for index in range(3)]


@needs_tar
def test_archives_in_a_row_are_read_to_the_end(tmp_path):
    one, two = (
        write(tmp_path / "1.tar", [("file", "a/1.jpg", 2)]),
        write(tmp_path / "2.tar", [("file", "b/1.jpg", 3), ("file", "a/1.jpg", 4)]),
    )
    both = tmp_path / "set.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    source = TarSource(str(both))
    assert images(source) == images(FolderSource(str(unpacked(both, "--ignore-zeros")))) and source.identities == ["a", "b"]
    assert source.account.passed_over["replaced by a later member of the same name"].examples == ["a/1.jpg"]
    assert names(opened(tmp_path, member("a/1.jpg"), bytes(512), member("b/1.jpg"))) == ["a/1.jpg", "b/1.jpg"]  # a single block of zeros


@pytest.mark.parametrize("tail", [b"\n", b"x" * 511, b"x" * 512, bytes(512) + b"garbage" * 1000])
def test_what_follows_the_end_and_is_no_archive(tmp_path, tail):
    with pytest.raises(
        ValueError, match=rf"set\.tar is not a readable uncompressed \.tar \({len(tail.lstrip(bytes(1)))} bytes after its end"
    ):
        opened(tmp_path, member("a/1.jpg"), bytes(1024), end=tail)
    assert len(opened(tmp_path, member("a/1.jpg"), bytes(1024), end=bytes(777))) == 1


def test_room_that_was_made_for_a_copy_but_not_filled(tmp_path):
    image = b"\xff\xd8\xff" + bytes(509)
    assert len(opened(tmp_path, member("a/1.jpg", image), end=bytes(1 << 20))) == 1
    with pytest.raises(ValueError, match=rf"is cut off \(all is zero from byte 1024 to its end at {1025 + (1 << 20)}\); copy it again"):
        opened(tmp_path, member("a/1.jpg", image), end=bytes(1 + (1 << 20)))


@pytest.mark.parametrize("step", [31, pytest.param(1, marks=pytest.mark.long)])
def test_a_tar_that_is_cut_at_any_byte(tmp_path, step):
    whole = b"".join(
        [
            member("a/1.jpg", b"x" * 600),
            member("b/" + "n" * 200, form=tarfile.PAX_FORMAT),
            member("c/" + "n" * 200, form=tarfile.GNU_FORMAT),
        ]
    )
    for cut in range(0, len(whole), step):
        with pytest.raises(ValueError, match=r"set\.tar is (cut off \(|not a readable .* \(it is an empty file\))"):
            opened(tmp_path, whole[:cut], end=b"")
    for zeros in range(0, 512, step):
        with pytest.raises(ValueError, match=r"set\.tar is cut off \("):
            opened(tmp_path, whole, end=bytes(zeros))
    assert all(len(opened(tmp_path, member("a/1.jpg"), end=bytes(zeros))) == 1 for zeros in (512, 513, 1023, 1024, 10240))


def test_names_and_numbers_in_all_their_ways(tmp_path):
    big = member("a/big.jpg", b"x" * 5)
    big = signed(big[:124] + b"\x80" + bytes(10) + b"\x05" + big[136:512]) + big[512:]
    spaces = member("a/spaces.jpg", b"x" * 8)
    spaces = signed(spaces[:124] + b"         10 " + spaces[136:512]) + spaces[512:]
    v7 = member("a/v7.jpg", b"x" * 7)
    v7 = signed(v7[:257] + bytes(255)) + v7[512:]
    high = member(b"\xe9/\xff.jpg", b"xx")
    old_sum = (
        high[:148] + b"%06o\0 " % (8 * 32 + sum(byte - 256 if byte > 127 else byte for byte in high[:148] + high[156:512])) + high[156:]
    )
    source = opened(
        tmp_path,
        *(big, spaces, v7, old_sum),
        member("./a//b/./dots.jpg"),
        member("/abs/1.jpg"),
        member("a/../out.jpg"),
        member("x/contiguous.jpg", type=b"7"),
        member("x/unknown.jpg", type=b"Z"),
        member("x/old_folder/", b"", type=b"\0"),
        member("global", b"", tarfile.PAX_FORMAT, pax_headers={"comment": "x"}, type=b"5"),
        member("x/short.jpg", b"12345", tarfile.PAX_FORMAT, pax_headers={"path": "x/\u5f20" + "long" * 50 + ".jpg"}),
        member("volume", b"", type=b"V"),
    )
    assert names(source) == [
        "a/b/dots.jpg",
        "a/big.jpg",
        "a/spaces.jpg",
        "a/v7.jpg",
        "abs/1.jpg",
        "x/contiguous.jpg",
        "x/unknown.jpg",
        "x/\u5f20" + "long" * 50 + ".jpg",
        "\\xe9/\\xff.jpg",
    ]
    assert [len(source.read(index)) for index in range(9)] == [3, 5, 8, 7, 3, 3, 3, 5, 2]
    assert source.identities[-1] == "\udce9"
    assert {reason: passed.examples for reason, passed in source.account.passed_over.items()} == {
        '".." in its name, with which it is not unpacked': ["a/../out.jpg"],
        "identity folder without an image": ["global", "x/old_folder"],
    }


def test_pax_headers_for_all_members_to_come(tmp_path):
    path = b"20 comment=whatever\n"
    whole = member("pax_global", path, type=b"g")
    size = member("pax", b"12 size=600\n", type=b"x") + member("b/1.jpg", b"")[:512] + b"y" * 600 + bytes(424)
    source = opened(tmp_path, whole, member("a/1.jpg"), size)
    assert names(source) == ["a/1.jpg", "b/1.jpg"] and source.read(1) == b"y" * 600


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("no header at byte 1024", [member("a/1.jpg"), b"x" * 512]),
        ("holds a size that is no number", [signed(member("a/1.jpg")[:124] + b"1x" + member("a/1.jpg")[126:512])]),
        ("holds a size that cannot be", [signed(member("a/1.jpg")[:124] + b"\xff" * 12 + member("a/1.jpg")[136:512])]),
        ("the pax header at byte 0 is damaged", [member("p", b"99 path=x\n", type=b"x"), member("a/1.jpg")]),
        ("the header before byte 1024 holds a size", [member("p", b"11 size=-1\n", type=b"x"), member("a/1.jpg")]),
        ("a is a folder and a file at once", [member("a/1.jpg"), member("a")]),
        ("a is a folder and a link at once", [member("a", b"", type=b"2", linkname="b"), member("a/1.jpg")]),
        ("it is one volume of several", [member("a/1.jpg", type=b"M")]),
        ("is sparse in a form that is not GNU tar's", [member("a/1.jpg", type=b"S")]),
        ("it does not begin like a tar", [b"text " * 500]),
    ],
)
def test_damage(tmp_path, what, parts):
    with pytest.raises(
        ValueError, match=rf"set\.tar is not a readable uncompressed \.tar \(.*{what}.*\); .*copied again from its source\."
    ):
        opened(tmp_path, *parts)


def test_links_that_lead_nowhere(tmp_path):
    source = opened(
        tmp_path,
        member("a/1.jpg"),
        member("a/hard.jpg", b"", type=b"1", linkname="a/none.jpg"),
        member("a/1.jpg", b"", type=b"1", linkname="./a/1.jpg"),
        member("a/pipe.jpg", b"", type=b"6"),
        *(
            member(f"a/{number}.png", b"", type=b"2", linkname=target)
            for number, target in enumerate(("none", "/etc/hosts", "../../x", "0.png", "1.jpg/"))
        ),
    )
    assert {reason: passed.count for reason, passed in source.account.passed_over.items()} == {
        "hard link that leads nowhere": 1,
        "hard link to itself": 1,
        "no regular file": 1,
        "symbolic link that leads nowhere": 5,
    }


def test_an_image_is_what_its_content_is(tmp_path):
    source = opened(
        tmp_path, member("a/photo", picture(1)), member("a/n.txt", b"text"), member("b/@eaDir/1.jpg"), member("c/x.dat", picture(2))
    )
    assert names(source) == ["a/photo", "c/x.dat"]
    assert {reason: passed.examples for reason, passed in source.account.passed_over.items()} == {
        "no image by its content (.txt)": ["a/n.txt"],
        "thumbnail of a NAS (@eaDir)": ["b/@eaDir/1.jpg"],
        "identity folder without an image": ["b"],
    }


def test_a_tar_that_changes_while_it_is_read(tmp_path):
    source = opened(tmp_path, member("a/1.jpg", b"1" * 1000), member("b/1.jpg", b"2" * 1000))
    copy = pickle.loads(pickle.dumps(source))
    path = tmp_path / "set.tar"
    os.replace(shutil.copy(path, tmp_path / "new.tar"), path)
    assert source.read(1) == b"2" * 1000  # of the file that it has open
    path.write_bytes(path.read_bytes()[:1024])
    assert source.read(1) == b"2" * 1000
    with pytest.raises(ChangedError, match="changed since this run opened it"):
        pickle.loads(pickle.dumps(copy))
    source = opened(tmp_path, member("a/1.jpg", b"1" * 1000), member("b/1.jpg", b"2" * 1000))
    path.write_bytes(path.read_bytes().replace(b"2", b"3"))
    os.utime(path, ns=(1, 1))
    for read in (source.read, lambda index: source.read_many(source.labels[[index]])):
        with pytest.raises(ChangedError, match="changed since this run opened it"):
            read(1)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "set.tar")
    with pytest.raises(ValueError, match=r"set\.tar: is a named pipe, not a file"):
        TarSource(str(tmp_path / "set.tar"))


def test_a_sparse_member_that_would_fill_the_memory(tmp_path):
    pieces = b"1\n0\n3\n".ljust(512, b"\0") + b"\xff\xd8\xff".ljust(512, b"\0")
    fields = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a/1.jpg", "GNU.sparse.realsize": str(1 << 50)}
    source = opened(tmp_path, member("a/1.jpg", pieces[:515], tarfile.PAX_FORMAT, pax_headers=fields))
    with pytest.raises(ReadError, match="too large"):
        source.read(0)
    assert source.read_many(source.labels)[0].reason == "too large"


def damaged(data: st.DataObject) -> None:
    """A sound tar after some changes: it opens with everything accounted for, or it ends in a sentence, which names the file."""
    kinds = [
        member("a/1.jpg", b"1" * 600),
        member("b/" + "n" * 200 + ".jpg", form=tarfile.PAX_FORMAT),
        member("c/" + "n" * 200 + ".jpg", form=tarfile.GNU_FORMAT),
        member("c/2.jpg", b"", type=b"1", linkname="a/1.jpg"),
        member("d", b"", type=b"2", linkname="a"),
        member("e/x", picture(1)[:100]),
        member("e/x.cls", b"17"),
        member("e/y.json", b'{"label": 3}'),
        bytes(1024),
    ]
    whole = bytearray(b"".join(data.draw(st.lists(st.sampled_from(kinds), max_size=6))) + bytes(1024))
    for _ in range(data.draw(st.integers(0, 4))):
        start = data.draw(st.integers(0, len(whole)))
        what = data.draw(st.sampled_from(["change", "cut", "insert", "number", "sign"]))
        if what == "change":
            whole[start : start + 4] = data.draw(st.binary(max_size=4))
        elif what == "cut":
            del whole[start : start + data.draw(st.sampled_from([1, 512, 1 << 20]))]
        elif what == "insert":
            whole[start:start] = data.draw(st.sampled_from([b"\0", bytes(512), b"x" * 512]))
        else:  # a header with some field changed, whose checksum is right
            at = start // 512 * 512
            field = data.draw(st.sampled_from([0, 100, 124, 130, 156, 157, 257, 345, 482]))
            header = bytearray(whole[at : at + 512].ljust(512, b"\0"))
            new = data.draw(st.binary(min_size=1, max_size=12))
            header[field : field + len(new)] = new
            whole[at : at + 512] = signed(bytes(header[:512]))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "set.tar")
        Path(path).write_bytes(whole)
        try:
            source = TarSource(path)
        except ValueError as error:
            assert path in str(error)
            return
        account = source.account
        assert account.used == len(source) == len(source.labels)
        assert account.seen == account.used + sum(passed.count for passed in account.passed_over.values())
        assert set(source.labels.tolist()) == set(range(len(source.identities)))
        for index in range(len(source)):
            assert source.name(index).isprintable()
            try:
                assert isinstance(source.read(index), bytes)
            except ReadError:
                continue


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_in_any_way(data):
    damaged(data)


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_in_any_way_many_times(data):
    damaged(data)
