"""Checkpoints from strangers, whose checksums are right and whose contents lie: one sentence, little memory, and nothing outside the folder
is read."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import checkpoint
from pipeline.checkpoint import checksum
from tests.pipeline.checkpoint.states import edit_manifest, save, shared
from tests.pipeline.checkpoint.test_damage import save_in_the_first_format

HUGE = 10**18
FILE = "rank-00000.safetensors"


def tensor(values, name="prototypes"):
    return values["tensors"][name]


def rename_file(name):
    def change(values):
        values["files"][name] = values["files"].pop(FILE)
        for entry in values["tensors"].values():
            for part in entry["parts"]:
                part[0] = name

    return change


def with_part(*part):
    return lambda values: tensor(values)["parts"].append([FILE, *part])


LIES = {
    "a huge shape": lambda values: tensor(values).update(shape=[HUGE, HUGE]),
    "a huge part": lambda values: tensor(values).update(shape=[HUGE], parts=[[FILE, 0, 0, HUGE]]),
    "a huge file": lambda values: values["files"][FILE].update(bytes=HUGE),
    "a file without checksums": lambda values: values["files"][FILE].update(checksums=""),
    "checksums that are a list": lambda values: values["files"][FILE].update(checksums=["0"] * 16),
    "checksums that are none": lambda values: values["files"][FILE].update(checksums="Z" * 16),
    "a missing part": lambda values: tensor(values).update(shape=[11, 3]),
    "no part": lambda values: tensor(values).update(parts=[]),
    "no part of nothing": lambda values: tensor(values).update(shape=[0, HUGE], parts=[]),
    "a shape that overflows": lambda values: tensor(values).update(shape=[0, HUGE, HUGE], parts=[[FILE, 0, 0, 0]]),
    "a hundred axes": lambda values: tensor(values).update(shape=[1] * 100 + [30]),
    "overlapping parts": with_part(0, 3, 3),
    "the same part twice": lambda values: tensor(values)["parts"].extend(tensor(values)["parts"]),
    "parts behind the file": lambda values: tensor(values)["parts"][0].__setitem__(1, 10**6),
    "a negative offset": lambda values: tensor(values)["parts"][0].__setitem__(1, -8),
    "an offset that is a fraction": lambda values: tensor(values)["parts"][0].__setitem__(1, 8.5),
    "a start that is true": lambda values: tensor(values)["parts"][0].__setitem__(2, True),
    "a count that is text": lambda values: tensor(values)["parts"][0].__setitem__(3, "30"),
    "a part of two numbers": lambda values: tensor(values).update(parts=[[FILE, 0, 0]]),
    "a part that is a number": lambda values: tensor(values).update(parts=[7]),
    "a file that is a list": lambda values: tensor(values).update(parts=[[[FILE], 0, 0, 30]]),
    "a file that is not named": lambda values: tensor(values)["parts"][0].__setitem__(0, "rank-00009.safetensors"),
    "two tensors in the same bytes": lambda values: values["tensors"].update({f"copy {n}": tensor(values) for n in range(99)}),
    "an unknown dtype": lambda values: tensor(values).update(dtype="F4"),
    "a dtype that is a list": lambda values: tensor(values).update(dtype=["F32"]),
    "a wider dtype": lambda values: tensor(values).update(dtype="F64"),
    "a tensor that is a list": lambda values: values["tensors"].update(prototypes=[]),
    "tensors that are a list": lambda values: values.update(tensors=[]),
    "files that are a list": lambda values: values.update(files=[]),
    "no tensors": lambda values: values.pop("tensors"),
    "no files": lambda values: values.pop("files"),
    "no step": lambda values: values.pop("step"),
    "a step that is text": lambda values: values.update(step="1"),
    "a step that is negative": lambda values: values.update(step=-1),
    "a step that is huge": lambda values: values.update(step=10**40),
    "a step of 5000 digits": lambda values: values.update(step="DIGITS"),
    "a count of samples that is text": lambda values: values.update(consumed="1"),
    "a configuration that is text": lambda values: values.update(config="x"),
    "a section that is text": lambda values: values.update(config={"run": "x"}),
    "figures that are a list": lambda values: values.update(figures=[1]),
    "a beginning that says nothing": lambda values: values.update(started_from={}),
    "deep": lambda values: values.update(config={"run": {"x": json.loads("[" * 90 + "]" * 90)}}),
    "very deep": lambda values: values.update(config="DEEP"),
    "a path as a file": rename_file("../step-00000001/rank-00000.safetensors"),
    "an absolute path": rename_file("/etc/passwd"),
    "the folder above": rename_file(".."),
    "a name with a NUL": rename_file("rank\0"),
    "a name with a line": rename_file("rank-00000.safetensors\n"),
    "no name": rename_file(""),
    "a long name": rename_file("x" * 5000),
    "the manifest as a file": rename_file(checkpoint.MANIFEST),
    "format 0": lambda values: values.update(format=0),
    "format 1": lambda values: values.update(format=1),
    "format as text": lambda values: values.update(format="2"),
    "format as a list": lambda values: values.update(format=[2] * 10**4),
    "no format": lambda values: values.pop("format"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_a_sentence(tmp_path, lie, monkeypatch):
    path = save(str(tmp_path), 1)
    edit_manifest(path, LIES[lie], {"DIGITS": "9" * 5000, "DEEP": "[" * 10**5 + "]" * 10**5})
    opened = []
    original = os.open
    monkeypatch.setattr(os, "open", lambda name, *rest, **more: opened.append(str(name)) or original(name, *rest, **more))
    tracemalloc.start()
    with pytest.raises(ValueError, match="cannot be used") as raised:
        checkpoint.locate(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()
    assert len(str(raised.value)) < 600 + 2 * len(path) and str(raised.value).isprintable()
    assert all(name.startswith(f"{path}/") for name in opened)
    with pytest.raises(ValueError, match="none of the 1 checkpoints"):
        checkpoint.newest(str(tmp_path))


def test_a_newer_format_is_said_and_a_huge_one_too(tmp_path):
    path = save(str(tmp_path), 1)
    for version in (3, 10**300):
        edit_manifest(path, lambda values, version=version: values.update(format=version))
        with pytest.raises(ValueError, match="use a newer version") as raised:
            checkpoint.newest(str(tmp_path))
        assert len(str(raised.value)) < 400 + len(path)


def test_a_key_that_comes_twice(tmp_path):
    path = save(str(tmp_path), 1)
    edit_manifest(path, lambda values: values.update(x="TWICE"), {"TWICE": '1, "step": 9'})
    with pytest.raises(ValueError, match="it is no JSON"):
        checkpoint.locate(path)


def rewritten(path, content):
    """identities.json with other bytes, for which the manifest vouches."""
    with open(f"{path}/identities.json", "wb") as file:
        file.write(content)
    sums = "".join(checksum.of(content[at : at + (1 << 20)]) for at in range(0, len(content), 1 << 20))
    edit_manifest(path, lambda values: values["files"]["identities.json"].update(bytes=len(content), checksums=sums))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{}", b"7", b"null", b'"name"', b"[1, 2]", b'["a", null]', b'["a"]', b"\xff\xfe", b"[" * 100_000, b"9" * 5000),
        b"[" + b'"",' * 10**6 + b'""]',
    ],
)
def test_identities_that_are_none(tmp_path, content):
    path = save(str(tmp_path), 1)
    rewritten(path, content)
    with pytest.raises(ValueError, match="is no list of 10 names of identities"):
        checkpoint.locate(path).identities()


def test_identities_that_are_cut_off_later(tmp_path):
    path = save(str(tmp_path), 1)
    saved = checkpoint.locate(path)
    os.truncate(f"{path}/identities.json", 3)
    with pytest.raises(ValueError, match=r"identities\.json has 3 bytes instead of"):
        saved.identities()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", FILE, "step"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    path = save(str(tmp_path_factory.mktemp("one")), 1)
    with open(f"{path}/{checkpoint.MANIFEST}", "rb") as file:
        return path, file.read()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_change_of_a_manifest(one, data):
    """Any value in it becomes any other: it is refused, or what it says of tensors still holds for the files."""
    path, content = one
    with open(f"{path}/{checkpoint.MANIFEST}", "wb") as file:
        file.write(content)

    def change(values):
        at, key = values, data.draw(st.sampled_from(sorted(set(values) - {"checksum"})))
        while isinstance(at[key], dict | list) and at[key] and data.draw(st.booleans()):
            at = at[key]
            key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        at[key] = data.draw(VALUES)

    edit_manifest(path, change)
    try:
        saved = checkpoint.locate(path)
        assert all(saved.whole(name).shape == saved.shape(name) for name in saved)
        saved.identities()
    except ValueError as error:
        assert len(str(error)) < 600 + 3 * len(path)


FIRST_LIES = {
    "a huge shape": lambda plan: plan.state_dict_metadata["backbone.weight"].__setattr__("size", torch.Size([2**39, 2**39])),
    "an offset outside": lambda plan: next(iter(plan.storage_data.values())).__setattr__("offset", 10**9),
    "a negative offset": lambda plan: next(iter(plan.storage_data.values())).__setattr__("offset", -5),
    "a length outside": lambda plan: next(iter(plan.storage_data.values())).__setattr__("length", 10**12),
    "a path": lambda plan: next(iter(plan.storage_data.values())).__setattr__("relative_path", "../x"),
    "another file": lambda plan: next(iter(plan.storage_data.values())).__setattr__("relative_path", "protoshard.json"),
    "a name that is a number": lambda plan: plan.state_dict_metadata.update({7: plan.state_dict_metadata["backbone.weight"]}),
    "no chunks": lambda plan: plan.state_dict_metadata["backbone.weight"].__setattr__("chunks", []),
    "chunks twice": lambda plan: plan.state_dict_metadata["backbone.weight"].chunks.extend(
        plan.state_dict_metadata["backbone.weight"].chunks
    ),
}


@pytest.mark.parametrize("lie", FIRST_LIES)
def test_a_lie_in_the_first_format(tmp_path, lie):
    path = save_in_the_first_format(tmp_path, 1)
    with open(f"{path}/.metadata", "rb") as file:
        plan = pickle.load(file)
    if lie == "a huge shape":
        chunk = plan.state_dict_metadata["backbone.weight"].chunks[0]
        object.__setattr__(chunk, "sizes", torch.Size([2**39, 2**39]))
    change = FIRST_LIES[lie]
    change(plan)
    content = pickle.dumps(plan)
    with open(f"{path}/.metadata", "wb") as file:
        file.write(content)
    with open(f"{path}/{checkpoint.MANIFEST}") as file:
        info = json.load(file)
    info["files"][".metadata"] = [len(content), zlib.crc32(content)]
    with open(f"{path}/{checkpoint.MANIFEST}", "w") as file:
        json.dump(info, file)
    if lie == "chunks twice":
        assert torch.equal(checkpoint.locate(path).whole("backbone.weight"), shared(1)["backbone.weight"])
        return
    with pytest.raises(ValueError, match=r"\.metadata"):
        checkpoint.locate(path)
