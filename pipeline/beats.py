"""What the ranks of a run say of themselves (heartbeat.py), read by somebody who is none of them."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable

from pipeline.heartbeat import BYTES, FOLDER, Beat, interval

NAME = re.compile(r"rank-(\d{5,})")
LOOKS = 3  # intervals between beats, after which a rank that gave none is silent
_sleep = time.sleep


def read_all(folder: str) -> list[Beat]:
    """Of all ranks whose files are there, of whatever start of the run, by rank. Files that are not whole are left out."""
    beats = []
    try:
        names = os.listdir(os.path.join(folder, FOLDER))
    except OSError:
        return []
    for name in sorted(filter(NAME.fullmatch, names)):
        try:
            with open(os.path.join(folder, FOLDER, name), "rb") as file:
                beat = Beat(**json.loads(file.read(BYTES)))
            if all(type(getattr(beat, field)) is kind for field, kind in (("rank", int), ("host", str), ("doing", str), ("step", int))):
                beats.append(beat)
        except (OSError, ValueError, TypeError, RecursionError):
            continue
    return beats


def of_one_start(beats: list[Beat]) -> list[Beat]:
    """Those of the start of the run to which most of them belong: an earlier one may have had more ranks."""
    runs = [beat.run for beat in beats]
    return [beat for beat in beats if beat.run == max(set(runs), key=runs.count)]


def alive(folder: str, wait: Callable[[float], None] | None = None) -> dict[int, bool]:
    """Which ranks beat. Takes some seconds: two looks are compared, so that no clock of another host matters."""
    before = of_one_start(read_all(folder))
    if not before:
        return {}
    first = {beat.rank: beat.count for beat in before}
    (wait or _sleep)(LOOKS * interval(len(first)))
    now = {beat.rank: beat for beat in read_all(folder)}
    return {rank: rank in now and now[rank].count != count and not now[rank].end for rank, count in first.items()}
