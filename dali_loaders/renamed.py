"""Old imports end in a sentence that gives the new one. A package says in its __init__ which modules moved, and a module which names."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.abc import MetaPathFinder
from typing import Any

_MODULES: dict[str, str] = {}


class _Finder(MetaPathFinder):
    """Stands at the end of sys.meta_path, so that it is asked only for what nothing else has found."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name in _MODULES:
            # Not a ModuleNotFoundError, which `from package import module` would swallow.
            raise ImportError(f"{name} is now {_MODULES[name]}: import it from there", name=name)


def modules(new_names: Mapping[str, str]) -> None:
    """old module -> new module"""
    if not _MODULES:
        sys.meta_path.append(_Finder())
    _MODULES.update(new_names)


def names(module: str, new_homes: Mapping[str, str]) -> None:
    """Names that `module` had -> the modules that have them now."""

    def missing(name: str) -> Any:
        if name in new_homes:
            raise ImportError(f"{module}.{name} is now {new_homes[name]}.{name}: import it from there", name=module)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    sys.modules[module].__getattr__ = missing  # type: ignore[method-assign]
