"""What a step finds: rows, of which every one holds a figure or says why it has none."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

NO_GPU = "needs a GPU"
NO_TIME = "not run: no time left"


class Row(NamedTuple):
    """`value` is None where nothing was measured; `note` then says why."""

    what: str
    value: float | str | None
    unit: str = ""
    target: str = ""
    note: str = ""

    @property
    def failed(self) -> bool:
        return self.note.startswith("failed: ")


@dataclass(frozen=True)
class Run:
    """What steps know of the run: whether sizes are those for a CPU and a few minutes, and a folder that is gone afterwards."""

    small: bool
    work: str

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def unmeasured(what: str, why: str) -> Row:
    return Row(what, None, note=f"not measured: {why}")


def failed(what: str, text: str) -> Row:
    """`text`: an error's message or a process's output, of which the last line is kept."""
    lines = text.strip().splitlines()
    return Row(what, None, note=f"failed: {lines[-1].strip() if lines else 'no message'}")


def attempt(what: str, function: Callable[..., Iterable[Row]], *arguments: Any) -> Iterator[Row]:
    """The rows of `function`, and a failed one where it ends early: what follows in the step goes on."""
    try:
        yield from function(*arguments)
    except Exception as error:
        traceback.print_exc()
        yield failed(what, f"{type(error).__name__}: {error}")
