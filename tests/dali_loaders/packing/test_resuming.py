"""A pack that is broken off anywhere goes on to the same bytes, and leaves nothing where that is not asked for."""

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dali_loaders import open_source, pack
from dali_loaders.packing import PackConfig, partial
from dali_loaders.packing.course import key
from dali_loaders.sources import FolderSource
from dali_loaders.sources.webdataset import ShardedTarSource

OUTS = ["out.rec", "out.tar"]
CONFIG = PackConfig(shard_size=5)


@pytest.fixture(autouse=True)
def journal_at_every_image(monkeypatch):
    monkeypatch.setattr(partial, "SECONDS", 0.0)


class BreaksOff(FolderSource):
    """Ctrl-C at a given image."""

    at = -1

    def read(self, index):
        if index == self.at:
            raise KeyboardInterrupt
        return super().read(index)


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def whole(folder, tmp_path):
    """What an uninterrupted pack writes, by OUT."""
    (folder / "person03" / "01.jpg").write_bytes(b"")
    result = {}
    for out in OUTS:
        (tmp_path / f"whole-{out}").mkdir()
        pack(open_source(str(folder)), str(tmp_path / f"whole-{out}" / out), CONFIG, workers=1)
        result[out] = written(tmp_path / f"whole-{out}")
    return result


@pytest.mark.parametrize("out", OUTS)
def test_any_number_of_workers_writes_the_same(folder, tmp_path, whole, out):
    (tmp_path / "parallel").mkdir()
    pack(open_source(str(folder)), str(tmp_path / "parallel" / out), CONFIG, workers=4)
    assert written(tmp_path / "parallel") == whole[out]


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("places", [(0, 9, 23), pytest.param(range(24), marks=pytest.mark.long)])
def test_going_on_from_anywhere(folder, tmp_path, whole, out, places):
    for at in places:
        target = tmp_path / f"at-{at}"
        target.mkdir()
        source = BreaksOff(str(folder))
        for source.at in (at, min(23, at + 7)):
            with pytest.raises(KeyboardInterrupt):
                pack(source, str(target / out), CONFIG, workers=1, resume=True)
            assert os.listdir(target) == [f"{out}.partial"]
            for file in (target / f"{out}.partial").iterdir():
                if file.name != "journal.json":
                    with open(file, "ab") as tail:  # what was on its way to the disk
                        tail.write(b"half")
        source.at = -1
        reads = []
        source.read = lambda index, read=source.read, reads=reads: (reads.append(index), read(index))[1]
        pack(source, str(target / out), CONFIG, workers=1, resume=True)
        assert written(target) == whole[out]
        assert len(reads) <= 24 - at + 8  # of the tasks under way, each with 8 images, none was done


@pytest.mark.parametrize("out", OUTS)
def test_another_pack_begins_anew(folder, tmp_path, whole, out):
    """With other options, other images, or a journal that is damaged."""
    source = BreaksOff(str(folder))
    source.at = 20
    target = tmp_path / "target"
    target.mkdir()

    def break_off():
        with pytest.raises(KeyboardInterrupt):
            pack(source, str(target / out), CONFIG, workers=1, resume=True)
        return target / f"{out}.partial" / "journal.json"

    break_off()
    other = open_source(str(folder))
    pack(other, str(target / out), PackConfig(resize=16, shard_size=5))
    for path in target.iterdir():
        path.unlink()
    journal = break_off()
    journal.write_text(journal.read_text()[:-20])
    pack(other, str(target / out), CONFIG)
    assert written(target) == whole[out]
    for path in target.iterdir():
        path.unlink()
    break_off()
    image = folder / "person00" / "00.jpg"
    image.write_bytes((folder / "person05" / "00.jpg").read_bytes())
    pack(open_source(str(folder)), str(target / out), CONFIG)
    assert written(target) != whole[out]
    if out == "out.rec":
        assert open_source(str(target / out)).read(0) == image.read_bytes()


def test_a_part_of_several_sets_that_has_changed(folder, tmp_path):
    """Folders between commas are looked into as one alone is."""
    path = f"{folder},{folder.rename(tmp_path / 'second')}"
    shutil.copytree(tmp_path / "second", folder)
    before = key(open_source(path), {})
    assert key(open_source(path), {}) == before
    os.utime(tmp_path / "second" / "person00" / "00.jpg", ns=(0, 0))
    assert key(open_source(path), {}) != before


def test_killed_while_files_get_their_names(folder, tmp_path, monkeypatch):
    """Without all files under their names nothing can be opened, names and list included."""
    (folder / "person03" / "01.jpg").write_bytes(b"")
    replace, names = os.replace, []

    def kill(old, new):
        assert not (tmp_path / "out.rec").exists()
        names.append(os.path.basename(new))
        replace(old, new)

    monkeypatch.setattr(os, "replace", kill)
    pack(open_source(str(folder)), str(tmp_path / "out.rec"))
    assert {"out.rec", "out.idx", "out.identities.txt", "out.left_out.txt"} <= set(names)


def test_nothing_stays_where_it_is_not_asked_for(folder, tmp_path):
    source = BreaksOff(str(folder))
    source.at = 20
    before = set(os.listdir(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        pack(source, str(tmp_path / "out.rec"))
    assert set(os.listdir(tmp_path)) == before


def test_two_packs_do_not_write_one_set(folder, tmp_path):
    with partial.Partial(str(tmp_path / "out.rec"), {}, False), pytest.raises(ValueError, match="another process is writing"):
        pack(open_source(str(folder)), str(tmp_path / "out.rec"))
    pack(open_source(str(folder)), str(tmp_path / "out.rec"))


def test_a_full_disk_ends_in_a_sentence(folder, tmp_path, monkeypatch):
    def full(self, state):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(partial.Partial, "mark", full)
    before = set(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=r"cannot write .*out\.rec: No space left on device"):
        pack(open_source(str(folder)), str(tmp_path / "out.rec"))
    assert set(os.listdir(tmp_path)) == before


def test_labels_that_are_not_sorted(folder, tmp_path):
    source = open_source(str(folder))
    source.labels = np.roll(source.labels, 7)
    pack(source, str(tmp_path / "out.rec"), PackConfig(verify=True))
    assert open_source(str(tmp_path / "out.rec")).labels.tolist() == np.repeat(np.arange(6), 4).tolist()


def test_shards_are_what_webdataset_reads(folder, tmp_path):
    """KEY.jpg, KEY.cls, KEY.json; as many images as asked for in each, and the same images, labels and names as the folder."""
    report = pack(open_source(str(folder)), str(tmp_path / "out.tar"), PackConfig(shard_size=9))
    assert report.out == str(tmp_path / "out-{000..002}.tar")
    assert str(report).endswith(f" in '{report.out}'")  # as a shell takes it
    with tarfile.open(tmp_path / "out-001.tar") as tar:
        assert [member.name for member in tar][:3] == ["000000009.jpg", "000000009.cls", "000000009.json"]
        assert len(tar.getmembers()) == 27
    shards, source = ShardedTarSource([str(tmp_path / f"out-00{n}.tar") for n in range(3)]), open_source(str(folder))
    assert (shards.labels.tolist(), shards.identities) == (source.labels.tolist(), source.identities)
    assert [shards.read(index) for index in range(24)] == [source.read(index) for index in range(24)]
    with pytest.raises(ValueError, match=r"out-000\.tar exists already \(3 such shards\)"):
        pack(source, str(tmp_path / "out.tar"))
