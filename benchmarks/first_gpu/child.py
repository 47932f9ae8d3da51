"""One step in a process of its own: rows go to a file, one JSON line each, as soon as they are known."""

from __future__ import annotations

import json
import sys

from benchmarks.first_gpu.rows import Run
from benchmarks.first_gpu.table import STEPS


def main(name: str, path: str, work: str, small: str) -> None:
    step = next(step for step in STEPS if step.name == name)
    with open(path, "w") as file:
        for row in step.rows(Run(bool(int(small)), work)):
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
