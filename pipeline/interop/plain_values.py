"""Works out expressions of a config file without running it: plain values, arithmetic, f-strings, paths, variables of the environment."""

import ast
import copy
import operator
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST = 100_000  # characters or items of a value, and digits of a number's bits: more is no option


@dataclass(frozen=True)
class Unknown:
    """A value that only running the file would tell."""

    place: str  # file:line
    code: str
    why: str = "without running it"

    def __str__(self) -> str:
        return f"{self.place}: cannot read `{self.code}` {self.why}; write the value out."


@dataclass(frozen=True)
class Function:
    """A function that the file defines, and the variables it sees."""

    node: ast.FunctionDef | ast.Lambda
    variables: dict[str, Any]


class UnknownError(Exception):
    def __init__(self, unknown: Unknown) -> None:
        self.unknown = unknown


_ARITHMETIC: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda item, items: item in items,
    ast.NotIn: lambda item, items: item not in items,
}
_DICTIONARIES = {"edict", "EasyDict", "easydict.EasyDict", "dict", "ConfigDict", "ml_collections.ConfigDict"}
_PURE: dict[str, Callable[..., Any]] = {kind.__name__: kind for kind in (int, float, str, bool, len, min, max, abs, round, tuple, list)}
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
_COPIES = ("deepcopy", "copy.deepcopy", "copy.copy")
_PLAIN_FORMAT = re.compile(r"[<>=^+,.\d_defgsx%]{0,6}$")


def _public(name: Any) -> Any:
    """The name of a variable that a file may put into a recipe, and so into checkpoints. ValueError for what sounds like a secret."""
    if isinstance(name, str) and _SECRET.search(name):
        raise ValueError(f"the variable {name} may be a secret")
    return name


def _size(value: Any) -> int:
    """Characters, bits and items of a value, counted up to about LARGEST: lists may hold another one, or themselves, many times."""
    size, parts = 0, [value]
    while parts and size <= LARGEST:
        part = parts.pop()
        size += len(part) if isinstance(part, str | bytes | list | tuple | dict) else part.bit_length() if isinstance(part, int) else 1
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ()
    return size


@dataclass(frozen=True)
class Values:
    """The expressions of one file, in which `variables` may occur."""

    path: Path
    variables: dict[str, Any]

    def unknown(self, node: ast.AST, why: str = "without running it") -> Unknown:
        return Unknown(f"{self.path}:{getattr(node, 'lineno', 1)}", ast.unparse(node).splitlines()[0], why)

    def value(self, node: ast.expr) -> Any:
        """The value of an expression. Raises UnknownError where it takes more than what this module understands."""
        try:
            value = self._value(node)
        except (ArithmeticError, TypeError, KeyError, IndexError, ValueError, AttributeError) as error:
            raise UnknownError(self.unknown(node, f"({error})")) from None
        except RecursionError:
            raise UnknownError(self.unknown(node)) from None
        if isinstance(value, Unknown):
            raise UnknownError(value)
        if _size(value) > LARGEST:
            raise UnknownError(self.unknown(node))
        return value

    def _value(self, node: ast.expr) -> Any:
        value = self.value
        match node:
            case ast.Constant(value=constant):
                return constant
            case ast.Tuple(elts=items):
                return tuple(value(item) for item in items)
            case ast.List(elts=items):
                return [value(item) for item in items]
            case ast.Dict(keys=keys, values=values) if None not in keys:
                return {value(key): value(item) for key, item in zip(keys, values, strict=True) if key is not None}
            case ast.Name(id=name) if name in self.variables:
                return self.variables[name]
            case ast.Lambda():
                return Function(node, self.variables)
            case ast.JoinedStr(values=parts):
                return "".join(value(part) for part in parts)
            case ast.FormattedValue(value=shown, conversion=-1, format_spec=spec):
                given, form = value(shown), value(spec) if spec else ""
                if isinstance(given, str | int | float) and _PLAIN_FORMAT.match(form):
                    return format(given, form)
            case ast.Attribute(value=owner, attr=name) if isinstance(owned := self._owned(owner), dict):
                return owned[name]
            case ast.Subscript(value=owner, slice=key) if ast.unparse(owner) == "os.environ":
                return os.environ[_public(value(key))]
            case ast.Subscript(value=owner, slice=key) if not isinstance(key, ast.Slice):
                return value(owner)[value(key)]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not value(operand)
            case ast.BoolOp(op=op, values=values):
                results = [value(item) for item in values]
                return all(results) if isinstance(op, ast.And) else next((item for item in results if item), results[-1])
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return value(body) if value(test) else value(orelse)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
                return _COMPARISONS[type(op)](value(left), value(right))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                a, b = value(left), value(right)
                sized = str | list | tuple | dict  # a product or a format of one may be of any size
                if isinstance(op, ast.Add) or not (isinstance(a, sized) or isinstance(b, sized)):
                    return _ARITHMETIC[type(op)](a, b)
            case ast.Call(func=function, args=args, keywords=keywords):
                return self._call(node, ast.unparse(function), args, keywords)
        raise UnknownError(self.unknown(node))

    def _owned(self, node: ast.expr) -> Any:
        try:
            return self.value(node)
        except UnknownError:
            if isinstance(node, ast.Name) and node.id not in self.variables:
                return None
            raise

    def _call(self, node: ast.expr, name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> Any:
        value = self.value
        if name in _DICTIONARIES or self.variables.get(name) is dict:
            named: dict[str, Any] = {}
            for keyword in keywords:  # one without a name is **options
                named |= value(keyword.value) if keyword.arg is None else {keyword.arg: value(keyword.value)}
            return {**dict(*map(value, args)), **named}
        if not keywords:
            if name in ("os.path.join", "osp.join", "path.join"):
                return os.path.join(*map(value, args))
            if name in ("os.environ.get", "os.getenv", "environ.get", "getenv") and len(args) in (1, 2):
                found = os.environ.get(_public(value(args[0])), *map(value, args[1:]))
                if found is None and len(args) == 1:
                    raise UnknownError(self.unknown(node, "as this variable is not set"))
                return found
            if name in _PURE:
                return _PURE[name](*map(value, args))
            if name in _COPIES and len(args) == 1:
                return copy.deepcopy(value(args[0]))
            owner, _, method = name.rpartition(".")
            if isinstance(owned := self.variables.get(owner), dict) and method in ("get", "copy"):
                return owned.get(*map(value, args)) if method == "get" else copy.deepcopy(owned)
        raise UnknownError(self.unknown(node))
