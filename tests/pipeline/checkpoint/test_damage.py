"""Whatever is done to the files of checkpoints is noticed: the newest sound one is used, or a sentence says that there is none."""

from __future__ import annotations

import itertools
import logging
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint
from tests.pipeline import first_layout
from tests.pipeline.checkpoint.states import load, save, shared, state
from tests.pipeline.checkpoint.threads import on_threads


def save_on_two_ranks(folder, step):
    def write(agreement):
        saver = checkpoint.Saver(str(folder), checkpoint.CheckpointConfig(asynchronous=False), agreement)
        names = [f"name {n}" for n in range(10)]
        saver.start(step, state(step, of=(agreement.rank, agreement.ranks)), {"consumed": step, "num_classes": 10}, names)
        assert saver.trouble is None

    on_threads(2, write)
    return f"{folder}/step-{step:08d}"


def save_in_the_first_format(folder, step):
    path = f"{folder}/step-{step:08d}"
    first_layout.write(path, step, "gce", shared(step), "0" * 16, "data", str(folder))
    return path


def sound_as(path, folder):
    """That it is the one chosen and holds what was saved."""
    found = checkpoint.newest(str(folder))
    assert found.path == path
    step = found.info["step"]
    for name, tensor in shared(step).items():
        assert torch.equal(found.whole(name), tensor)


def rewrite(file, content):
    with open(file, "wb") as opened:
        opened.write(content)


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def every_bit_is_noticed(folder, path, files, bits):
    """Each of `bits(number of bits)` of each file, one at a time."""
    before = checkpoint.newest(str(folder)).path
    assert before == path
    os.rename(path, f"{folder}/kept")  # by this name it is looked at alone
    for file in files:
        name = f"{folder}/kept/{file}"
        with open(name, "rb") as opened:
            content = opened.read()
        for bit in bits(8 * len(content)):
            rewrite(name, flipped(content, bit))
            with pytest.raises(ValueError, match="cannot be used"):
                checkpoint.locate(f"{folder}/kept")
        rewrite(name, content)
    os.rename(f"{folder}/kept", path)
    sound_as(path, folder)


def some(count, seed=0):
    return lambda bits: sorted(random.Random(seed).sample(range(bits), min(bits, count)))


def test_bits_of_every_file(tmp_path):
    save_on_two_ranks(tmp_path, 1)
    path = save_on_two_ranks(tmp_path, 2)
    assert len(os.listdir(path)) == 4
    every_bit_is_noticed(tmp_path, path, sorted(os.listdir(path)), some(150))


@pytest.mark.long
def test_every_bit_of_every_file(tmp_path):
    save_on_two_ranks(tmp_path, 1)
    path = save_on_two_ranks(tmp_path, 2)
    every_bit_is_noticed(tmp_path, path, sorted(os.listdir(path)), range)


def test_bits_of_a_checkpoint_of_the_first_format(tmp_path):
    """Its manifest has no checksum of its own, so a number in that may change without notice; the files that it names may not."""
    save_in_the_first_format(tmp_path, 1)
    path = save_in_the_first_format(tmp_path, 2)
    files = sorted(set(os.listdir(path)) - {checkpoint.MANIFEST})
    every_bit_is_noticed(tmp_path, path, files, some(60))


def test_no_bit_of_the_first_format_s_manifest_ends_in_a_traceback(tmp_path):
    path = save_in_the_first_format(tmp_path, 1)
    with open(f"{path}/{checkpoint.MANIFEST}", "rb") as opened:
        content = opened.read()
    for bit in some(300)(8 * len(content)):
        rewrite(f"{path}/{checkpoint.MANIFEST}", flipped(content, bit))
        try:
            found = checkpoint.locate(path)
        except ValueError:
            continue
        assert all(torch.equal(found.whole(name), tensor) for name, tensor in shared(1).items())


def replaced(make):
    """Something else in the place of a file."""

    def damage(file):
        os.remove(file)
        make(file)

    return damage


def append(file):
    with open(file, "ab") as opened:
        opened.write(b"x")


def half(file):
    os.truncate(file, os.path.getsize(file) // 2)


def of_the_other(file):
    """The file of the same name of the checkpoint before it."""
    shutil.copy(file.replace("step-00000002", "step-00000001"), file)


DAMAGES = {
    "cut off": half,
    "emptied": lambda file: os.truncate(file, 0),
    "longer": append,
    "removed": os.remove,
    "a folder": replaced(os.mkdir),
    "a pipe": replaced(os.mkfifo),
    "a device": replaced(lambda file: os.symlink("/dev/zero", file)),
    "a link to nowhere": replaced(lambda file: os.symlink("nowhere", file)),
    "a link to itself": replaced(lambda file: os.symlink(file, file)),
    "not readable": lambda file: (os.remove(file), os.symlink("/proc/self/mem", file)),
    "of another checkpoint": of_the_other,
}


@pytest.mark.parametrize("write", [save_on_two_ranks, save_in_the_first_format])
@pytest.mark.parametrize("kind", DAMAGES)
def test_something_else_in_the_place_of_a_file(tmp_path, write, kind, caplog):
    first = write(tmp_path, 1)
    for name in sorted(os.listdir(write(tmp_path, 2))):
        path = f"{tmp_path}/step-00000002"
        same = [Path(f"{folder}/{name}").read_bytes() for folder in (first, path)]
        if kind == "of another checkpoint" and same[0] == same[1]:
            continue
        shutil.copytree(path, tmp_path / "copy")
        DAMAGES[kind](f"{path}/{name}")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            sound_as(first, tmp_path)
        assert path in caplog.text
        shutil.rmtree(path)
        os.rename(tmp_path / "copy", path)
        sound_as(path, tmp_path)


def test_links_to_sound_files_are_as_good_as_files(tmp_path):
    first, second = save_on_two_ranks(tmp_path, 1), save_on_two_ranks(tmp_path, 2)
    for number, name in enumerate(sorted(os.listdir(second))):
        os.rename(f"{second}/{name}", tmp_path / name)
        (os.symlink if number % 2 else os.link)(tmp_path / name, f"{second}/{name}")
    sound_as(second, tmp_path)
    os.rename(second, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", second)
    sound_as(second, tmp_path)
    save(str(tmp_path), 3, keep=1)
    assert not os.path.lexists(first) and not os.path.lexists(second)
    assert checkpoint.locate(str(tmp_path / "elsewhere")).info["step"] == 2  # of a link only the link goes


def test_files_of_two_ranks_or_two_checkpoints_that_changed_places(tmp_path):
    paths = [save_on_two_ranks(tmp_path, step) for step in (1, 2)]
    places = [f"{path}/{name}" for path in paths for name in sorted(os.listdir(path))]
    contents = {place: Path(place).read_bytes() for place in places}
    for one, other in itertools.combinations(places, 2):
        if contents[one] == contents[other]:
            continue
        rewrite(one, contents[other]), rewrite(other, contents[one])
        bad = {os.path.dirname(one), os.path.dirname(other)}
        good = [path for path in paths if path not in bad]
        if good:
            sound_as(good[-1], tmp_path)
        else:
            with pytest.raises(ValueError, match="none of the 2 checkpoints"):
                checkpoint.newest(str(tmp_path))
        rewrite(one, contents[one]), rewrite(other, contents[other])


def test_a_checkpoint_in_another_one_s_place(tmp_path):
    first, second = (save_on_two_ranks(tmp_path, step) for step in (1, 2))
    os.rename(first, tmp_path / "x"), os.rename(second, first), os.rename(tmp_path / "x", second)
    with pytest.raises(ValueError, match="none of the 2 checkpoints"):
        checkpoint.newest(str(tmp_path))
    (tmp_path / "step-00000003").write_text("")
    os.symlink("nowhere", tmp_path / "step-00000004")
    os.mkfifo(tmp_path / "step-00000005")
    with pytest.raises(ValueError, match="none of the 5 checkpoints"):
        checkpoint.newest(str(tmp_path))
    checkpoint.supersede(str(tmp_path), 0)
    assert checkpoint.newest(str(tmp_path)) is None and len(os.listdir(tmp_path)) == 5


def test_both_formats_side_by_side(tmp_path, ranks):
    first, second = save_in_the_first_format(tmp_path, 1), save_on_two_ranks(tmp_path, 2)
    sound_as(second, tmp_path)
    half(f"{second}/rank-00001.safetensors")
    sound_as(first, tmp_path)
    third = save_in_the_first_format(tmp_path, 3)
    assert ranks(2).run(newest_path, str(tmp_path)) == [third] * 2


def newest_path(folder):
    return checkpoint.newest(folder).path


def test_ranks_agree_on_what_they_find(ranks, tmp_path):
    save_on_two_ranks(tmp_path, 1), save_on_two_ranks(tmp_path, 2)
    half(tmp_path / "step-00000002" / "rank-00001.safetensors")
    assert ranks(3).run(load, str(tmp_path)) == [True] * 3
