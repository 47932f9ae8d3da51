"""Pickles of strangers: plain values come through, and whatever else a pickle can do is refused before it costs anything."""

import collections
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
    with pytest.raises(
        ValueError, match=rf"^some/file: it cannot be read \(.*{reason}.*\); expected a pickle of plain values\.$"
    ) as caught:
        load(data, "some/file", TYPES)
    assert "\n" not in str(caught.value) and str(caught.value).isascii() and len(str(caught.value)) < 300


keys = st.text(st.characters(exclude_categories=["Cs"])) | st.binary() | st.booleans() | st.none() | st.integers(-(2**63), 2**64 - 1)
scalars = keys | st.floats(allow_nan=False)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.tuples(inner) | st.tuples(inner, inner, inner, inner) | st.dictionaries(keys, inner),
    max_leaves=30,
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


MANY = 10**5
ATTACKS = {
    "system": (b"cos\nsystem\n(S'touch pwned'\ntR.", r"os\.system"),
    "system by STACK_GLOBAL": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x01x\x85R.", r"posix\.system"),
    "an attribute of what the table has": (b"\x80\x04\x8c\x01m\x8c\x0eThing.__init__\x93.", r"m\.Thing\.__init__"),
    "a name of other types": (b"\x80\x04K\x01K\x02\x93.", "no name"),
    "a name with escape sequences": (b"c\x1b[2J\nx\ry\n.", r"\\x1b\[2J\.x\\ry, which"),
    "INST": (b"(im\nThing\n.", "opcode b'i'"),
    "OBJ": (b"(" + THING + b"o.", "opcode b'o'"),
    "NEWOBJ_EX": (b"\x80\x04" + THING + b")}\x92.", "opcode"),
    "a registered extension": (b"\x82\x01.", "opcode"),
    "a persistent object": (b"Pid\n.", "opcode b'P'"),
    "a buffer from elsewhere": (b"\x80\x05\x97.", "opcode"),
    "sets": (b"\x80\x04\x8f.", "opcode"),
    "a call of a plain value": (b"K\x01)R.", "no function"),
    "a call of what a call gave": (THING + b")R)R.", "no function"),
    "a call with a list": (THING + b"]R.", "no function"),
    "a state for the class": (THING + b"}b.", "changes a _Named"),
    "a state for a plain value": (b"]}b.", "changes a list"),
    "two states": (THING + b")R}b}b.", "changes a Thing"),
    "a state after use": (THING + b")Rq\x00h\x00}b.", "changes a Thing"),
    "items of an object": (THING + b")RK\x01K\x02s.", "sets items of a Thing"),
    "appending to an object": (THING + b")RK\x01a.", "appends to a Thing"),
    "a high index": (b"K\x01r\xff\xff\xff\x0f0.", "opcode b'0'"),
    "a higher index": (b"K\x01p" + b"9" * 40 + b"\n.", "40 characters"),
    "a negative index": (b"g-1\n.", "damaged: KeyError"),
    "a long text that is not there": (b"\x8d" + struct.pack("<Q", 2**62) + b"abc.", "ends too early"),
    "long bytes that are not there": (b"\x8e" + struct.pack("<Q", 2**33) + b"abc.", "ends too early"),
    "a long bytearray that is not there": (b"\x96" + struct.pack("<Q", 2**64 - 1) + b"abc.", "ends too early"),
    "a negative length": (b"T\xff\xff\xff\xff.", "ends too early"),
    "a large integer": (b"\x8b" + struct.pack("<i", MANY) + b"\x7f" * MANY + b".", "integer of 100,000 bytes"),
    "a long number": (b"I" + b"9" * MANY + b"\n.", "100,000 characters"),
    "another long number": (b"L" + b"9" * MANY + b"L\n.", "100,001 characters"),
    "a number that is none": (b"I0x1f\n.", "damaged: ValueError"),
    "a list in itself": (b"]q\x00h\x00a.", "one list in two places"),
    "a dictionary in itself": (b"}q\x00K\x01h\x00s.", "one dict in two places"),
    "laughs of lists": (b"]\x94" + b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(60)) + b".", "one list in two places"),
    "laughs of tuples": (b")\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(60)) + b".", "one tuple in two places"),
    "laughs of a long tuple": (b"(" + b"K\x01" * 17 + b"tq\x00" + b"h\x00\x86.", "one tuple in two places"),
    "deep tuples": (b")" + b"\x85" * MANY + b".", "more than 32 lists"),
    "deep lists": (b"]" * 1000 + b"a" * 999 + b".", "more than 32 lists"),
    "deep arguments": (THING + b")" + b"\x85" * 1000 + b"R.", "more than 32 lists"),
    "a deep state": (THING + b")R" + b")" + b"\x85" * 1000 + b"b.", "more than 32 lists"),
    "a deep key": (b"})" + b"\x85" * MANY + b"Ns.", "a tuple as a key"),
    "a list as a key": (b"}]Ns.", "a list as a key"),
    "half an item": (b"}(Nu.", "damaged: ValueError"),
    "nothing but lists": (b"]" * 3 * MANY, "more than 200,000 opcodes"),
    "text that is no UTF-8": (b"\x8c\x01\xff.", "damaged: UnicodeDecodeError"),
    "a mark that is not there": (b"t.", "damaged: IndexError"),
    "reaching below a mark": (b"K\x01(\x85.", "takes more than there is"),
    "nothing on the stack": (b"q\x00.", "damaged: IndexError"),
    "no value": (b".", "damaged: ValueError"),
    "two values": (b"NN.", "damaged: ValueError"),
    "no end": (b"N", "ends too early"),
    "no end of a line": (b"I12", "ends too early"),
    "nothing": (b"", "ends too early"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_end_in_a_sentence_and_in_little_memory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plain_pickle, "OPCODES", 200_000)
    data, reason = ATTACKS[name]
    tracemalloc.start()
    try:
        refused(data, reason)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY(len(data)) and not os.listdir(tmp_path)


def MEMORY(size: int) -> int:  # noqa: N802
    """Bytes that a pickle of this size may take."""
    return 200 * min(size, plain_pickle.OPCODES) + 4 * size + 200_000


def test_a_high_memo_index_costs_nothing():
    """9 bytes, for which pickle.Unpickler asks for 2.8 GB."""
    tracemalloc.start()
    assert load(b"K\x01r\xff\xff\xff\x0a.", "some/file", TYPES) == 1
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_nothing_of_a_load_stays(monkeypatch):
    """States, items and attributes, for every kind of target: the table and its classes are as before."""
    before = dict(vars(Thing)), dict(TYPES)
    for target in (THING, THING + b")R", THING + b")R}b", b"cm\nconstant\n", b"cm\nnote\n"):
        for change in (b"}S'states'\nK\x01sb", b"N}S'x'\nK\x01s\x86b", b"S'x'\nK\x01s", b"K\x01a", b"(K\x01e", b"(K\x01K\x02u"):
            try:
                load(target + change + b".", "some/file", TYPES)
            except ValueError as error:
                assert str(error).startswith("some/file: ")
    assert (dict(vars(Thing)), TYPES) == before


def test_what_an_object_of_the_table_raises_is_a_sentence():
    class Narrow:
        def __init__(self, number: int) -> None:
            if number == 2:
                raise plain_pickle.Refused("2 is not allowed")

    for data, reason in ((b"K\x02\x85R.", "2 is not allowed"), (b")R.", "damaged: TypeError")):
        with pytest.raises(ValueError, match=rf"^some/file: it cannot be read \(.*{reason}\); expected"):
            load(b"cm\nNarrow\n" + data, "some/file", {("m", "Narrow"): Narrow})


SEEDS = [
    pickle.dumps(value, protocol)
    for protocol in range(6)
    for value in (
        [1, -(2**40), 2.5, None, True, "text", {"a": [(1, 2), ("x",)]}],
        ("a", b"b", [{}, [[]]] * 1),
        collections.OrderedDict(a=1),
    )
] + [b"(" + THING + b"(K\x01tRq\x00(K\x02tbcm\nconstant\nh\x00cm\nnote\n(K\x07tRl."]
OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
ARGUMENTS = [
    b"",
    b"\0",
    b"\x01",
    b"\xff\xff\xff\x7f",
    b"\x02\0\0\0ab",
    b"m\nThing\n",
    b"m\nnote\n",
    b"os\nsystem\n",
    b"12\n",
    b"'a'\n",
    b"\x03abc",
]
strings = st.lists(
    st.sampled_from(OPCODES) | st.sampled_from(ARGUMENTS) | st.sampled_from([THING, b")R", b"}b", b"h\0", b"]", b"(", b"N"]), max_size=40
)


def attack(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads and walks; never another error than ValueError, never more memory than the size allows, and no call outside the table."""
    for name in ("system", "popen"):
        monkeypatch.setattr(os, name, None)
    before = dict(vars(Thing))
    tracemalloc.start()
    try:
        repr(load(data, "some/file", TYPES))
    except ValueError as error:
        assert str(error).startswith("some/file: it cannot be read (") and "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY(len(data)) and dict(vars(Thing)) == before


@given(parts=strings)
@settings(deadline=None, max_examples=200)
def test_opcodes_in_any_order(parts):
    with pytest.MonkeyPatch.context() as monkeypatch:
        attack(b"".join(parts) + b".", monkeypatch)


def mutated(rng: random.Random) -> bytes:
    """A sound pickle with a few bytes changed, taken out, put in or repeated."""
    data = bytearray(rng.choice(SEEDS))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.randint(0, 4))
        piece = rng.choice([rng.randbytes(rng.randint(0, 5)), rng.choice(OPCODES), rng.choice(ARGUMENTS), bytes(data[at:end]) * 2])
        data[at:end] = piece
    return bytes(data) + b"."


def attack_with(count: int) -> None:
    rng = random.Random(0)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for _ in range(count):
            attack(mutated(rng), monkeypatch)


def test_damaged_pickles():
    attack_with(1_000)


@pytest.mark.long
def test_10_000_damaged_pickles():
    attack_with(10_000)
