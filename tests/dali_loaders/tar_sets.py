"""Tars made member by member, and unpacked by the program tar, for the tests of this room."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from dali_loaders.sources import Source, TarSource

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
needs_tar = pytest.mark.skipif(shutil.which("tar") is None, reason="needs the program tar")


def content(number: int) -> bytes:
    """Of images, but for 0 and 1."""
    return b"" if number == 0 else b"text" if number == 1 else b"\xff\xd8\xff" + bytes([number]) * (700 * number)


def write(path: Path, members: list[tuple], form: str = "gnu") -> Path:
    with tarfile.open(path, "w", format=FORMATS[form], encoding="utf-8", errors="surrogateescape") as tar:
        for kind, name, what in members:
            info = tarfile.TarInfo(name)
            info.mode = 0o755
            data = b""
            if kind == "file":
                data = content(what)
                info.size = len(data)
            else:
                info.type = {"folder": b"5", "link": b"1", "symbolic link": b"2", "pipe": b"6"}[kind]
                info.linkname = what or ""
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # a name that is too long for ustar
                continue
    return path


def unpacked(tar: Path, *options: str) -> Path:
    folder = tar.with_suffix("")
    folder.mkdir()
    subprocess.run(["tar", "-x", *options, "-f", str(tar), "-C", str(folder)], capture_output=True, check=False)
    return folder


def images(source: Source) -> list[tuple]:
    names = [
        source.name(index).partition(".tar:" if isinstance(source, TarSource) else f"{source.path}/")[2] for index in range(len(source))
    ]
    return [
        (name, source.identities[label], source.read(index))
        for index, (name, label) in enumerate(zip(names, source.labels.tolist(), strict=True))
    ]


def member(name: str | bytes, data: bytes = b"\xff\xd8\xff", form: int = tarfile.USTAR_FORMAT, **fields) -> bytes:
    """Header and data; names of bytes go into the header as they are."""
    info = tarfile.TarInfo(name if isinstance(name, str) else "x")
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    header = info.tobuf(form, "utf-8", "surrogateescape")
    if isinstance(name, bytes):
        header = signed(name.ljust(100, b"\0") + header[100:])
    return header + data + bytes(-len(data) % 512)


def signed(header: bytes) -> bytes:
    """With the checksum that belongs to it."""
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]
