"""Recognises the step functions of older arcface_torch configs, `config.lr_func = lr_step_func`, by how they are written."""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.interop.plain_values import Function, UnknownError, Values


@dataclass(frozen=True)
class Steps:
    """The rate is multiplied by `factor` at each of `epochs`, which count from 0, after `warmup` epochs."""

    epochs: tuple[float, ...]
    factor: float = 0.1
    warmup: float = 0.0


def recognise(function: Any) -> Steps | None:
    """The steps of `0.1 ** len([m for m in [8, 14] if m - 1 <= epoch])`, alone or behind `... if epoch < warmup else`; None for any other
    function. In what warms up only the number of epochs is read."""
    if not isinstance(function, Function) or len(function.node.args.args) != 1:
        return None
    epoch, result = function.node.args.args[0].arg, _result(function.node)
    values = Values(Path(), function.variables)
    try:
        warmup = 0.0
        match result:
            case ast.IfExp(test=ast.Compare(left=ast.Name(id=name), ops=[ast.Lt()], comparators=[limit]), orelse=orelse) if name == epoch:
                warmup, result = max(0.0, values.value(limit)), orelse
        match result:
            case ast.BinOp(
                left=factor,
                op=ast.Pow(),
                right=ast.Call(
                    func=ast.Name(id="len"),
                    args=[ast.ListComp(generators=[ast.comprehension(target=ast.Name(id=m), iter=milestones, ifs=[condition])])],
                ),
            ):
                early = {f"{m} - 1 <= {epoch}": 1, f"{m} <= {epoch}": 0}.get(ast.unparse(condition))
                if early is not None:
                    return Steps(tuple(milestone - early for milestone in values.value(milestones)), values.value(factor), warmup)
    except (UnknownError, TypeError):
        pass
    return None


def _result(node: ast.FunctionDef | ast.Lambda) -> ast.expr | None:
    if isinstance(node, ast.Lambda):
        return node.body
    statements = [part for part in node.body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))]
    return statements[0].value if len(statements) == 1 and isinstance(statements[0], ast.Return) else None
