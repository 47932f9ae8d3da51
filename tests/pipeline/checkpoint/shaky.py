"""An address whose store lies in a local folder, so that several ranks see it, and which fails when it is told to."""

from __future__ import annotations

import re

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Shaky(LocalFileSystem):
    """fails(method, path) -> whether this call raises."""

    protocol = "shaky"
    cachable = False

    @staticmethod
    def fails(method, path):
        return False

    def _call(self, name, path, *arguments, **options):
        if Shaky.fails(name, path):
            raise RuntimeError("the service is not available")  # as libraries raise, which is no OSError
        return getattr(LocalFileSystem, name)(self, path, *arguments, **options)

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(re.sub(r"^shaky://([^/]*@[^/]*)?", "file://", str(path)))


def _through(name):
    return lambda self, path, *arguments, **options: self._call(name, path, *arguments, **options)


for _name in ("info", "ls", "cat_file", "open", "makedirs", "rm", "rm_file", "mv"):
    setattr(Shaky, _name, _through(_name))
fsspec.register_implementation("shaky", Shaky, clobber=True)
