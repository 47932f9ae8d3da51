"""`--set section.field=value`: texts become values of the fields' types, and the sections check them again."""

from __future__ import annotations

import ast
import difflib
import itertools
import math
import types
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dali_loaders.augment_config import AugmentConfig
from partial_fc import losses
from partial_fc.fields import hint_at
from partial_fc.losses import Loss
from pipeline.config import RENAMED, TrainConfig, with_tuples

BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def override(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """`config` with `section.field=value` overrides applied. ValueError with one sentence names the first that cannot be."""
    # The loss is chosen first: chosen last, it would undo what was set of its fields. So is data.augment, because "data" sorts before
    # "data.augment". Fields of a section are set together, because some go only with others.
    ordered = sorted(map(_split, overrides), key=lambda change: (change[0] != "loss", change[0].rpartition(".")[0]))
    for section, changes in itertools.groupby(ordered, key=lambda change: change[0].rpartition(".")[0]):
        config = _set(config, section.split(".") if section else [], list(changes), config)
    return config


def _split(override: str) -> tuple[str, str]:
    """(path of the field, text of its value)."""
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise ValueError(f"--set takes section.field=value, but got {override!r}")
    path = path.strip()
    if path in RENAMED:
        raise ValueError(f"--set {path}: this field is now {RENAMED[path]}")
    return path, text.strip()


def _set(part: Any, section: list[str], changes: list[tuple[str, str]], whole: TrainConfig) -> Any:
    """`part`, of `whole`, with fields of one section below it replaced, all at once, because the values allowed for one can depend on
    another; the dataclasses on the way check their values again."""
    if section:
        value, _ = _field(part, section[0], changes[0][0], whole)
        if not is_dataclass(value):
            raise ValueError(f"--set {changes[0][0]}: {section[0]!r} has no fields of its own")
        return replace(part, **{section[0]: _set(value, section[1:], changes, whole)})
    values: dict[str, Any] = {}
    for path, text in changes:
        name = path.rpartition(".")[2]
        value, kind = _field(part, name, path, whole)
        if kind is Loss:
            values[name] = losses.build(text)
        elif kind is AugmentConfig:
            values[name] = AugmentConfig.named(text)
        elif is_dataclass(value):
            raise ValueError(f"--set {path}: this is a section: set one of its fields, {', '.join(item.name for item in fields(value))}")
        else:
            values[name] = parse(path, text, kind)
    return replace(part, **values)


def _field(part: Any, name: str, path: str, whole: TrainConfig) -> tuple[Any, Any]:
    """The value of a field and its type."""
    known = [item.name for item in fields(part)]
    if name not in known:
        near = _near(path, list(_names(whole, "")))
        hint = f"did you mean {' or '.join(near)}?" if near else hint_at(name, known)
        raise ValueError(f"--set {path}: {name!r} is unknown: {hint}")
    return getattr(part, name), get_type_hints(type(part))[name]


def _names(part: Any, prefix: str) -> Iterator[str]:
    for item in fields(part):
        yield prefix + item.name
        if is_dataclass(getattr(part, item.name)):
            yield from _names(getattr(part, item.name), f"{prefix}{item.name}.")


def _near(path: str, names: list[str]) -> list[str]:
    """Up to three of the names: those that end as `path` does, in whatever section, else those that are spelled like it."""
    ending = [name for name in names if name.rpartition(".")[2] == path.rpartition(".")[2]]
    return ending[:3] or difflib.get_close_matches(path, names, n=3, cutoff=0.7)


def parse(path: str, text: str, kind: Any) -> Any:
    """The text of an override as a value of the field's type: str, bool, int, float, a Literal of str or int, or a tuple (of such: values
    between commas; of others: as Python writes it), one of these or None, or one or several numbers between commas."""
    if get_origin(kind) in (Union, types.UnionType):
        options = [option for option in get_args(kind) if option is not types.NoneType]
        if len(options) < len(get_args(kind)) and text.lower() == "none":
            return None
        is_list = "," in text and any(get_origin(option) is tuple for option in options)
        chosen = next(option for option in options if (get_origin(option) is tuple) == is_list)
        try:
            return parse(path, text, chosen)
        except ValueError as error:
            raise ValueError(f"{error} or None" if len(options) < len(get_args(kind)) else str(error)) from None
    if get_origin(kind) is tuple:
        return _parse_tuple(path, text, get_args(kind)[0])
    kind = type(get_args(kind)[0]) if get_origin(kind) is Literal else kind  # the section itself checks which of the values are allowed
    try:
        if kind is bool:
            return BOOLEANS[text.lower()]
        value = whole_number(text) if kind is int else kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        return value
    except (KeyError, ValueError):
        expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise ValueError(f"--set {path}={text}: expected {expected}") from None


def whole_number(text: str) -> int:
    """Also of 1e3. ValueError for any other number."""
    try:
        return int(text)
    except ValueError:
        if not float(text).is_integer() or abs(float(text)) >= 1 << 53:  # beyond, a float may be another number than is written
            raise
        return int(float(text))


def _parse_tuple(path: str, text: str, kind: Any) -> tuple[Any, ...]:
    if kind in (str, int, float, bool):
        items = [item.strip() for item in text.removesuffix(",").split(",")] if text else []
        if not all(items):
            raise ValueError(f"--set {path}={text}: there is nothing between two of its commas")
        return tuple(parse(path, item, kind) for item in items)
    try:
        value = ast.literal_eval(text or "()")
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        value = None
    if not isinstance(value, list | tuple):
        raise ValueError(f"--set {path}={text}: expected a list as Python writes it, [...]")
    return with_tuples(value)
