"""The whole `protoshard` program: the commands of pipeline/cli.py, and `bench`. It is put together here because benchmarks stand on top:
they know the pipeline and it does not know them. `python -m pipeline.cli` is the same without `bench`."""

from __future__ import annotations

import sys

from benchmarks import commands
from pipeline import cli


def main(arguments: list[str] | None = None) -> int:
    return cli.main(arguments, commands.add)


if __name__ == "__main__":
    sys.exit(main())
