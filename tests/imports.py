"""Which module imports which, read from the source with ast: imports inside functions, under TYPE_CHECKING and relative ones count too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

Graph = dict[str, dict[str, int]]  # module -> what it imports -> line


def modules(root: Path, rooms: Iterable[str]) -> dict[str, Path]:
    """Dotted name -> file of every module in these top-level packages."""
    found = {}
    for path in sorted(file for room in rooms for file in (root / room).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def graph(found: dict[str, Path]) -> Graph:
    """`import a.b` is an edge to a.b; `from a import b` one to a.b if that is a module, else to a itself. import_module counts as far as
    its text is known: an f-string is an edge to every module that it can name."""
    edges: Graph = {}
    for module, path in found.items():
        edges[module] = {}
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        tree = ast.parse(path.read_text())
        for target, line in [*_statements(tree, package, found), *_calls(tree, module, found)]:
            edges[module].setdefault(target, line)
    return edges


def _statements(tree: ast.AST, package: str, found: dict[str, Path]) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                base = ".".join(above[: len(above) - node.level + 1] + ([base] if base else []))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in found else base, node.lineno


def _calls(tree: ast.AST, module: str, found: dict[str, Path]) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        function, name = node.func, node.args[0]
        if (function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")) not in ("import_module", "__import__"):
            continue
        if isinstance(name, ast.Constant):
            yield str(name.value), node.lineno
        elif isinstance(name, ast.JoinedStr):
            pattern = "".join(_pattern(part, module) for part in name.values)
            yield from ((target, node.lineno) for target in found if re.fullmatch(pattern, target))


def _pattern(part: ast.expr, module: str) -> str:
    if isinstance(part, ast.Constant):
        return re.escape(str(part.value))
    value = part.value if isinstance(part, ast.FormattedValue) else None
    return re.escape(module) if isinstance(value, ast.Name) and value.id == "__name__" else r"[^.]+"


def circles(edges: Graph) -> list[list[str]]:
    """The sets of modules that can all reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    result: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in edges[module]:
            if target not in edges:
                continue
            if target not in index:
                visit(target)
            if target in stack:
                low[module] = min(low[module], low[target])
        if low[module] == index[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1 or module in edges[module]:
                result.append(sorted(component))

    for module in edges:
        if module not in index:
            visit(module)
    return result
