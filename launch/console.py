"""Lines of the launcher for people: with date and time, as those of a run's log."""

import sys
from contextlib import suppress

from dali_loaders.progress import clock


def say(message: str) -> None:
    """On standard error, where nobody need hear it."""
    with suppress(OSError):
        print(f"{clock()}  {message}", file=sys.stderr, flush=True)


def shown(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
