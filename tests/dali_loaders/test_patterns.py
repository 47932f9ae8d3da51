"""Patterns stand for the files that a shell would find, and none is left out in silence; what was meant instead is named."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import picture
from tar_sets import member

from dali_loaders.sources import FolderSource, TarSource
from dali_loaders.sources.meant import guess
from dali_loaders.sources.patterns import expand, is_pattern, tars_in


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{000..002}.tar", ["000.tar", "001.tar", "002.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{08..10}", ["08", "09", "10"]),
        ("{a,b}-{1..2}", ["a-1", "a-2", "b-1", "b-2"]),
        ("{a,b{1..2},}x", ["ax", "b1x", "b2x", "x"]),
        ("{a}{b,c}", ["{a}b", "{a}c"]),
        ("{a", ["{a"]),
        ("a}b", ["a}b"]),
    ],
)
def test_braces(tmp_path, pattern, names):
    for name in names:
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/{pattern}") == [f"{tmp_path}/{name}" for name in names]
    assert expand(f"s3://bucket/{pattern}") == [f"s3://bucket/{name}" for name in names]


_PATTERNS = st.recursive(
    st.sampled_from(["", "a", "b1", "{1..3}", "{02..00}", "{9..10}"]),
    lambda inner: (
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"{{{','.join(parts)}}}") | st.lists(inner, max_size=3).map("".join)
    ),
    max_leaves=6,
)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(_PATTERNS)
def test_braces_as_bash_has_them(pattern):
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' s3://x{pattern}y"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert expand(f"s3://x{pattern}y") == shown


def test_globs(tmp_path):
    for name in ("b.tar", "a.tar", "a.tar.cache", "x[1].tar", "c.txt"):
        (tmp_path / name).touch()
    assert [path[len(str(tmp_path)) + 1 :] for path in expand(f"{tmp_path}/*")] == ["a.tar", "b.tar", "c.txt", "x[1].tar"]
    assert expand(f"{tmp_path}/x[1].tar") == [f"{tmp_path}/x[1].tar"] and not is_pattern(f"{tmp_path}/x[1].tar")
    assert is_pattern(f"{tmp_path}/[ab].tar") and len(expand(f"{tmp_path}/[ab].tar")) == 2
    (tmp_path / ".hidden").mkdir()
    assert tars_in(str(tmp_path)) == [f"{tmp_path}/{name}" for name in ("a.tar", "b.tar", "x[1].tar")]
    (tmp_path / "anna").mkdir()
    assert tars_in(str(tmp_path)) == []  # folders of identities, and tars beside them


def test_what_is_missing(tmp_path, caplog):
    for number in (0, 1, 3):
        (tmp_path / f"{number:03}.tar").touch()
        (tmp_path / f"set-{number:03}-of-004.parquet").touch()
    with pytest.raises(ValueError, match=r"2 of the 5 files of \S+ are missing, the first is \S+002\.tar"):
        expand(f"{tmp_path}/{{000..004}}.tar")
    with pytest.raises(ValueError, match=r"none\*\.tar matches no file"):
        expand(f"{tmp_path}/none*.tar")
    with pytest.raises(ValueError, match=r"lacks 1 of 4 files \S+set-N-of-004\.parquet, the first is number 2"):
        expand(f"{tmp_path}/*.parquet")
    assert len(expand(f"{tmp_path}/*.tar")) == 3 and "1 are not there, the first is number 2" in caplog.text
    with pytest.raises(ValueError, match="stands for more than 100,000 files"):
        expand(f"{tmp_path}/{{0..99999999999}}.tar")


MAGIC = {
    "gzip": b"\x1f\x8b\x08",
    "bzip2": b"BZh9",
    "xz": b"\xfd7zXZ\0",
    "zstd": b"\x28\xb5\x2f\xfd",
    "zip": b"PK\x03\x04",
    "7z": b"7z\xbc\xaf\x27\x1c",
}


@pytest.mark.parametrize("form", MAGIC)
def test_compressed_sets(tmp_path, form):
    (tmp_path / "set.tar").write_bytes(MAGIC[form] + bytes(2000))
    with pytest.raises(ValueError, match=rf"set\.tar is not a readable uncompressed \.tar .*{form}.*unpack it with"):
        TarSource(str(tmp_path / "set.tar"))


def test_other_files_than_sets(tmp_path):
    for name in ("train.rec", "train.idx", "train.lst", "property", "train.identities.txt", "b.lst", "pairs.bin", "train.rec.cache"):
        (tmp_path / name).write_bytes(b"x" * 600)
    (tmp_path / "1.jpg").write_bytes(picture(1))
    (tmp_path / "property").write_bytes(b"8,112,112\n")  # shorter than any tar
    for name in ("train.idx", "train.lst", "property", "train.identities.txt", "train.rec.cache"):
        with pytest.raises(ValueError, match=rf"{name} is not a readable uncompressed \.tar .*; it .*: give \S+train\.rec\."):
            TarSource(str(tmp_path / name))
    for name, word in {"b.lst": "im2rec", "pairs.bin": r"evaluation\.pairs", "1.jpg": "one image"}.items():
        with pytest.raises(ValueError, match=rf"{name} is not a readable .*{word}"):
            TarSource(str(tmp_path / name))
    assert guess(str(tmp_path / "trian.rec")) == f"there is {tmp_path}/train.rec: give that if it is meant."
    assert guess(str(tmp_path / "elsewhere" / "train.rec")) == guess(str(tmp_path / "0")) == ""


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (["train.rec", "train.idx", "property"], r"it holds train\.rec: give \S+/train\.rec\."),
        (["a.rec", "b.rec"], r"it holds a\.rec, b\.rec: give \S+/a\.rec,\S+/b\.rec\."),
        (["0.tar", "1.tar", "2.tar", "3.tar"], r"it holds 0\.tar, 1\.tar, 2\.tar and 1 more: give \S+/\*\.tar\."),
        (["x-00000-of-00001.parquet"], r"give \S+/x-00000-of-00001\.parquet\."),
        (["faces.zip"], r"it holds faces\.zip: unpack it first"),
        (["a.tar.gz", "b.tgz"], r"unpack them first"),
        (["lfw.bin"], r"evaluation\.pairs"),
        (["x.txt"], r"expected IDENTITY/IMAGE\.jpg"),
        ([], r"expected IDENTITY/IMAGE\.jpg"),
    ],
)
def test_folders_that_hold_no_images(tmp_path, names, meant):
    for name in names:
        (tmp_path / name).write_bytes(b"nothing that is known")
    with pytest.raises(ValueError, match=rf"holds no images.*; {meant}" if meant.startswith("it") else rf"holds no images.*{meant}"):
        FolderSource(str(tmp_path))


def test_a_tar_of_a_tar(tmp_path):
    (tmp_path / "set.tar").write_bytes(member("inner.tar", member("a/1.jpg")) + bytes(1024))
    with pytest.raises(ValueError, match=r"set\.tar holds no images \(1 no image by its content \(\.tar\), such as inner\.tar\)"):
        TarSource(str(tmp_path / "set.tar"))
