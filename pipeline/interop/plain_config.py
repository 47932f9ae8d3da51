"""Reads a Python config file of the `config.name = value` kind without running it: assignments, branches on known values, other config
files that it imports. A value that cannot be worked out is kept as `Unknown`, and stops whoever asks for it."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from pipeline.interop.plain_values import LARGEST, Function, Unknown, UnknownError, Values


class Config(dict[str, Any]):
    """Options by name. Asking for one that could not be read raises ValueError with file, line and code; `in` and iteration do not."""

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, Unknown):
            raise ValueError(f"config.{name} is needed, but {value}")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (dict.get would not ask __getitem__)


def read_config(path: str | Path) -> Config:
    """The options that a config file, and those beside it that it imports, assign to `config`, without running any.

    Raises ValueError with file and line for a file that is no Python, defines no `config`, or may change it in ways that only a run tells.
    """
    try:
        variables = _Reader(Path(path)).read()
    except (RecursionError, MemoryError):
        raise ValueError(f"{path} nests expressions or imports too deep for a config file.") from None
    config = variables.get("config")
    if isinstance(config, Unknown):
        raise ValueError(str(config))
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not define `config`, as an arcface_torch config file does with `config = edict()`.")
    return Config(config)


_HARMLESS = re.compile(r"(print|pprint|logging\.\w+|logger\.\w+|len|dict|str)$")


class _Reader:
    def __init__(self, path: Path, readers: tuple[Path, ...] = ()) -> None:
        self.path, self.readers = path, (*readers, path)
        self.variables: dict[str, Any] = {"__name__": "config"}
        self.values = Values(path, self.variables)

    def read(self) -> dict[str, Any]:
        try:
            if self.path.exists() and not self.path.is_file():
                raise ValueError(f"cannot read the config file {self.path}: it is no regular file.")
            if self.path.stat().st_size > LARGEST:
                raise ValueError(f"{self.path} has more than {LARGEST:,} bytes, which no config file needs.")
            text = self.path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ValueError(f"cannot read the config file {self.path}: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}:1: this is not a Python file: {error}.") from error
        try:
            tree = ast.parse(text, filename=str(self.path))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{self.path}:{getattr(error, 'lineno', None) or 1}: this is not a Python file: {error}.") from error
        self.run(tree.body)
        return self.variables

    def run(self, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            match statement:
                case ast.Pass() | ast.Assert() | ast.Global() | ast.Expr(value=ast.Constant()):
                    pass
                case ast.Import(names=names):
                    for name in names:
                        self.variables.pop((name.asname or name.name).partition(".")[0], None)
                case ast.ImportFrom():
                    self.run_import(statement)
                case ast.Expr(value=ast.Call(func=ast.Attribute(value=owner, attr="update"), args=args, keywords=keywords)):
                    self.run_update(owner, args, keywords, statement)
                case ast.Expr(value=value):
                    self.refuse_changes(value, statement)
                case ast.Assign(targets=targets, value=value):
                    result = self.value_or_unknown(value, statement)
                    for target in targets:
                        self.assign(target, result, statement)
                case ast.AnnAssign(target=target, value=value) if value is not None:
                    self.assign(target, self.value_or_unknown(value, statement), statement)
                case ast.AugAssign(target=target, op=op, value=value):
                    read = ast.copy_location(ast.BinOp(ast.parse(ast.unparse(target), mode="eval").body, op, value), statement)
                    self.assign(target, self.value_or_unknown(read, statement), statement)
                case ast.If(test=test, body=body, orelse=orelse):
                    try:
                        self.run(body if self.values.value(test) else orelse)
                    except UnknownError:
                        self.forget([*body, *orelse])
                case ast.FunctionDef(name=name):
                    self.variables[name] = Function(statement, self.variables)
                case ast.ClassDef(name=name) | ast.AsyncFunctionDef(name=name):
                    self.variables[name] = self.values.unknown(statement)
                case ast.AnnAssign():
                    pass
                case ast.For() | ast.While() | ast.With() | ast.Try():
                    self.forget([statement])
                case _:
                    self.refuse(statement)

    def run_import(self, statement: ast.ImportFrom) -> None:
        """Reads the file of the name, where there is one beside this file or above it; other imported names have no value here."""
        parts = (statement.module or "").split(".") if statement.module else []
        folders = list(self.path.parents)[statement.level - 1 :][:1] if statement.level else list(self.path.parents)[:2]
        for name in statement.names:
            bound = name.asname or name.name
            if name.name in ("edict", "EasyDict", "ConfigDict"):
                self.variables[bound] = dict
                continue
            inside = next((folder.joinpath(*parts).with_suffix(".py") for folder in folders if self.has(folder, parts)), None)
            module = next((folder.joinpath(*parts, f"{name.name}.py") for folder in folders if self.has(folder, [*parts, name.name])), None)
            if inside is None and module is None:
                if name.name == "*":
                    self.refuse(statement)
                self.variables[bound] = self.values.unknown(statement)
                continue
            file = inside or module
            assert file is not None
            if file in self.readers:
                raise ValueError(f"{self.path}:{statement.lineno}: {file} imports itself.")
            found = _Reader(file, self.readers).read()
            if name.name == "*":
                self.variables.update(found)
            else:
                self.variables[bound] = found.get(name.name, self.values.unknown(statement)) if inside else found

    @staticmethod
    def has(folder: Path, parts: list[str]) -> bool:
        return bool(parts) and folder.joinpath(*parts).with_suffix(".py").is_file()

    def run_update(self, owner: ast.expr, args: list[ast.expr], keywords: list[ast.keyword], statement: ast.stmt) -> None:
        try:
            owned = self.values.value(owner)
        except UnknownError:
            return  # not an option
        if not isinstance(owned, dict):
            return
        try:
            new = dict(*(self.values.value(argument) for argument in args))
        except (UnknownError, TypeError, ValueError):
            self.refuse(statement)
        for keyword in keywords:
            if keyword.arg is None:
                self.refuse(statement)
            new[keyword.arg] = self.value_or_unknown(keyword.value, statement)
        owned.update(new)

    def assign(self, target: ast.expr, value: Any, statement: ast.stmt) -> None:
        match target:
            case ast.Name(id=name):
                self.variables[name] = value
            case ast.Attribute(value=owner, attr=name):
                self.assign_item(owner, name, value, statement)
            case ast.Subscript(value=owner, slice=key):
                try:
                    self.assign_item(owner, self.values.value(key), value, statement)
                except UnknownError:
                    self.refuse(statement)
            case ast.Tuple(elts=items) | ast.List(elts=items):
                fits = isinstance(value, list | tuple) and len(value) == len(items)
                for number, item in enumerate(items):
                    self.assign(item, value[number] if fits else self.values.unknown(statement), statement)
            case _:
                self.refuse(statement)

    def assign_item(self, owner: ast.expr, name: Any, value: Any, statement: ast.stmt) -> None:
        try:
            owned = self.values.value(owner)
        except UnknownError:
            return  # of an object that is no option, such as os.environ
        if not isinstance(owned, dict):
            self.refuse(statement)
        owned[name] = value

    def forget(self, statements: list[ast.stmt]) -> None:
        """Marks all that `statements` may assign, of which it is not known whether and how often they run."""
        for statement in statements:
            for part in ast.walk(statement):
                match part:
                    case ast.Assign(targets=targets):
                        for target in targets:
                            self.assign(target, self.values.unknown(part), statement)
                    case ast.AugAssign(target=target) | ast.AnnAssign(target=target) | ast.For(target=target):
                        self.assign(target, self.values.unknown(part), statement)
                    case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                        self.variables[name] = self.values.unknown(part)
                    case ast.Delete():
                        self.refuse(part)
                    case ast.Call():
                        self.refuse_changes(part, statement)

    def refuse_changes(self, node: ast.expr, statement: ast.stmt) -> None:
        """A call that is handed a dictionary of options, or is a method of one, may change any of them; so may one of the file's own
        functions, exec and eval."""
        for call in ast.walk(node):
            name = call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""
            if name in ("exec", "eval") or isinstance(self.variables.get(name), Function):
                self.refuse(statement)
            if isinstance(call, ast.Call) and not _HARMLESS.match(ast.unparse(call.func)):
                handed = [*call.args, *(keyword.value for keyword in call.keywords)]
                handed += [call.func.value] if isinstance(call.func, ast.Attribute) else []
                if any(isinstance(item, ast.Name) and isinstance(self.variables.get(item.id), dict) for item in handed):
                    self.refuse(statement)

    def refuse(self, node: ast.stmt) -> NoReturn:
        raise ValueError(str(self.values.unknown(node)))

    def value_or_unknown(self, node: ast.expr, statement: ast.stmt) -> Any:
        try:
            return self.values.value(node)
        except UnknownError as error:
            self.refuse_changes(node, statement)
            return error.unknown
