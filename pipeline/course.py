"""What a run remembers from step to step beside weights, optimizer state and the place in its data; a checkpoint holds it too."""

from __future__ import annotations

from collections import deque
from typing import Any

from partial_fc import GradScaler

WINDOW, LEAST = 100, 20  # losses that a spike is compared with, and without which there is none


class Course:
    def __init__(self, scaler: GradScaler) -> None:
        self.scaler = scaler  # of the loss, in float16; else switched off
        self.skipped_in_a_row = 0  # steps that were left out
        self.rollbacks = 0
        self.losses: deque[float] = deque(maxlen=WINDOW)  # of the last steps that were not, if run.spike asks for them
        self.has_moved = True  # since the last roll-back

    @property
    def usual_loss(self) -> float | None:
        """Their mean; None as long as there are too few."""
        return sum(self.losses) / len(self.losses) if len(self.losses) >= LEAST else None

    def figures(self, spike: float) -> dict[str, float]:
        """Metrics, as far as the run uses what they are of. With float16 it waits for the device."""
        scale = {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}
        return {**scale, "rollbacks": float(self.rollbacks)} if spike else dict(scale)

    def state(self) -> dict[str, Any]:
        """For a checkpoint, in JSON. With float16 it waits for the device."""
        return {
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else {},
            "skipped_in_a_row": self.skipped_in_a_row,
            "rollbacks": self.rollbacks,
            "losses": list(self.losses),
            "has_moved": self.has_moved,
        }

    def roll_back(self, state: dict[str, Any]) -> None:
        """To the losses of that time; all else goes on."""
        self.rollbacks += 1
        self.losses, self.has_moved = deque(state.get("losses", ()), maxlen=WINDOW), False

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave. An earlier version gave nothing, and a run in another precision no scale."""
        if self.scaler.is_enabled() and state.get("scaler"):
            self.scaler.load_state_dict({**self.scaler.state_dict(), **state["scaler"]})
        self.skipped_in_a_row, self.rollbacks = state.get("skipped_in_a_row", 0), state.get("rollbacks", 0)
        self.losses, self.has_moved = deque(state.get("losses", ()), maxlen=WINDOW), state.get("has_moved", True)
