"""Folders and files of any names: a folder and its tar are the same set, with the same account; nothing is lost."""

from __future__ import annotations

import os
import tarfile
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tar_sets import content, images

from dali_loaders.identities import checksum
from dali_loaders.sources import FolderSource, TarSource

_bytes = (
    st.binary(min_size=1, max_size=6).map(lambda name: name.translate(None, b"\0/")).filter(lambda name: name not in (b"", b".", b".."))
)
_parts = st.one_of(
    _bytes,
    st.text(min_size=1, max_size=3)
    .map(lambda name: name.encode(errors="replace").translate(None, b"\0/"))
    .filter(lambda name: name.strip(b".")),
    st.sampled_from(
        [b"anna", b"Anna", b"\xd5\xc5", b"e\xcc\x81", b"\xc3\xa9", b".x", b"@eaDir", b"__MACOSX", b"a\nb", b" ", b"lost+found"]
    ),
)
_files = st.one_of(_parts, _parts.map(lambda name: name + b".jpg"), st.sampled_from([b"Thumbs.db", b"._1.jpg", b"x.txt", b"1.HEIC"]))
_paths = st.builds(lambda folders, file: b"/".join([*folders, file]), st.lists(_parts, min_size=1, max_size=3), _files)


def compare(files: list[tuple[bytes, int]], empty: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "set")
        root = os.fsencode(path)
        os.mkdir(path)
        seen = set()
        for name, number in files:
            try:
                os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
                with open(os.path.join(root, name), "xb") as file:
                    file.write(content(number))
                seen.add(name)
            except OSError:  # its folder is a file
                continue
        for name in empty:
            if not os.path.lexists(os.path.join(root, name)):
                os.mkdir(os.path.join(root, name))
        with tarfile.open(f"{path}.tar", "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
            tar.add(path, ".")
        results = []
        for kind, at in ((FolderSource, path), (TarSource, f"{path}.tar")):
            try:
                source = kind(at)
            except ValueError as error:
                results.append("holds no images" if "holds no images" in str(error) else str(error).removeprefix(at))
                continue
            account = source.account
            folders = account.passed_over.get("identity folder without an image")
            assert account.seen - (folders.count if folders else 0) == len(seen)
            assert account.used == len(source) and all(source.name(index).isprintable() for index in range(len(source)))
            passed = {
                reason: (passed.count, sorted(passed.examples)[:1] if passed.count < 5 else [])
                for reason, passed in account.passed_over.items()
            }
            results.append((images(source), source.identities, checksum(source.identities), source.order_checksum(), passed))
        assert results[0] == results[1]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(_paths, st.integers(0, 4)), max_size=8), st.lists(_parts, max_size=2))
def test_a_folder_and_its_tar(files, empty):
    compare(files, empty)


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(_paths, st.integers(0, 4)), max_size=8), st.lists(_parts, max_size=2))
def test_a_folder_and_its_tar_many_times(files, empty):
    compare(files, empty)
