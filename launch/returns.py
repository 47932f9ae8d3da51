"""Hosts of a cluster that were lost: they are tried again in the background, and join it when they are back."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

RETRY = 10.0  # seconds between two tries to reach a host
HELLO_SECONDS = 60
READY_SECONDS = 120
LEAVE_SECONDS = 5
LONGEST = 500  # letters of a reason


class Node(Protocol):
    """What launch/cluster.py has for a host."""

    def has_left(self) -> bool: ...

    def expect(self, event: str, deadline: float) -> dict[str, Any]: ...

    def send(self, order: dict[str, Any]) -> None: ...

    def close(self) -> None: ...

    def wait(self, deadline: float) -> None: ...


class Returns:
    """Watches over the nodes of a cluster, a list whose first is the head, and puts in it what takes the place of one that was lost.

    names, orders  of each node: its host's name, and what it was told to be
    begin          starts the conversation with the host of that place in the list
    say            prints a line"""

    def __init__(
        self,
        nodes: list[Any],
        names: list[str],
        orders: list[dict[str, Any]],
        begin: Callable[[int], Node],
        say: Callable[[str], None],
        retry: float | None = None,
    ) -> None:
        self._nodes, self._names, self._orders, self._begin, self._say, self._retry = nodes, names, orders, begin, say, retry or RETRY
        self._ended = threading.Event()
        self._tried: dict[int, threading.Thread] = {}
        self._trying: dict[int, Node] = {}

    def check(self) -> None:
        """To be called now and then. RuntimeError when the head is lost, and with it the job."""
        for place, node in enumerate(self._nodes):
            if not node.has_left():
                continue
            if place == 0:
                raise RuntimeError(
                    f"Host {self._names[0]}, the head of the Ray cluster, was lost, and the job with it: the same command continues from "
                    "the newest checkpoint"
                )
            thread = self._tried.get(place)
            if (thread is None or not thread.is_alive()) and self._nodes[place] is node:  # and not one that has come just now
                self._say(f"host {self._names[place]} was lost: trying every {self._retry:g} s to reach it")
                self._tried[place] = threading.Thread(target=self._bring_back, args=(place,), name="returns", daemon=True)
                self._tried[place].start()

    def close(self) -> None:
        """No host is tried any more."""
        self._ended.set()
        for node in list(self._trying.values()):
            node.close()
        for thread in self._tried.values():
            thread.join(LEAVE_SECONDS + 1)

    def _bring_back(self, place: int) -> None:
        since, told = time.monotonic(), ""
        while not self._ended.wait(self._retry):
            node: Node | None = None
            try:
                node = self._trying[place] = self._begin(place)
                node.expect("hello", time.monotonic() + HELLO_SECONDS)
                node.send(self._orders[place])
                node.expect("ready", time.monotonic() + READY_SECONDS)
            except (ValueError, RuntimeError) as error:  # it is not back, or not ready for it
                if node is not None:
                    node.close()
                    with suppress(OSError):
                        node.wait(time.monotonic() + LEAVE_SECONDS)
                reason = str(error)
                if re.sub(r"\d+", "", reason) != re.sub(r"\d+", "", told) and not self._ended.is_set():  # ports and times differ
                    self._say(f"host {self._names[place]} is not back yet: {reason[:LONGEST]}")
                told = reason
                continue
            finally:
                self._trying.pop(place, None)
            self._nodes[place] = node
            self._say(f"host {self._names[place]} is back in the cluster after {time.monotonic() - since:.0f} s")
            return
