"""How many ranks a job has: `--ranks N`, or `--ranks MIN:MAX` for one that goes on with fewer when hosts are lost."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from launch.hosts import Host


class Ranks(NamedTuple):
    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.least}:{self.most}" if self.is_elastic else f"{self.most}"

    @property
    def is_elastic(self) -> bool:
        return self.least < self.most


def parse(text: str) -> Ranks:
    """ValueError, in a sentence, for what is neither N nor MIN:MAX."""
    found = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}))?", text.strip())
    if found is None:
        raise ValueError(f"--ranks {text} is no number of ranks; give N, or MIN:MAX such as 6:8.")
    least, most = int(found[1]), int(found[2] or found[1])
    if least < 1:
        raise ValueError(f"--ranks {text}: at least 1 rank is needed.")
    if least > most:
        raise ValueError(f"--ranks {text}: MIN is above MAX; give the smaller number first, {most}:{least}.")
    return Ranks(least, most)


def check_slots(ranks: Ranks, hosts: Sequence[Host], ranks_per_node: int | None) -> None:
    """ValueError where it is known before anything starts that the hosts have no place for so many."""
    slots = [host.slots or ranks_per_node for host in hosts]
    places = sum(filter(None, slots))
    if all(slots) and places < ranks.most:
        raise ValueError(
            f"--ranks {ranks}: the hosts have a place for {places} rank{'s' * (places > 1)}; lower it, or give hosts more slots=N."
        )
