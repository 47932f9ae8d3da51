"""Reads a Python config file of the `config.name = value` kind without running it: plain values, arithmetic and edicts, nothing else."""

import ast
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def read_config(path: str | Path) -> dict[str, Any]:
    """The options that a config file assigns to `config`, without running it. ValueError names file and line of what is not understood."""
    try:
        source = Path(path).read_text(encoding="utf-8")
        tree = ast.parse(source, filename=str(path))
    except OSError as error:
        raise ValueError(f"cannot read the config file {path}: {error.strerror}.") from error
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}:{getattr(error, 'lineno', None) or 1}: this is not a Python file: {error}.") from error
    variables: dict[str, Any] = {}
    for statement in tree.body:
        try:
            _execute(statement, variables)
        except _NotPlainError as error:
            raise ValueError(f"{path}:{error.line}: cannot read `{error.code}` without running it; write the value out.") from None
        except (ArithmeticError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"{path}:{statement.lineno}: cannot work out `{ast.unparse(statement)}`: {error}.") from None
    if not isinstance(variables.get("config"), dict):
        raise ValueError(f"{path} does not define `config`, as an arcface_torch config file does with `config = edict()`.")
    return variables["config"]


class _NotPlainError(Exception):
    def __init__(self, node: ast.AST) -> None:
        self.line, self.code = getattr(node, "lineno", 1), ast.unparse(node).splitlines()[0]


_ARITHMETIC: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _execute(statement: ast.stmt, variables: dict[str, Any]) -> None:
    match statement:
        case ast.Import() | ast.Expr(value=ast.Constant()):
            pass
        case ast.ImportFrom(module=module, level=0) if module and module.partition(".")[0] != "configs":
            pass  # an imported name has no value here, so using it is an error
        case ast.Assign(targets=targets, value=value):
            result = _evaluate(value, variables)
            for target in targets:
                _assign(target, result, variables)
        case _:
            raise _NotPlainError(statement)


def _assign(target: ast.expr, value: Any, variables: dict[str, Any]) -> None:
    match target:
        case ast.Name(id=name):
            variables[name] = value
        case ast.Attribute(value=owner, attr=name) | ast.Subscript(value=owner, slice=ast.Constant(value=str(name))):
            owned = _evaluate(owner, variables)
            if not isinstance(owned, dict):
                raise _NotPlainError(target)
            owned[name] = value
        case _:
            raise _NotPlainError(target)


def _evaluate(node: ast.expr, variables: Mapping[str, Any]) -> Any:
    def value(child: ast.expr) -> Any:
        return _evaluate(child, variables)

    match node:
        case ast.Constant(value=constant):
            return constant
        case ast.Tuple(elts=items):
            return tuple(value(item) for item in items)
        case ast.List(elts=items):
            return [value(item) for item in items]
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {value(key): value(item) for key, item in zip(keys, values, strict=True) if key is not None}
        case ast.Name(id=name) if name in variables:
            return variables[name]
        case ast.Attribute(value=ast.Name(id=owner), attr=name) if isinstance(variables.get(owner), dict):
            return variables[owner][name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            a, b = value(left), value(right)
            if not isinstance(op, ast.Add) and isinstance(a, str | list | tuple | dict) | isinstance(b, str | list | tuple | dict):
                raise _NotPlainError(node)
            return _ARITHMETIC[type(op)](a, b)
        case ast.Call(func=ast.Name(id="edict" | "EasyDict"), args=args, keywords=keywords):
            positional = [value(argument) for argument in args]
            return {**dict(*positional), **{keyword.arg or "": value(keyword.value) for keyword in keywords}}
        case ast.Call(func=function, args=args, keywords=[]) if ast.unparse(function) in ("os.path.join", "osp.join"):
            return str(Path(*(value(argument) for argument in args)))
        case _:
            raise _NotPlainError(node)
