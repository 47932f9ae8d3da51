"""The dashboard of a head elsewhere, which listens on its loopback alone, reached through ssh."""

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import urlsplit

from launch.addresses import free_ports
from launch.node_processes import end_with_parent

AGAIN_SECONDS = 1.0  # between a connection that broke and the next try
LOOPBACK = "127.0.0.1"


def command(ssh: Sequence[str], target: str, here: str, there: str) -> list[str]:
    """here, there: ports of both loopbacks. A master connection of the user's, which ssh might share, would take the forward over and keep
    it."""
    options = ["-o", "ExitOnForwardFailure=yes", "-o", "ControlMaster=no", "-o", "ControlPath=none"]
    return [*ssh, *options, "-N", "-L", f"{LOOPBACK}:{here}:{LOOPBACK}:{there}", "--", target]


class Tunnel:
    """Forwards a port of this machine's loopback to that of `url` on `target`, and connects again for as long as it is open. `here` is the
    address of the dashboard on this side."""

    def __init__(self, ssh: Sequence[str], target: str, url: str) -> None:
        (port,) = free_ports(LOOPBACK, 1)
        self.here = f"http://{LOOPBACK}:{port}"
        self._command = command(ssh, target, f"{port}", f"{urlsplit(url).port}")
        self._closed = threading.Event()
        self._process = self._connect()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _connect(self) -> "subprocess.Popen[bytes]":
        """Nothing runs there for it, so nothing is left there when this machine goes down. A session of its own, because Ctrl-C at the
        terminal is for the launcher."""
        return subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )

    def _keep(self) -> None:
        while True:
            self._process.wait()
            if self._closed.wait(AGAIN_SECONDS):
                return
            self._process = self._connect()

    def close(self) -> None:
        self._closed.set()
        while self._thread.is_alive():
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._thread.join(0.1)
