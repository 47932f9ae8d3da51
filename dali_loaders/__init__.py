"""From files to batches: sources of encoded images, a global sample order, DALI decoding, and a resumable loader per rank."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dali_loaders import renamed
from dali_loaders.config import AugmentConfig, DataConfig
from dali_loaders.order import GroupedOrder, UniformOrder
from dali_loaders.sources import Source, open_data, open_source

if TYPE_CHECKING:
    from dali_loaders.checking import CheckReport, check
    from dali_loaders.loader import Batch, TrainLoader, evaluation_batches
    from dali_loaders.packing import PackConfig, PackReport, pack

renamed.modules({f"dali_loaders.face_{name}": f"dali_loaders.faces.{name}" for name in ("canvas", "drawing", "traits")})
renamed.modules(
    {"dali_loaders.records": "dali_loaders.recordio.records", "dali_loaders.mxnet_records": "dali_loaders.recordio.mxnet_reader"}
)

__all__ = [
    "AugmentConfig",
    "Batch",
    "CheckReport",
    "DataConfig",
    "GroupedOrder",
    "PackConfig",
    "PackReport",
    "Source",
    "TrainLoader",
    "UniformOrder",
    "check",
    "evaluation_batches",
    "open_data",
    "open_source",
    "pack",
]

_LAZY = {
    "CheckReport": "checking",
    "check": "checking",
    "Batch": "loader",
    "TrainLoader": "loader",
    "evaluation_batches": "loader",
    "PackConfig": "packing",
    "PackReport": "packing",
    "pack": "packing",
}


def __getattr__(name: str) -> Any:
    """Imports what needs torch or OpenCV when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'dali_loaders' has no attribute {name!r}")
    return getattr(import_module(f"dali_loaders.{_LAZY[name]}"), name)
