"""Where this checkout and its Python lie, here and on the hosts."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def checkout(options: argparse.Namespace) -> str:
    return options.remote_dir or str(ROOT)


def python(options: argparse.Namespace) -> str:
    """This interpreter, at the same place in the hosts' checkout."""
    try:
        return str(Path(checkout(options)) / Path(sys.executable).relative_to(ROOT))
    except ValueError:
        return sys.executable
