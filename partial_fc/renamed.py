"""Old names of modules and their contents: using one raises an error that gives the new name."""

import sys
from collections.abc import Mapping
from importlib.abc import MetaPathFinder
from typing import Any, NoReturn

MODULES = {
    "partial_fc.inputs": "partial_fc.batch_check",
    "partial_fc.memory": "partial_fc.buffer_pool",
    "partial_fc.sources": "partial_fc.prototype_sources",
    "partial_fc.kernels.walk": "partial_fc.kernels.tiles",
    "partial_fc.kernels.entries": "partial_fc.kernels.exact_entries",
    "partial_fc.kernels.kept": "partial_fc.kernels.weight_cache",
    "partial_fc.kernels.fused": "partial_fc.kernels.triton_kernel",
    "partial_fc.kernels.fused_tiles": "partial_fc.kernels.triton_programs",
    "partial_fc.optimizers.rows": "partial_fc.optimizers.row_optimizer",
}


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in MODULES:
            raise ImportError(f"{name} is now {MODULES[name]}: import it from there")


sys.meta_path.append(_Finder())  # the last one is asked only for modules that do not exist


def refuse(owner: str, name: str, renamed: Mapping[str, str], error: type[Exception] = ImportError) -> NoReturn:
    """The end of the `__getattr__` of a module, or with AttributeError of a class. An ImportError passes through `from ... import`."""
    if name in renamed:
        raise error(f"{owner}.{name} is now {renamed[name]}")
    raise AttributeError(f"{owner} has no attribute {name!r}")
