"""Pickles of strangers, read by a machine that knows only plain values and a closed table of stand-ins.

Nothing is imported, no attribute is set, and memory stays in proportion to the file. `pickle.Unpickler` promises none of it: a high memo
index in 9 bytes costs it gigabytes, and what BUILD does to a class that `find_class` gave stays for the rest of the process."""

from __future__ import annotations

import codecs
import io
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

OPCODES = 2_000_000  # each makes 200 bytes at most; a longer file may have one more for every 64 bytes
DEPTH = 32  # of lists, tuples and dictionaries in each other
SHARED = 16  # length of the longest tuple that may stand in several places: sizes of a tensor, yes, but not what multiplies
INTEGER_BYTES = 9  # 64 bits, with or without a sign
NUMBER_CHARACTERS = 32


class Refused(ValueError):  # noqa: N818
    """Why a pickle is refused; `load` makes it a sentence. Objects of `types` raise it on what they cannot stand for."""


def load(data: bytes | BinaryIO, path: str, types: Mapping[tuple[str, str], Any], expected: str = "a pickle of plain values") -> Any:
    """The value of a pickle of any protocol: None, numbers, str, bytes (also for bytearray, and for str of Python 2), lists, tuples,
    dictionaries, and whatever `types` has for a (module, name).

    A callable in `types` is called with the arguments for which the pickle calls the original (never by keyword), and returns an object of
    its own or an immutable one; if that object has a `__setstate__`, it may get a state, once, before anything refers to it. What is not
    callable is a constant. Values, arguments and states are trees of at most DEPTH containers in each other: no cycles, and no list,
    dictionary or long tuple in two places, so that walking, copying or printing them takes time in proportion to the file.

    Raises ValueError with the path for anything else: damage, a name that `types` lacks, whatever an object of `types` raises.
    """
    try:
        if isinstance(data, bytes):
            return _Machine(io.BytesIO(data), len(data), types).run()
        return _Machine(data, os.fstat(data.fileno()).st_size, types).run()
    except Refused as error:
        reason = str(error)
    except Exception as error:  # what opcodes and stand-ins raise on values that they do not expect
        reason = f"it is damaged: {type(error).__name__}"
    raise ValueError(f"{path}: it cannot be read ({reason}); expected {expected}.")


class _Named:
    """A name of the table, for objects to be made of. What the table has is never a value itself, so nothing can be done to it."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make


class _Machine:
    def __init__(self, file: BinaryIO, size: int, types: Mapping[tuple[str, str], Any]) -> None:
        self.read, self.line = file.read, file.readline
        self.size = size
        self.types = types
        self.stack: list[Any] = []
        self.marks: list[int] = []  # lengths of the stack
        self.memo: dict[int, Any] = {}
        self.new: dict[int, Any] = {}  # objects by id that may still get a state

    def run(self) -> Any:
        read, memo, stack, actions = self.read, self.memo, self.stack, _ACTIONS
        for _ in range(OPCODES + self.size // 64):
            opcode = read(1)
            if opcode == b"\x94":  # MEMOIZE and BINPUT, here because they are a third of all opcodes
                memo[len(memo)] = stack[-1]
            elif opcode == b"q":
                memo[read(1)[0]] = stack[-1]
            elif opcode == b".":
                (value,) = stack
                return _checked(value)
            elif action := actions.get(opcode):
                action(self)
            else:
                raise Refused(f"it holds the opcode {opcode!r}, which plain values do not need" if opcode else "it ends too early")
        raise Refused(f"it has more than {OPCODES:,} opcodes, with little in them")

    def exactly(self, size: int) -> bytes:
        piece = self.read(size) if size <= self.size else b""
        if len(piece) != size:
            raise Refused("it ends too early")
        return piece

    def unsigned(self, size: int) -> int:
        return int.from_bytes(self.exactly(size), "little")

    def sized(self, size: int) -> bytes:
        """Bytes behind their length, which itself takes `size` bytes."""
        length = self.unsigned(size)
        return self.exactly(length)

    def text(self) -> bytes:
        """A line without its end."""
        line = self.line()
        if line[-1:] != b"\n":
            raise Refused("it ends too early")
        return line[:-1]

    def number(self) -> bytes:
        text = self.text()
        if len(text) > NUMBER_CHARACTERS:
            raise Refused(f"it holds a number of {len(text):,} characters")
        return text

    def pop(self) -> Any:
        return self.popped(1)[0]

    def popped(self, count: int) -> tuple[Any, ...]:
        stack = self.stack
        start = len(stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise Refused("it is damaged: an opcode takes more than there is")
        items = tuple(stack[start:])
        del stack[start:]
        return items

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def integer(self, data: bytes) -> int:
        if len(data) > INTEGER_BYTES:
            raise Refused(f"it holds an integer of {len(data):,} bytes")
        return int.from_bytes(data, "little", signed=True)

    def decimal(self) -> int:
        """INT, which also spells the booleans of protocols 0 and 1."""
        text = self.number()
        return text == b"01" if text in (b"00", b"01") else int(text)

    def quoted(self) -> bytes:
        text = self.text()
        if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
            raise Refused("it is damaged: a string without quotes")
        return codecs.escape_decode(text[1:-1])[0]

    def named(self, module: Any, name: Any) -> Any:
        if not (type(module) is str and type(name) is str):
            raise Refused("it asks for something that has no name")
        if (module, name) not in self.types:
            raise Refused(f"it asks for {ascii(f'{module}.{name}')[1:-1]:.80}, which it does not need")
        entry = self.types[module, name]
        return _Named(entry) if callable(entry) else entry

    def recalled(self, index: int) -> Any:
        value = self.memo[index]
        kind = type(value)
        if kind is list or kind is dict or (kind is tuple and (len(value) > SHARED or any(type(part) in _CONTAINERS for part in value))):
            raise Refused(f"it has one {kind.__name__} in two places")
        self.new.pop(id(value), None)
        return value

    def memorize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Refused(f"it appends to a {type(target).__name__}")
        target.extend(items)

    def set_items(self, target: Any, items: Sequence[Any]) -> dict[Any, Any]:
        if type(target) is not dict:
            raise Refused(f"it sets items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) in (*_CONTAINERS, float):
                raise Refused(f"it has a {type(key).__name__} as a key")
            target[key] = value
        return target

    def make(self) -> Any:
        """REDUCE and NEWOBJ."""
        named, arguments = self.popped(2)
        if not (type(named) is _Named and type(arguments) is tuple):
            raise Refused("it calls something that is no function")
        value = named.make(*_checked(arguments))
        if hasattr(type(value), "__setstate__"):
            self.new[id(value)] = value
        return value

    def build(self) -> None:
        state = self.pop()
        if self.new.pop(id(self.stack[-1]), None) is None:
            raise Refused(f"it changes a {type(self.stack[-1]).__name__}")
        self.stack[-1].__setstate__(_checked(state))


_CONTAINERS = (list, tuple, dict)


def _checked(value: Any) -> Any:
    """The same value, or Refused for too deep a tree. No container is in two places, so that all calls together look at each once."""
    level = [value] if type(value) in _CONTAINERS else []
    for _ in range(DEPTH + 1):
        inner = [outer.values() if type(outer) is dict else outer for outer in level]
        level = [part for parts in inner for part in parts if type(part) in _CONTAINERS]
        if not level:
            return value
    raise Refused(f"it has more than {DEPTH} lists in each other")


def _value(of: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    """An opcode that puts a value on the stack."""
    return lambda machine: machine.stack.append(of(machine))


_ACTIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.exactly(1),  # PROTO
    b"\x95": lambda m: m.exactly(8),  # FRAME, which only says how much may be read ahead
    b"(": lambda m: m.marks.append(len(m.stack)),  # MARK
    b"N": _value(lambda m: None),  # NONE
    b"\x88": _value(lambda m: True),  # NEWTRUE
    b"\x89": _value(lambda m: False),  # NEWFALSE
    b"I": _value(_Machine.decimal),  # INT
    b"L": _value(lambda m: int(m.number().rstrip(b"L"))),  # LONG
    b"J": _value(lambda m: m.integer(m.exactly(4))),  # BININT
    b"K": _value(lambda m: m.unsigned(1)),  # BININT1
    b"M": _value(lambda m: m.unsigned(2)),  # BININT2
    b"\x8a": _value(lambda m: m.integer(m.sized(1))),  # LONG1
    b"\x8b": _value(lambda m: m.integer(m.sized(4))),  # LONG4
    b"F": _value(lambda m: float(m.number())),  # FLOAT
    b"G": _value(lambda m: struct.unpack(">d", m.exactly(8))[0]),  # BINFLOAT
    b"S": _value(_Machine.quoted),  # STRING
    b"U": _value(lambda m: m.sized(1)),  # SHORT_BINSTRING
    b"T": _value(lambda m: m.sized(4)),  # BINSTRING
    b"C": _value(lambda m: m.sized(1)),  # SHORT_BINBYTES
    b"B": _value(lambda m: m.sized(4)),  # BINBYTES
    b"\x8e": _value(lambda m: m.sized(8)),  # BINBYTES8
    b"\x96": _value(lambda m: m.sized(8)),  # BYTEARRAY8
    b"V": _value(lambda m: m.text().decode("raw_unicode_escape")),  # UNICODE
    b"\x8c": _value(lambda m: m.sized(1).decode()),  # SHORT_BINUNICODE
    b"X": _value(lambda m: m.sized(4).decode()),  # BINUNICODE
    b"\x8d": _value(lambda m: m.sized(8).decode()),  # BINUNICODE8
    b")": _value(lambda m: ()),  # EMPTY_TUPLE
    b"\x85": _value(lambda m: m.popped(1)),  # TUPLE1
    b"\x86": _value(lambda m: m.popped(2)),  # TUPLE2
    b"\x87": _value(lambda m: m.popped(3)),  # TUPLE3
    b"t": _value(lambda m: tuple(m.since_mark())),  # TUPLE
    b"]": _value(lambda m: []),  # EMPTY_LIST
    b"l": _value(_Machine.since_mark),  # LIST
    b"a": lambda m: m.extend([m.pop()]),  # APPEND
    b"e": lambda m: m.extend(m.since_mark()),  # APPENDS
    b"}": _value(lambda m: {}),  # EMPTY_DICT
    b"d": _value(lambda m: m.set_items({}, m.since_mark())),  # DICT
    b"s": _value(lambda m: m.set_items(items=m.popped(2), target=m.pop())),  # SETITEM
    b"u": _value(lambda m: m.set_items(items=m.since_mark(), target=m.pop())),  # SETITEMS
    b"p": lambda m: m.memorize(int(m.number())),  # PUT
    b"q": lambda m: m.memorize(m.unsigned(1)),  # BINPUT
    b"r": lambda m: m.memorize(m.unsigned(4)),  # LONG_BINPUT
    b"\x94": lambda m: m.memorize(len(m.memo)),  # MEMOIZE
    b"g": _value(lambda m: m.recalled(int(m.number()))),  # GET
    b"h": _value(lambda m: m.recalled(m.unsigned(1))),  # BINGET
    b"j": _value(lambda m: m.recalled(m.unsigned(4))),  # LONG_BINGET
    b"c": _value(lambda m: m.named(m.text().decode(), m.text().decode())),  # GLOBAL
    b"\x93": _value(lambda m: m.named(*m.popped(2))),  # STACK_GLOBAL
    b"R": _value(_Machine.make),  # REDUCE
    b"\x81": _value(_Machine.make),  # NEWOBJ
    b"b": _Machine.build,  # BUILD
}
