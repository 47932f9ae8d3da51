"""Packages that only an extra of this project brings: where one is missing, a sentence says which extra that is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingPackageError(ImportError, ValueError):
    """For Python a failed import; for the commands bad input, of which they print the sentence alone."""


def missing(extra: str, *packages: str) -> MissingPackageError:
    are, come = ("is", "it comes") if len(packages) == 1 else ("are", "they come")
    sentence = f"{' and '.join(packages)} {are} not installed; {come} with the extra {extra}: pip install 'protoshard[{extra}]'"
    return MissingPackageError(sentence, name=packages[0])


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Stands around imports of packages that `pip install protoshard` leaves out and `pip install 'protoshard[name]'` brings."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing(name, str(error.name)) from error
