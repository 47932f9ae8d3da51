"""Checkpoints behind an address: the same promises as on a disk, though a store has no rename and may give no answer."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import sys
from unittest import mock

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_loaders import remote
from pipeline import checkpoint
from tests.pipeline.checkpoint.shaky import Shaky
from tests.pipeline.checkpoint.states import load, save
from tests.pipeline.checkpoint.test_broken_off import is_sound
from tests.pipeline.checkpoint.test_broken_off import save as save_on_threads


@pytest.fixture(scope="module", autouse=True)
def without_pauses():
    with mock.patch.object(remote, "_FIRST_WAIT", 0.0):
        yield


@pytest.fixture
def address(tmp_path):
    return f"shaky://{tmp_path}/run/checkpoints"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_ranks_share_a_store(ranks, address, folder, before, after):
    for step in (1, 2, 3):
        ranks(before).run(save_there, address, step)
    assert sorted(os.listdir(folder)) == ["step-00000002", "step-00000003"]
    assert ranks(after).run(load_there, address, 3) == [True] * after
    assert ranks(after).run(load_there, f"{address}/step-00000002", 2) == [True] * after
    assert ranks(after).run(load_there, address.removesuffix("/checkpoints"), 3) == [True] * after  # the folder of a run


def save_there(address, step):
    return save(address, step, keep=2)


def load_there(address, step):
    return load(address, step=step)


def test_in_memory():
    address = "memory://runs/one"
    for step in (1, 2, 3):
        save(address, step, keep=2)
    assert load(address, step=3) and checkpoint.complete(address) == ["step-00000002", "step-00000003"]
    checkpoint.supersede(address, 2)
    assert load(address, step=2) and load(f"{address}/step-00000003.superseded", step=3)
    system = fsspec.filesystem("memory")
    system.pipe_file("/runs/one/step-00000002/rank-00000.safetensors", b"cut off")
    with pytest.raises(ValueError, match="none of the 1 checkpoints in memory://runs/one can be used"):
        checkpoint.newest(address)
    system.rm("/runs", recursive=True)
    assert checkpoint.newest(address) is None


def test_a_local_folder_as_an_address(tmp_path):
    save(f"file://{tmp_path}", 1)
    assert load(str(tmp_path)) and load(f"file://{tmp_path}") and load(f"local://{tmp_path}/step-00000001")
    assert isinstance(checkpoint.store_of(f"file://{tmp_path}"), type(checkpoint.store_of(str(tmp_path))))


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_package_that_is_missing_is_named(protocol, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=package):
        checkpoint.newest(f"{protocol}://bucket/run")
    with pytest.raises(ValueError, match=r"nowhere://x cannot be opened \(Protocol not known: nowhere"):
        checkpoint.store_of("nowhere://x")


def calls_of(work):
    """How often a store is asked."""
    asked = []
    with mock.patch.object(Shaky, "fails", staticmethod(lambda method, path: asked.append((method, path)))):
        work()
    return len(asked)


def test_any_call_fails_and_the_run_goes_on(address, folder):
    save_on_threads(address, 1), save_on_threads(address, 2)
    for number in itertools.count():
        shutil.rmtree(folder)
        save_on_threads(address, 1), save_on_threads(address, 2)
        calls = []

        def fails(method, path, number=number, calls=calls):
            calls.append(method)
            return len(calls) - 1 == number

        with mock.patch.object(Shaky, "fails", staticmethod(fails)):
            savers = save_on_threads(address, 3)
        if len(calls) <= number:
            break
        assert len({saver.trouble for saver in savers}) == 1
        if savers[0].trouble:
            assert "step 3 could not be saved" in savers[0].trouble and "the service is not available" in savers[0].trouble
            assert {"step-00000001", "step-00000002"} <= set(checkpoint.complete(address))
        else:
            assert is_sound(address, 3)
        assert not checkpoint.newest(address).info["step"] < 2
        assert all(saver.trouble is None for saver in save_on_threads(address, 4))
        assert is_sound(address, 4)
        assert all(os.path.exists(f"{folder}/{name}/{checkpoint.MANIFEST}") for name in os.listdir(folder))
    assert number > 20


def test_a_store_that_fails_every_second_call(address):
    """Nothing is ever lost of it, and as soon as it answers all is there."""
    save_on_threads(address, 1)
    newest = 1
    for step in range(2, 12):
        calls = []
        with mock.patch.object(Shaky, "fails", staticmethod(lambda method, path, calls=calls: calls.append(1) or len(calls) % 2 == 0)):
            savers = save_on_threads(address, step)
        newest = step if savers[0].trouble is None else newest
        assert is_sound(address, newest)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9), share=st.sampled_from([0.1, 0.3, 0.6]))
def test_no_answer_is_not_an_answer(tmp_path_factory, seed, share):
    """A run that starts while its store fails never begins anew, nor goes back to an older checkpoint: it says so and ends."""
    numbers = random.Random(seed)
    folder = tmp_path_factory.mktemp("store")
    address = f"shaky://{folder}"
    save_on_threads(address, 1), save_on_threads(address, 2)
    with mock.patch.object(Shaky, "fails", staticmethod(lambda method, path: numbers.random() < share)):
        for find in (checkpoint.newest, checkpoint.locate):
            try:
                assert find(address).info["step"] == 2
            except ValueError as error:
                assert re.search(r"cannot be (read|listed) \(.*the service is not available\)", str(error)), error
    shutil.rmtree(folder)


def test_a_read_that_fails_now_and_then_is_tried_again(address):
    save_on_threads(address, 1), save_on_threads(address, 2)
    asked = set()

    def fails(method, path):
        """Each for the first time."""
        is_new = isinstance(path, str) and (method, path) not in asked
        asked.add((method, str(path)))
        return is_new

    with mock.patch.object(Shaky, "fails", staticmethod(fails)):
        saved = checkpoint.newest(address)
        assert saved.info["step"] == 2 and saved.whole("backbone.weight")[0] == 2
        assert checkpoint.locate(f"{address}/step-00000001").info["step"] == 1
    assert len(asked) > 5


def test_a_server_that_is_not_reached_is_not_one_that_lacks_the_file(address):
    """As fsspec says it of HTTP."""
    save_on_threads(address, 1)

    def unreached(method, path):
        if str(path).endswith("safetensors"):
            raise FileNotFoundError(path) from ConnectionError("no route to host")

    with mock.patch.object(Shaky, "fails", staticmethod(unreached)), pytest.raises(ValueError, match="no route to host") as raised:
        checkpoint.newest(address)
    assert not isinstance(raised.value, checkpoint.DamagedError) and "can be used" not in str(raised.value)


@pytest.mark.parametrize("scheme", ["file://", "local://", ""])
def test_a_checkpoint_from_which_a_run_goes_on_keeps_its_name(folder, scheme):
    address = f"{scheme}{folder}"
    for step in (1, 2, 3):
        save_on_threads(address, step, keep=3)
    os.symlink("step-00000002", folder / "latest")
    os.symlink(folder, folder.parent / "link")
    assert checkpoint.supersede(address, 3, saved=checkpoint.newest(address))
    for path in (f"{folder}/step-00000002", f"file://{folder}/latest", f"{folder.parent}/link/step-00000002/"):
        assert checkpoint.supersede(address, 2, saved=checkpoint.locate(path))
        assert checkpoint.complete(address) == ["step-00000001", "step-00000002"]
    aside = checkpoint.locate(f"{folder}/step-00000003.superseded")
    assert not checkpoint.supersede(address, 3, saved=aside)


def test_a_checkpoint_in_the_root(monkeypatch, tmp_path):
    """A folder of that name where the command runs is not taken for it."""
    save_on_threads(str(tmp_path), 1)
    monkeypatch.chdir(tmp_path)
    for path in ("/step-00000001", "file:///step-00000001", "shaky://step-00000001", "memory://step-00000001"):
        with pytest.raises(ValueError, match=r"does not exist|no complete checkpoint at|cannot be read"):
            checkpoint.locate(path)
    with pytest.raises(ValueError, match="No such file"):
        checkpoint.open_checkpoint("/step-00000001")


def test_only_what_a_save_has_left_is_cleared_away(address, folder):
    for name in ("step-00000001", "step-00000005", "step-00000001.superseded", "step-notes", "steps", "other", "step-00000004.removed"):
        os.makedirs(folder / name)
        (folder / name / "rank-00000.safetensors").write_text("x")
    save_on_threads(address, 7)
    left = {"step-00000001.superseded", "step-notes", "steps", "other", "step-00000004.removed"}
    assert set(os.listdir(folder)) == left | {"step-00000007"}


def test_how_often_a_store_is_asked(address):
    """Once per checkpoint that is there, and once for each file of the one that is taken (this store asks itself again for each)."""
    for step in (1, 2, 3):
        save_on_threads(address, step, keep=3)
    assert calls_of(lambda: checkpoint.complete(address)) <= 8
    assert calls_of(lambda: checkpoint.newest(address)) <= 20


def test_passwords_are_not_shown(folder, caplog):
    folder.mkdir(parents=True)
    address = f"shaky://user:secret@host{folder}"
    savers = [save_on_threads(address, step)[0] for step in (1, 2, 2)]
    assert "already" in savers[-1].trouble
    said = [savers[-1].trouble]
    assert checkpoint.newest(address).path == f"shaky://***@host{folder}/step-00000002"
    (folder / "step-00000002" / "rank-00000.safetensors").unlink()
    with caplog.at_level("WARNING"):
        saved = checkpoint.newest(address)
    is_in = checkpoint.supersede(address, 1, saved=saved)
    assert os.path.exists(folder / "step-00000001") and is_in
    (folder / "step-00000001" / "rank-00000.safetensors").unlink()
    for path in (address, f"{address}/step-00000001", f"{address}/nothing"):
        with pytest.raises(ValueError) as raised:
            checkpoint.locate(path)
        said.append(str(raised.value))
    with mock.patch.object(Shaky, "fails", staticmethod(lambda method, path: True)), pytest.raises(ValueError) as raised:
        checkpoint.newest(address)
    said += [str(raised.value), caplog.text, saved.path]
    with pytest.raises(ValueError) as raised:
        checkpoint.newest("nowhere://user:secret@host/x?signature=secret")
    assert "secret" not in "".join([*said, str(raised.value)]) and all("***" in text for text in said)


def test_one_that_is_there_is_not_written_over(address):
    save_on_threads(address, 1)
    (saver,) = save_on_threads(address, 1, ranks=1)
    assert "there is a step-00000001 already" in saver.trouble and is_sound(address, 1)
