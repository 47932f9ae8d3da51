"""Protocols by name: how a set is compared, from the files that its users have. Every module of this folder is found by being here.

A protocol is a class. It is made from the path and the options of an evaluation, which it checks before any image is embedded; then
`evaluate(embedder)` gives a Report, on all ranks the same."""

import importlib
import pkgutil

from pipeline.evaluation.protocols.registry import OPTIONS, Comparison, description, names, of_path, open_protocol, register

__all__ = ["OPTIONS", "Comparison", "description", "names", "of_path", "open_protocol", "register"]

for _protocol in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_protocol.name}")  # fills the registry
