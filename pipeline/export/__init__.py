"""Models on their way out: a folder with a network and all that is needed to use it, what loads it, and what it is used for.

Importing this room needs neither DALI nor DeepSpeed nor Ray."""

from pipeline.export.loading import Model, load

__all__ = ["Model", "load"]
