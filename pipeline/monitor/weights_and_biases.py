"""A run for Weights & Biases (wandb), online or, with WANDB_MODE=offline, in FOLDER/wandb for `wandb sync`."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.monitor.names import grouped, of_set
from pipeline.monitor.pictures import pixels_of
from pipeline.monitor.writer import Writer

REMEDY = "log in with `wandb login`, set WANDB_MODE=offline, or take wandb out of monitor.writers"


class WeightsAndBiases(Writer):
    """The project is WANDB_PROJECT (protoshard unless set). A run that goes on is the same run there, by the number in FOLDER/wandb/id;
    of steps that it repeats the first figures stay, because W&B takes no earlier steps.

    ValueError if wandb does not start."""

    name = "wandb"

    def __init__(self, folder: Path, name: str, first_step: int, options: Mapping[str, str | float]) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "protoshard"),
                name=name,
                id=_id_of(folder / "wandb" / "id", first_step),
                resume="allow",
                dir=str(folder),
                config=dict(options),
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"monitor.writers has wandb, which does not start ({reason}): {REMEDY}") from error
        self._wandb: Any = wandb

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, lambda: {grouped(name): value for name, value in values.items()})

    def evaluation(self, step: int, set_name: str, values: Mapping[str, float], threshold: float) -> None:
        values = {**values, "threshold": threshold}
        self._log(step, lambda: {of_set(set_name, name): value for name, value in values.items() if not isinstance(value, int)})
        sizes = {of_set(set_name, name): value for name, value in values.items() if isinstance(value, int)}
        _try(lambda: self._run.summary.update(sizes))

    def histogram(self, step: int, name: str, counts_k: np.ndarray, edges: np.ndarray) -> None:
        whole, limits = _at_most_512(counts_k, edges)
        self._log(step, lambda: {name: self._wandb.Histogram(np_histogram=(whole, limits))})

    def picture(self, step: int, name: str, png: bytes) -> None:
        self._log(step, lambda: {name: self._wandb.Image(pixels_of(png))})

    def text(self, step: int, name: str, text: str) -> None:
        _try(lambda: self._run.summary.update({name: text}))

    def outcome(self, options: Mapping[str, str | float], figures: Mapping[str, float]) -> None:
        _try(lambda: self._run.summary.update({f"evaluation/{name}": value for name, value in figures.items()}))

    def close(self) -> None:
        _try(self._run.finish)

    def _log(self, step: int, values: Callable[[], dict[str, Any]]) -> None:
        _try(lambda: self._run.log(values(), step=step))


def _try(call: Callable[[], object]) -> None:
    """What goes wrong in wandb is no more to a run than a full disk."""
    try:
        call()
    except OSError:
        raise
    except Exception as error:
        raise OSError(str(error) or type(error).__name__) from error


def _at_most_512(counts_k: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """W&B's limit of bins."""
    step = -(-len(counts_k) // 512)
    starts = np.arange(0, len(counts_k), step)
    return np.add.reduceat(counts_k, starts), np.append(edges[starts], edges[-1])


def _id_of(path: Path, first_step: int) -> str:
    """Made anew by a run that begins, and where the file holds none."""
    with suppress(OSError, UnicodeDecodeError):
        if first_step > 0 and re.fullmatch(r"[0-9a-f]{16}", name := path.read_text(encoding="utf-8").strip()):
            return name
    name = secrets.token_hex(8)
    with suppress(OSError):  # then it will be another run after a restart
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n", encoding="utf-8")
    return name
