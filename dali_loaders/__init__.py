"""From files to batches: sources of encoded images, a global sample order, DALI decoding, and a resumable loader per rank."""

from typing import TYPE_CHECKING, Any

from dali_loaders.order import UniformOrder
from dali_loaders.sources import Source, open_source

if TYPE_CHECKING:
    from dali_loaders.decode import AugmentConfig, DataConfig
    from dali_loaders.loader import Batch, TrainLoader, evaluation_batches

__all__ = ["AugmentConfig", "Batch", "DataConfig", "Source", "TrainLoader", "UniformOrder", "evaluation_batches", "open_source"]


def __getattr__(name: str) -> Any:
    """Loads the parts that need torch only when they are asked for."""
    if name in ("AugmentConfig", "DataConfig"):
        from dali_loaders import decode

        return getattr(decode, name)
    if name in ("Batch", "TrainLoader", "evaluation_batches"):
        from dali_loaders import loader

        return getattr(loader, name)
    raise AttributeError(f"module 'dali_loaders' has no attribute {name!r}")
