"""A tar gives the images that unpacking it gives: whatever its members are, compared with what `tar -x` leaves behind."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from tar_sets import FORMATS, images, needs_tar, unpacked, write

from dali_loaders.sources import FolderSource, TarSource

pytestmark = needs_tar

_FOLDERS = ["a", "b", "c", "a/d", "b/e", ".h", "@eaDir", "x" * 120, "\udcc0\udcfd", "e\u0301", "\u00e9", "."]
_FILES = ["1.jpg", "2.JPG", "photo", "n.txt", ".s.jpg", "._1.jpg", "y" * 101 + ".png", "a", "d"]
_before = st.sampled_from(["", "", "", "./", "/", "../", "a/../", ".//"])
_paths = st.builds(lambda before, folder, name: f"{before}{folder}/{name}", _before, st.sampled_from(_FOLDERS), st.sampled_from(_FILES))
_folders = st.builds(str.__add__, _before, st.sampled_from(_FOLDERS))
_targets = st.one_of(_paths, st.sampled_from(_FILES), _folders, st.builds("../{}".format, _paths), st.builds("../{}".format, _folders))
_members = st.one_of(
    st.tuples(st.just("file"), _paths, st.integers(0, 4)),
    st.tuples(st.just("file"), _paths, st.integers(0, 4)),
    st.tuples(st.just("folder"), _folders, st.none()),
    st.tuples(st.just("link"), _paths, _paths),
    st.tuples(st.just("symbolic link"), _paths, _targets),
    st.tuples(st.just("symbolic link"), _folders.filter(lambda name: not name.endswith((".", "/"))), _targets),
    st.tuples(st.just("pipe"), _paths, st.none()),
)


def result(kind: type, path: Path) -> list[tuple] | str:
    """What a source gives, or its sentence without names."""
    try:
        source = kind(str(path))
    except ValueError as error:
        text = str(error)
        return next((known for known in ("holds no images", "outside any identity folder", "lead nowhere") if known in text), text)
    assert source.account.seen == source.account.used + sum(passed.count for passed in source.account.passed_over.values())
    assert source.account.used == len(source)
    assert source.identities == sorted(source.identities, key=lambda name: name.encode(errors="surrogateescape"))
    return images(source)


def leads_out(path: Path, folder: Path) -> bool:
    """Whether it is a link to what a tar cannot know."""
    return path.is_symlink() and not f"{os.path.realpath(path)}/".startswith(f"{os.path.realpath(folder)}/")


def compare(members: list[tuple], form: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tar = write(Path(folder) / "set.tar", members, form)
        ours, twin = result(TarSource, tar), unpacked(tar)
        assume(not any(leads_out(Path(root) / name, twin) for root, *lists in os.walk(twin) for names in lists for name in names))
        if not (isinstance(ours, str) and "at once" in ours):
            assert ours == result(FolderSource, twin)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(_members, max_size=10), st.sampled_from(list(FORMATS)))
@example([("file", "a/1.jpg", 2), ("symbolic link", "b", "a"), ("symbolic link", "a/d", "../a")], "gnu")
@example(
    [("file", "a/1.jpg", 2), ("link", "b/1.jpg", "a/1.jpg"), ("file", "a/1.jpg", 3), ("symbolic link", "c/1.jpg", "../a/1.jpg")], "pax"
)
@example([("file", "a/1.jpg", 2), ("link", "a/1.jpg", "a/none.jpg")], "gnu")
@example([("pipe", "a/photo", None), ("link", "a/n", "a/photo"), ("symbolic link", "b/photo", "../a/photo"), ("file", "a/1.jpg", 2)], "gnu")
@example([("file", "b/1.jpg", 0), ("symbolic link", "c", "a/../a"), ("link", "a/1.jpg", "c/1.jpg")], "ustar")
def test_the_same_images(members, form):
    compare(members, form)


@pytest.mark.long
@pytest.mark.timeout(3600)
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(_members, max_size=14), st.sampled_from(list(FORMATS)))
def test_the_same_images_many_times(members, form):
    compare(members, form)
