"""Pickles of strangers: plain values come through, and whatever else a pickle can do is refused before it costs anything."""

import collections
import math
import os
import pickle
import pickletools
import random
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import plain_pickle
from pipeline.plain_pickle import load


class Thing:
    """Stands for tests.thing.Thing; read-only but for its state."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.states: list[object] = []

    def __setstate__(self, state: object) -> None:
        self.states.append(state)


CALLS: list[tuple[object, ...]] = []
TYPES = {("m", "Thing"): Thing, ("m", "note"): lambda *arguments: CALLS.append(arguments), ("m", "constant"): "constant"}
THING = b"cm\nThing\n"


def refused(data: bytes, reason: str = "") -> None:
    with pytest.raises(ValueError, match=rf"^some/file: it cannot be read \(.*{reason}.*\); expected a pickle of plain values\.$") as caught:
        load(data, "some/file", TYPES)
    assert "\n" not in str(caught.value) and str(caught.value).isascii() and len(str(caught.value)) < 300


keys = st.text(st.characters(exclude_categories=["Cs"])) | st.binary() | st.booleans() | st.none() | st.integers(-(2**63), 2**64 - 1)
scalars = keys | st.floats(allow_nan=False)
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.tuples(inner) | st.tuples(inner, inner, inner, inner) | st.dictionaries(keys, inner), max_leaves=30
)


@pytest.mark.parametrize("protocol", range(2, 6))
@settings(deadline=None)
@given(value=values)
def test_plain_values_come_through(protocol, value):
    types = {("_codecs", "encode"): lambda text, _: text.encode("latin1"), ("__builtin__", "bytes"): bytes}
    assert load(pickle.dumps(value, protocol), "some/file", types) == value


@settings(deadline=None)
@given(value=values.filter(lambda value: b"\0" not in repr(value).encode()))
def test_protocol_0(value):
    types = {("_codecs", "encode"): lambda text, _: text.encode("latin1"), ("__builtin__", "bytes"): bytes}
    assert load(pickle.dumps(value, 0), "some/file", types) == value
    assert load(pickle.dumps(value, 1), "some/file", types) == value


def test_objects_of_the_table_get_arguments_and_a_state_and_constants_are_values():
    made = load(b"\x80\x04(" + THING + b"(K\x01tRq\x00(K\x02tbcm\nconstant\nh\x00l.", "some/file", TYPES)
    assert made[0].arguments == (1,) and made[0].states == [(2,)] and made[1] == "constant" and made[2] is made[0]
    assert load(b"\x80\x04" + THING + b")\x81.", "some/file", TYPES).states == []


def test_text_of_python_2_is_bytes():
    assert load(b"\x80\x02(U\x02a\xffT\x01\0\0\0bS'c\\n'\nl.", "some/file", TYPES) == [b"a\xff", b"b", b"c\n"]


def nested(levels: int) -> bytes:
    return b"]" + b"\x85" * levels + b"."


def laughs(levels: int) -> bytes:
    """A list of 2 ** levels elements when walked, in a few bytes for each level."""
    return b"]\x94" + b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(levels)) + b"."
