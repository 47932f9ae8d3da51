"""The commands on checkpoints: what they print, their exit codes, and a sentence for whatever is wrong."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest
import torch

from dali_loaders import remote
from pipeline import checkpoint
from pipeline.checkpoint import CheckpointConfig, Saver, comparing, copying, looking
from pipeline.checkpoint.stores import LocalStore, RemoteStore
from pipeline.cli import main
from tests.pipeline.checkpoint.states import edit_manifest, load, save, state


def run(capsys, *arguments):
    """Exit code, output, errors."""
    capsys.readouterr()
    code = main(["checkpoint", *map(str, arguments)])
    return code, *capsys.readouterr()


def run_json(capsys, *arguments):
    code, out, _ = run(capsys, *arguments, "--json")
    return code, json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture
def memory():
    """An address in a store of this process."""
    yield "memory://bucket/run"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def flip_a_bit(path, at=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def save_with(folder, step, retention=None, **info):
    saver = Saver(str(folder), retention or CheckpointConfig(keep=9, asynchronous=False))
    said = {"keep": saver.config.keep, "keep_every": saver.config.keep_every, "best": saver.config.best}
    saver.start(step, state(step), {"consumed": 24 * step, "config": {"checkpoint": said}, **info}, ["a", "b"])
    assert saver.trouble is None
    return folder / f"step-{step:08}"


# list


def test_list_says_why_each_is_kept_and_which_is_best(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    config = CheckpointConfig(keep=2, keep_every=4, best="faces/eer", asynchronous=False)
    for step, value in enumerate((0.5, 0.1, 0.2, 0.4, 0.3, 0.25), start=1):
        save_with(folder, step, config, figures={"faces/eer": value}, world_size=3, when="2026-01-02T03:04:05+00:00")
    code, found = run_json(capsys, "list", tmp_path)
    kept = {row["step"]: row["kept"] for row in found["checkpoints"]}
    assert code == 0 and kept == {2: ["best faces/eer"], 4: ["every 4 steps"], 5: ["one of the newest 2"], 6: ["newest"]}
    assert {row["ranks"] for row in found["checkpoints"]} == {3} and {row["state"] for row in found["checkpoints"]} == {"complete"}
    code, out, _ = run(capsys, "list", folder)
    assert code == 0 and "0.1000*" in out and out.count("*") == 1 and out.count("all there") == 4 and out.count("2026-01-02") == 4


@pytest.mark.parametrize("is_remote", [False, True])
def test_list_shows_what_is_no_checkpoint_too(tmp_path, capsys, memory, is_remote):
    folder = memory if is_remote else str(tmp_path)
    for step in (1, 2, 3):
        save(folder, step)
    store = checkpoint.store_of(folder)
    store.rename("step-00000003", "step-00000003.superseded")
    store.begin_beside("step-00000004")
    sink = store.create("step-00000004", "rank-00000.safetensors")
    sink.write(memoryview(b"x"))
    sink.close()
    code, found = run_json(capsys, "list", folder)
    assert code == 0 and [(row["name"].partition(".")[0], row["state"]) for row in found["checkpoints"]] == [
        ("step-00000001", "complete"),
        ("step-00000002", "complete"),
        ("step-00000003", "superseded"),
        ("step-00000004", "unfinished"),
    ]
    _, out, _ = run(capsys, "list", folder)
    assert "being written, or left of a save broken off" in out
    for row in found["checkpoints"][1:3]:
        assert run_json(capsys, "list", f"{folder}/{row['name']}")[1]["checkpoints"] == [row]


def test_list_takes_a_first_look_at_the_files(tmp_path, capsys):
    for step in (1, 2, 3, 4, 5):
        save(str(tmp_path), step, keep=9)
    os.truncate(tmp_path / "step-00000001" / "rank-00000.safetensors", 10)
    (tmp_path / "step-00000002" / checkpoint.MANIFEST).unlink()
    edit_manifest(tmp_path / "step-00000003", lambda values: values.update(format=7))
    os.rename(tmp_path / "step-00000004", tmp_path / "step-00000006")
    _, found = run_json(capsys, "list", tmp_path)
    states = {row["name"][-1]: (row["state"], row["fault"]) for row in found["checkpoints"]}
    assert states["1"] == ("damaged", "rank-00000.safetensors has 10 bytes instead of 849") and states["2"][0] == "damaged"
    assert states["3"][0] == "unknown" and "it is of format 7" in states["3"][1]
    assert states["6"] == ("damaged", "it is the checkpoint of step 4") and states["5"] == ("complete", None)


def test_what_a_checkpoint_says_is_not_believed(tmp_path, capsys):
    """Its retention, figures and texts may be anything; what a run could not go on from is damaged."""
    strange = {"figures": {"a\x1b[31m/eer": float("nan")}, "when": 7, "host": "h\x07\ud800", "epoch": ["\x9b"], "code": {"x": [1]}}
    huge = {"checkpoint": {"keep": math.inf}}
    for step, said in enumerate((None, {"checkpoint": {"keep": "x", "keep_every": -1, "best": []}}, huge), start=1):
        save_with(tmp_path, step, **{**strange, "config": said})
    for command in ("list", "show", "verify"):
        for flags in ([], ["--config"] if command == "show" else []):
            code, out, _ = run(capsys, command, tmp_path, *flags)
            assert code == 0 and all(line.isprintable() for line in out.splitlines())
    code, found = run_json(capsys, "list", tmp_path)
    assert code == 0 and found["checkpoints"][0]["figures"] == {"a\x1b[31m/eer": "NaN"}
    assert run_json(capsys, "show", tmp_path / "step-00000001", "--config")[0] == 0
    assert run(capsys, "diff", tmp_path / "step-00000001", tmp_path / "step-00000002")[0] == 1
    for said in (
        {"config": []},
        {"config": {"checkpoint": 3}},
        {"world_size": "many"},
        *({"course": course} for course in ([], 5, {"losses": 5}, {"losses": ["1"]}, {"rollbacks": -1}, {"scaler": [1]})),
        {"started_from": json.loads("[" * 900 + "]" * 900)},
    ):
        path = save_with(tmp_path / "more", 3, **said)
        for command, code in (("list", 0), ("verify", 1), ("show", 2)):
            assert run(capsys, command, tmp_path / "more")[0] == code
        shutil.rmtree(path)


# verify


def test_verify_reads_all_contents(tmp_path, capsys):
    for step in (1, 2, 3):
        save(str(tmp_path / "checkpoints"), step)
    code, out, _ = run(capsys, "verify", tmp_path)
    assert code == 0 and out.count(": sound\n") == 3
    flip_a_bit(tmp_path / "checkpoints" / "step-00000002" / "rank-00000.safetensors")
    code, out, _ = run(capsys, "verify", tmp_path)
    assert code == 1 and out.count(": sound\n") == 2 and "rank-00000.safetensors have changed since it was written" in out
    code, found = run_json(capsys, "verify", tmp_path / "checkpoints" / "step-00000001", tmp_path / "checkpoints" / "step-00000002")
    assert code == 1 and [result["state"] for result in found["checkpoints"]] == ["sound", "damaged"]


def test_verify_finds_each_kind_of_damage(tmp_path, capsys):
    whole = save(str(tmp_path), 1)
    for number, damage in enumerate(
        (
            lambda path: (path / checkpoint.MANIFEST).unlink(),
            lambda path: flip_a_bit(path / checkpoint.MANIFEST),
            lambda path: flip_a_bit(path / "identities.json"),
            lambda path: (path / "identities.json").unlink(),
            lambda path: (path / "rank-00000.safetensors").write_bytes(b""),
            lambda path: flip_a_bit(path / "rank-00000.safetensors", 0),
            lambda path: flip_a_bit(path / "rank-00000.safetensors", -1),
        )
    ):
        path = tmp_path / str(number) / "step-00000001"
        shutil.copytree(whole, path)
        assert run(capsys, "verify", path)[0] == 0
        damage(path)
        assert run(capsys, "verify", path)[0] == 1, number
    os.rename(whole, tmp_path / "step-00000002")
    assert run(capsys, "verify", tmp_path / "step-00000002")[0] == 1


def test_verify_of_many_shares_in_threads(tmp_path, monkeypatch):
    path = tmp_path / "step-00000001"
    checkpoint.save(str(tmp_path), 1, {"backbone.weight": checkpoint.whole(torch.arange(12 << 20))}, {})
    monkeypatch.setattr(looking, "SHARE", 1 << 22)
    told = []
    saved = checkpoint.open_checkpoint(str(path))
    assert looking.fault_of(saved, told.append) is None and len(told) > 20 and sum(told) == pytest.approx(96 << 20, rel=1e-3)
    for at in (5, 50 << 20, (96 << 20) + 3):  # in any share
        flip_a_bit(path / "rank-00000.safetensors", at)
        assert "have changed" in looking.fault_of(saved)
        flip_a_bit(path / "rank-00000.safetensors", at)
    assert looking.fault_of(saved) is None


def test_one_that_is_removed_while_it_is_read_is_not_damaged(tmp_path, capsys, monkeypatch):
    for step in (1, 2):
        save(str(tmp_path), step)
    fault_of = looking.fault_of

    def removing(saved, done):
        if saved.name == "step-00000001":
            LocalStore(str(tmp_path)).remove(saved.name)  # as the run's retention does
        return fault_of(saved, done)

    monkeypatch.setattr(looking, "fault_of", removing)
    code, out, _ = run(capsys, "verify", tmp_path)
    assert code == 0 and "step-00000001: was removed or renamed while it was read" in out and "step-00000002: sound" in out


def test_one_that_cannot_be_judged_is_not_called_damaged(tmp_path, capsys, memory, monkeypatch):
    save(memory, 1)

    def failing(self, path, **_):
        raise ConnectionError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("memory")), "cat_file", failing)
        patch.setattr(remote, "_FIRST_WAIT", 0.0)
        code, out, _ = run(capsys, "verify", memory)
    assert code == 2 and "cannot be verified: " in out and "no answer" in out and "damaged" not in out
    edit_manifest(Path(save(str(tmp_path), 1)), lambda values: values.update(format=3))
    code, out, _ = run(capsys, "verify", tmp_path)
    assert code == 2 and "it is of format 3" in out


def test_a_run_whose_checkpoints_lie_elsewhere(tmp_path, capsys):
    """Its folder says where; but an address is only named, for a stranger may have written it."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    about = tmp_path / "run" / "run.json"
    about.write_text(json.dumps({"checkpoint.folder": str(tmp_path / "elsewhere")}))
    code, _, error = run(capsys, "list", tmp_path / "run")
    assert code == 2 and f"its run saves to {tmp_path}/elsewhere: give that" in error
    save(str(tmp_path / "elsewhere"), 3)
    for words in (["list"], ["verify"], ["show"]):
        code, out, _ = run(capsys, *words, tmp_path / "run")
        assert code == 0 and "step-00000003" in out
    assert checkpoint.locate(str(tmp_path / "run")).info["step"] == 3
    for said in ("memory://elsewhere", "memory://user:secret@else\x1bwhere", ["x"], {"a": 1}):
        about.write_text(json.dumps({"checkpoint.folder": said}))
        code, _, error = run(capsys, "list", tmp_path / "run")
        assert code == 2 and error.count("\n") == 1 and error[:-1].isprintable() and "secret" not in error
        assert ("its run saves to memory://" in error) == isinstance(said, str)
    for content in (b"\xff", b"[" * 10**5, b"[]", b"", b"{" + b" " * (1 << 21) + b"}"):
        about.write_bytes(content)
        assert run(capsys, "list", tmp_path / "run")[0] == 2
    about.unlink()
    os.mkfifo(about)
    assert run(capsys, "list", tmp_path / "run")[0] == 2


@pytest.mark.parametrize("is_remote", [False, True])
def test_beside_a_run_that_saves_and_removes(tmp_path, capsys, memory, is_remote):
    """Whatever moment they meet: an exit code of their own, and no traceback."""
    folder = memory if is_remote else str(tmp_path / "run")
    save(folder, 1)
    ends = threading.Event()

    def save_on():
        step = 1
        while not ends.is_set():
            step += 1
            save(folder, step, keep=1)

    thread = threading.Thread(target=save_on)
    thread.start()
    try:
        for number in range(10):
            for arguments in (("list", folder), ("verify", folder), ("show", folder), ("copy", folder, tmp_path / str(number))):
                code, out, error = run(capsys, *arguments)
                assert code in (0, 2) and "damaged" not in out and error.count("\n") == (code == 2), (arguments, code, out, error)
            for copied in checkpoint.complete(str(tmp_path / str(number))):
                assert run(capsys, "verify", tmp_path / str(number) / copied)[0] == 0
    finally:
        ends.set()
        thread.join()


# show


def test_show_reads_no_contents(tmp_path, capsys):
    info = {"num_classes": 10, "width": 3, "host": "node1", "epoch": 1.5}
    info["started_from"] = {"given": "runs/a", "path": "runs/a/checkpoints/step-1", "classifier": False, "ema": True}
    path = save_with(tmp_path, 3, **info)
    for file in path.glob("*.safetensors"):
        file.write_bytes(b"")
    code, shown = run_json(capsys, "show", path, "--tensors", "--config")
    assert code == 0 and (shown["step"], shown["consumed"], shown["epoch"], shown["host"]) == (3, 72, 1.5, "node1")
    assert shown["groups"]["prototypes"] == {"tensors": 1, "bytes": 120} and list(shown["groups"]) == [
        "prototypes",
        "backbone",
        "optimizer",
    ]
    assert shown["tensors"]["backbone.half"] == {"dtype": "bfloat16", "shape": [5], "files": ["rank-00000.safetensors"]}
    assert shown["config"]["checkpoint"]["keep"] == 9 and "config" not in run_json(capsys, "show", path)[1]
    code, out, _ = run(capsys, "show", path, "--tensors", "--config")
    assert code == 0 and "checkpoint.keep = 9" in out and "started_from  given runs/a, path" in out and "[2, 3, 2, 2]" in out


# diff


def test_diff_of_equal_ones(tmp_path, capsys):
    def save_in(folder, **moment):
        config = {"run": {"folder": folder, "seed": 1}, "checkpoint": {"folder": folder + "/c"}}
        return save_with(tmp_path / folder, 1, **{**moment, "config": config})

    first, second = save_in("a", when="now", host="here", owner="x"), save_in("b", when="then", host="there", owner="y")
    code, out, _ = run(capsys, "diff", first, second)
    moment = "when: now | then\nhost: here | there\nowner: x | y\n"
    places = "config.run.folder: a | b\nconfig.checkpoint.folder: a/c | b/c\n"
    assert code == 0 and out == f"{moment}{places}equal\n"  # two runs that are equal to the bit


def test_diff_names_all_that_differs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparing, "ELEMENTS", 3)  # several blocks of most tensors
    ours, theirs = state(), state()
    theirs["prototypes"].tensor[9, 2] += 0.5
    theirs["backbone.weight"].tensor[0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    theirs["backbone.mask"].tensor[0] = False
    theirs["backbone.half"] = checkpoint.whole(torch.arange(5.0))
    theirs["ema.weight"] = theirs["backbone.weight"]
    del theirs["backbone.count"]
    config = {"run": {"seed": 1, "folder": "a"}}
    checkpoint.save(str(tmp_path / "a"), 1, ours, {"consumed": 24, "config": config}, identities=["x", "y"])
    checkpoint.save(
        str(tmp_path / "b"), 1, theirs, {"consumed": 25, "config": {"run": {"seed": 2, "folder": "a"}}}, identities=["y", "z\n"]
    )
    code, found = run_json(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert code == 1 and not found["equal"] and found["info"] == {"consumed": [24, 25]} and found["config"] == {"run.seed": [1, 2]}
    assert found["tensors"] == {
        "backbone.count": ["int64 []", None],
        "backbone.half": ["bfloat16 [5]", "float32 [5]"],
        "ema.weight": [None, "float32 [4]"],
    }
    assert found["contents"] == {"backbone.mask": 1.0, "backbone.weight": 2.0**-23, "prototypes": 0.5}
    assert found["identities"] == {"counts": [2, 2], "only_in_one": [1, 1], "first_of_these": [["x"], ["z\n"]]}
    code, out, _ = run(capsys, "diff", tmp_path / "a", tmp_path / "b", "--tensors")
    assert code == 1 and "config.run.seed: 1 | 2" in out and "  prototypes: by at most 0.5" in out and out.endswith("different\n")


def test_diff_sees_bits_that_compare_equal_and_numbers_that_do_not(tmp_path):
    def saved(name, values):
        checkpoint.save(str(tmp_path / name), 1, {"w": checkpoint.whole(torch.tensor(values))}, {})
        return looking.one(str(tmp_path / name))

    assert comparing.contents(saved("zero", [0.0]), saved("negative", [-0.0])) == {"w": 0.0}
    assert comparing.contents(saved("a", [1.0, 2.0]), saved("b", [1.0, -2.0])) == {"w": 4.0}
    for length in (1, 7, 8, 9, 17):  # also where eight bytes at a time leave a rest
        for changed in range(length):
            values = torch.arange(length, dtype=torch.uint8)
            other = values.clone()
            other[changed] += 1
            assert comparing._largest(values, other) == 1.0 and comparing._largest(values, values.clone()) is None


def test_diff_of_a_damaged_one_is_a_sentence(tmp_path, capsys):
    first, second = save(str(tmp_path), 1), save(str(tmp_path), 2)
    flip_a_bit(tmp_path / "step-00000002" / "rank-00000.safetensors")
    code, _, error = run(capsys, "diff", first, second)
    assert code == 2 and "have changed since it was written" in error and error.count("\n") == 1


# copy


def test_copy_to_a_store_and_back(ranks, tmp_path, capsys, memory):
    first = ranks(3).run(save, str(tmp_path / "run" / "checkpoints"))[0]
    assert run(capsys, "copy", first, memory)[0] == 0
    assert run(capsys, "copy", tmp_path / "run", memory + "/other/step-00000001")[0] == 0  # a run: its newest; a new name
    assert run(capsys, "verify", memory, memory + "/other/step-00000001")[0] == 0
    assert run(capsys, "copy", memory + "/step-00000001", tmp_path / "back" / "")[0] == 0
    back = tmp_path / "back" / "step-00000001"
    assert sorted(os.listdir(back)) == sorted(os.listdir(first))
    assert all((back / name).read_bytes() == Path(first, name).read_bytes() for name in os.listdir(first))
    assert len(os.listdir(back)) == 5 and all(ranks(2).run(load, str(back)))
    assert run(capsys, "diff", first, back)[0] == 0


def test_copy_into_a_runs_folder_goes_where_the_run_looks(tmp_path, capsys):
    first = save(str(tmp_path / "a"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert run(capsys, "copy", first, tmp_path / "run")[0] == 0
    assert os.listdir(tmp_path / "run") == ["checkpoints"] and checkpoint.locate(str(tmp_path / "run")).info["step"] == 1


@pytest.mark.parametrize("is_remote", [False, True])
def test_copy_overwrites_nothing_and_disturbs_no_save(tmp_path, capsys, memory, is_remote):
    to = memory if is_remote else str(tmp_path / "to")
    first, second = save(str(tmp_path / "from"), 1), save(str(tmp_path / "from"), 2)
    store = checkpoint.store_of(to)
    store.begin("step-00000007")  # of a run that is at work there
    sink = store.create("step-00000007", "rank-00000.safetensors")
    sink.write(memoryview(b"x"))
    sink.close()
    assert run(capsys, "copy", first, to)[0] == 0
    assert len(store.unfinished()) == 1
    code, _, error = run(capsys, "copy", first, to)
    assert code == 2 and "step-00000001 is there already, and nothing is overwritten" in error
    store.begin_beside("step-00000002")
    sink = store.create("step-00000002", "identities.json")
    sink.close()
    code, _, error = run(capsys, "copy", second, to)
    assert code == 2 and "it is being written, or was broken off" in error and len(store.unfinished()) == 2


def test_copy_of_a_damaged_one_leaves_nothing(tmp_path, capsys, memory):
    first = save(str(tmp_path / "from"))
    flip_a_bit(tmp_path / "from" / "step-00000001" / "rank-00000.safetensors")
    for to in (str(tmp_path / "to"), memory):
        code, _, error = run(capsys, "copy", first, to)
        store = checkpoint.store_of(to)
        assert code == 2 and "have changed since it was written" in error and not store.names() and not store.unfinished()


def test_what_changes_on_its_way_is_found_when_it_is_read_back(tmp_path, capsys, memory, monkeypatch):
    first = save(str(tmp_path / "from"))
    commit = {LocalStore: LocalStore.commit, RemoteStore: RemoteStore.commit}

    def damaging(self, name):
        commit[type(self)](self, name)
        if isinstance(self, LocalStore):
            flip_a_bit(tmp_path / "to" / name / "rank-00000.safetensors")
        else:
            at = self._at(name, "rank-00000.safetensors")
            content = bytearray(self.system.cat_file(at))
            content[100] ^= 1
            self.system.pipe_file(at, bytes(content))

    for kind, to in ((LocalStore, str(tmp_path / "to")), (RemoteStore, memory)):
        monkeypatch.setattr(kind, "commit", damaging)
        code, _, error = run(capsys, "copy", first, to)
        assert code == 2 and "is not what was written" in error and "was removed: copy again" in error
        assert not checkpoint.store_of(to).names()


@pytest.mark.parametrize("call", range(1, 8))
def test_a_store_that_fails_at_any_call_leaves_nothing(tmp_path, capsys, memory, monkeypatch, call):
    first = save(str(tmp_path / "from"))
    calls = iter(range(1, 1000))

    def failing(self, name, file, create=RemoteStore.create, **_):
        if next(calls) == call:
            raise OSError("the store is not reachable")
        return create(self, name, file)

    monkeypatch.setattr(RemoteStore, "create", failing)
    code, _, error = run(capsys, "copy", first, memory)
    assert code == (2 if call <= 3 else 0)
    if code:
        assert "(the store is not reachable); nothing is left of the copy" in error and not checkpoint.store_of(memory).names()


def test_ctrl_c_in_a_copy_leaves_nothing(tmp_path, capsys, monkeypatch):
    first = save(str(tmp_path / "from"))

    for place in ("_copy", "_compare"):  # while it is written, and while it is read back

        def interrupt(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(copying, place, interrupt)
            code, _, error = run(capsys, "copy", first, tmp_path / "to")
        assert code == 130 and error == "protoshard: interrupted; nothing was written\n" and os.listdir(tmp_path / "to") == []


def test_copied_files_are_not_world_writable(tmp_path, capsys):
    first, before = save(str(tmp_path / "from")), os.umask(0)
    try:
        assert run(capsys, "copy", first, tmp_path / "to")[0] == 0
    finally:
        os.umask(before)
    modes = [os.stat(os.path.join(at, name)).st_mode for at, _, names in os.walk(tmp_path / "to" / "step-00000001") for name in names]
    assert len(modes) == 3 and not any(mode & stat.S_IWOTH for mode in modes)


# whatever is given


@pytest.mark.parametrize("command", ["list", "verify", "show", "diff", "copy"])
def test_bad_input_is_one_sentence(tmp_path, capsys, command):
    second = [str(tmp_path / "to")] if command in ("diff", "copy") else []
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, sentence in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "file", "cannot be read (Not a directory)"),
        (tmp_path / "empty", "there is no complete checkpoint at"),
        ("memory://nothing/here", "there is no complete checkpoint at"),
        ("nosuch://bucket/run", "cannot be opened"),
        ("memory://", "there is no complete checkpoint at"),
    ):
        code, out, error = run(capsys, command, path, *second)
        assert (code, out) == (2, "") and sentence in error and error.count("\n") == 1, (path, error)


@pytest.mark.parametrize(
    ("to", "sentence"),
    [
        ("to/step-2", "would hold the checkpoint of step 1, and be taken for damaged: call it step-00000001"),
        ("from/step-00000001/", "is there already"),
        ("kept", "is a checkpoint itself"),
        ("file", "Not a directory"),
        ("memory://", "is all of a store"),
        ("nosuch://bucket/run", "cannot be opened"),
    ],
)
def test_places_where_no_copy_can_go(tmp_path, capsys, to, sentence):
    first = save(str(tmp_path / "from"))
    shutil.copytree(first, tmp_path / "kept")
    (tmp_path / "file").write_text("x")
    code, _, error = run(capsys, "copy", first, to if "://" in to else os.path.join(tmp_path, to))
    assert code == 2 and sentence in error and error.count("\n") == 1


def test_the_commands_start_quickly_and_join_no_ranks(tmp_path):
    save(str(tmp_path), 1)
    code = "import sys; from pipeline.cli import main; code = main(['checkpoint', 'verify', sys.argv[1]]); import torch.distributed as d; "
    code += "print(d.is_initialized(), [m for m in ('nvidia.dali', 'deepspeed', 'ray') if m in sys.modules]); sys.exit(code)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.endswith("sound\nFalse []\n") and not done.stderr, done
    assert time.monotonic() - began < 60  # about 2 s on a quiet machine
