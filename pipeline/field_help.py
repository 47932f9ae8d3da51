"""What each field of a configuration means, by default is, and may be: from the comments beside the fields and the docstrings of their
classes, which have no second copy anywhere."""

from __future__ import annotations

import inspect
import io
import re
import textwrap
import tokenize
import types
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from partial_fc import losses
from partial_fc.fields import Within, positive
from partial_fc.losses import Loss
from pipeline.config import TrainConfig, value_text

# What these are in every loss that says no more about them.
COMMON = {"scale": "factor of the cosines: 64 is usual, 16 to 32 for small sets", "margin": "on the target, by which it has to be better"}
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
WIDTH = 79


def explained(config: TrainConfig) -> str:
    """Every field as `section.field = value`, and below it, indented, what it means, what it may be and its default."""
    return "\n".join(_explained(config, ""))


def _explained(part: Any, prefix: str) -> Iterator[str]:
    if prefix == "loss.":
        yield f"loss = {losses.name_of(part)}"
        yield from _indented(f"{' '.join((type(part).use or '').split())} One of {', '.join(sorted(losses.REGISTRY))}.".strip())
    meanings, hints = meanings_of(type(part)), get_type_hints(type(part), include_extras=True)
    for item in fields(part):
        value = getattr(part, item.name)
        if is_dataclass(value):
            yield from _explained(value, f"{prefix}{item.name}.")
            continue
        yield f"{prefix}{item.name} = {value_text(value)}"
        yield from _indented(meanings.get(item.name, ""))
        yield from _indented(f"{allowed(hints[item.name])}; default {_default(item)}")


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False) if text else []


def _default(item: Any) -> str:
    default = item.default if item.default is not MISSING else item.default_factory()
    return value_text(default) or "empty"


def meanings_of(section: type) -> dict[str, str]:
    """By field. That of a class that derives from another counts before its base's."""
    found: dict[str, str] = {}
    for cls in section.__mro__:
        if is_dataclass(cls):
            found = {**_from_docstring(cls), **_from_comments(cls), **found}
    names = [item.name for item in fields(section)]
    common = COMMON if Loss in section.__mro__ else {}
    return {name: meaning for name in names if (meaning := found.get(name) or common.get(name))}


def _from_comments(cls: type) -> dict[str, str]:
    """`field: type = default  # meaning`, one line each."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # it was defined in a console, say
        return {}
    names, found = set(vars(cls).get("__annotations__", {})), {}
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        match = re.match(r"\s+(\w+)\s*:", lines[token.start[0] - 1]) if token.type == tokenize.COMMENT else None
        if match and match[1] in names:
            found[match[1]] = token.string.lstrip("# ").rstrip()
    return found


def _from_docstring(cls: type) -> dict[str, str]:
    """Entries `name: meaning` or `name, name  meaning`, which go on in lines that are indented further."""
    names = set(vars(cls).get("__annotations__", {}))
    found: dict[str, str] = {}
    open_names: list[str] = []
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        match = re.match(r"(\w+(?:, \w+)*)(?::| {2,})\s*(.+)$", line)
        if match and set(match[1].split(", ")) <= names:
            open_names = match[1].split(", ")
            found |= dict.fromkeys(open_names, match[2])
        elif open_names and line.startswith("  "):
            found |= {name: f"{found[name]} {line.strip()}" for name in open_names}
        else:
            open_names = []
    return found


def allowed(hint: Any) -> str:
    """What a field of this type may be, in words."""
    kind, options = get_origin(hint), get_args(hint)
    if kind is Annotated:
        rules = [_rule(rule) for rule in hint.__metadata__]
        return " ".join([allowed(options[0]), *filter(None, rules)])
    if kind is Literal:
        return " or ".join(map(str, options))
    if kind in (Union, types.UnionType):
        return " or ".join("none" if option is types.NoneType else allowed(option) for option in options)
    if kind is tuple:
        inner = options[0]
        return f"{WORDS[inner]}, or several between commas" if inner in WORDS else "a list as Python writes it"
    return WORDS.get(hint, "a value")


def _rule(rule: Any) -> str:
    if rule is positive:
        return "above 0"
    return f"from {rule.least:g} to {rule.most:g}: {rule.reason}" if isinstance(rule, Within) else ""
