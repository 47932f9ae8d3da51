"""The registry of protocols, which their modules fill: see __init__.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from dali_loaders.config import DataConfig
from dali_loaders.sources import Source
from partial_fc.fields import hint_at
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.report import Report


class Comparison(Protocol):
    """What a registered class is an instance of. It is called with the path, the DataConfig and, by name, those options that its signature
    has; it raises ValueError for files that cannot be compared."""

    source: Source  # every image that is embedded, once; `source.lists` is a checksum of what is compared, where files say that

    def evaluate(self, embedder: Embedder) -> Report: ...


Open = Callable[..., Comparison]
_O = TypeVar("_O", bound=Open)
OPTIONS = {  # what a protocol may take, and the option of `protoshard eval`
    "images": "--images",  # folder of the images that the files of `path` only name
    "allow_missing": "--allow-missing",  # leave out what lacks images, instead of refusing the set
    "resamples": "--resamples",  # draws for intervals
    "cleaning": "--cleaning",  # .csv of what looks wrong with the identities
}
_PROTOCOLS: dict[str, Open] = {}


def register(name: str) -> Callable[[_O], _O]:
    """Gives a class a name that `protoshard eval --protocol` and `evaluation.protocols` know; the first paragraph of its docstring is what
    `protoshard protocols` says of it."""

    def add(open_: _O) -> _O:
        taken = _PROTOCOLS.get(name)
        if taken is not None and (taken.__module__, _name(taken)) != (open_.__module__, _name(open_)):
            raise ValueError(f"there is a protocol named {name!r} already: register yours under another name")
        _PROTOCOLS[name] = open_
        return open_

    return add


def names() -> list[str]:
    """All names that `open_protocol` knows."""
    return sorted(_PROTOCOLS)


def description(name: str) -> str:
    """What it compares, and which files it reads."""
    return " ".join(inspect.cleandoc(_PROTOCOLS[name].__doc__ or "").partition("\n\n")[0].split())


def of_path(path: str) -> str:
    """The protocol of a set for which none is named."""
    return "bin" if path.endswith(".bin") else "all_pairs"


def open_protocol(name: str | None, path: str, data: DataConfig, options: Mapping[str, Any] | None = None) -> Comparison:
    """Opens `path` for the protocol of that name, by default `of_path`. ValueError for a name that is not known, for options, of OPTIONS,
    that the protocol does not have, and where the protocol refuses the files. None is an option that is not given."""
    if name is None and path.endswith(".txt"):
        raise ValueError(
            f"{path} is a list, whose protocol must be named, such as --protocol pairs_list; `protoshard protocols` lists them."
        )
    name = name or of_path(path)
    if name not in _PROTOCOLS:
        raise ValueError(f"there is no protocol {name!r} ({hint_at(name, names())}); `protoshard protocols` lists what there is.")
    open_ = _PROTOCOLS[name]
    given = {option: value for option, value in (options or {}).items() if value is not None}
    known = inspect.signature(open_).parameters
    if unknown := [OPTIONS[option] for option in given if option not in known]:
        has = [shown for option, shown in OPTIONS.items() if option in known]
        raise ValueError(f"the protocol {name} of {path} has no option {unknown[0]}; it has {', '.join(has) or 'none'}.")
    return open_(path, data, **given)


def _name(open_: Any) -> str:
    return getattr(open_, "__qualname__", repr(open_))
