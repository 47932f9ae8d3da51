"""What `--check` looks at on one host, and its part in what hosts do together: `python -m launch.look` answers orders, one JSON line each.
launch/checking.py asks all hosts the same, and compares."""

import hashlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.addresses import free_ports, with_port
from launch.ray_node import LOOPBACK, leave, machine, say, version
from launch.versions import software
from pipeline.network_card import use_card_of

CONNECT_SECONDS = 5
MOST_SECONDS = 300
SEND_SECONDS = 0.5  # of traffic to measure a link's rate by
REDUCED_BYTES = 16 << 20
REDUCE_SECONDS = 30
FOLDERS = ("/tmp", "/dev/shm")


class Look:
    """Methods are the orders of checking.py; what they return is its answer."""

    def __init__(self, folder: str) -> None:
        self.missing = "" if os.path.isdir(folder) else folder
        if not self.missing:
            os.chdir(folder)
        self.made: list[Path] = []  # files and folders that `write` made
        self.server: socket.socket | None = None

    def facts(self, recipe: str, overrides: list[str]) -> dict[str, Any]:
        """Of this host alone."""
        facts: dict[str, Any] = {"missing": self.missing, "name": socket.gethostname(), "software": software(), "gpus": gpus()}
        facts |= {"configuration": "", "refused": "", "run_folder": "", "data": {}, "device": "auto"}
        if not self.missing:
            from pipeline.resolve import resolve

            try:
                config = resolve(recipe, overrides)
                facts["configuration"] = hashlib.sha256(described(asdict(config)).encode()).hexdigest()[:16]
                facts["device"], facts["run_folder"] = config.engine.device, config.run.folder
                facts["data"] = {name: size for name in data_of(config) if (size := seen(name)) is not None}
            except ValueError as error:
                facts["refused"] = str(error)
        facts["free"] = {place: free(place) for place in (*FOLDERS, *filter(None, [facts["run_folder"]]))}
        return facts

    def clock(self) -> float:
        return time.time()

    def write(self, run_folder: str, token: str) -> str:
        """A file in the run's folder, which is made where there is none. Why not, if not."""
        folder = Path(run_folder)
        try:
            for path in (*reversed(folder.parents), folder):
                if not path.exists():
                    path.mkdir(exist_ok=True)
                    self.made.append(path)
            file = folder / f".seen-{token}"
            file.write_text(token)
            self.made.append(file)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    def read(self, run_folder: str, tokens: list[str]) -> list[bool]:
        """Which files of the hosts are there. By name, because a listing of a network file system may be old."""
        return [Path(run_folder, f".seen-{token}").exists() for token in tokens]

    def remove(self) -> int:
        """How much of it is left: a folder in which other hosts still have something."""
        for path in reversed(self.made):
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        self.made = [path for path in self.made if path.exists()]
        return len(self.made)

    def free_port(self, address: str) -> int:
        return free_ports(address, 1)[0]

    def serve(self, address: str) -> int:
        """A port on which this host takes connections and counts what comes."""
        self.server = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        threading.Thread(target=self._accept, daemon=True).start()
        return int(self.server.getsockname()[1])

    def _accept(self) -> None:
        assert self.server is not None
        with suppress(OSError):
            while True:
                connection, _ = self.server.accept()
                threading.Thread(target=swallow, args=(connection,), daemon=True).start()

    def reach(self, others: list[tuple[str, int]]) -> list[str]:
        """Of each: why it cannot be reached, or ""."""
        found: list[str] = [""] * len(others)

        def connect(index: int) -> None:
            try:
                socket.create_connection(others[index], timeout=CONNECT_SECONDS).close()
            except OSError as error:
                found[index] = error.strerror or str(error)

        threads = [threading.Thread(target=connect, args=(index,)) for index in range(len(others))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    def send(self, address: str, port: int) -> float:
        """Bits per second to a host that serves, which says how much it got; 0 if it does not."""
        block, sent = bytes(1 << 16), 0
        try:
            with socket.create_connection((address, port), timeout=CONNECT_SECONDS) as connection:
                began = time.monotonic()
                while time.monotonic() < began + SEND_SECONDS:
                    sent += connection.send(block)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(REDUCE_SECONDS)
                got = int(connection.recv(32) or 0)
                return 8 * got / (time.monotonic() - began)
        except (OSError, ValueError):
            return 0.0

    def reduce(self, rank: int, ranks: int, address: str, meeting: str, port: int, nccl: bool) -> tuple[float, str]:
        """Bytes per second that pass this host's link in an all-reduce over all hosts; or why there is none."""
        from datetime import timedelta

        use_card_of(address)
        import torch
        import torch.distributed as dist

        try:
            limit = timedelta(seconds=REDUCE_SECONDS)
            dist.init_process_group(
                "nccl" if nccl else "gloo",
                init_method=f"tcp://{with_port(meeting, port)}",
                rank=rank,
                world_size=ranks,
                timeout=limit,
            )
            values = torch.zeros(REDUCED_BYTES // 4, device="cuda" if nccl else "cpu")
            dist.all_reduce(values[:1024])
            began, rounds = time.monotonic(), 2
            for _ in range(rounds):
                dist.all_reduce(values)
            float(values[0])
            seconds = (time.monotonic() - began) / rounds
            dist.destroy_process_group()
            return 2 * (ranks - 1) / ranks * REDUCED_BYTES / seconds, ""
        except (RuntimeError, ValueError) as error:
            return 0.0, str(error).strip().partition("\n")[0][:200]


def swallow(connection: socket.socket) -> None:
    """Reads to the end, and says how many bytes there were."""
    with connection, suppress(OSError):
        count = 0
        while block := connection.recv(1 << 20):
            count += len(block)
        connection.sendall(str(count).encode())


def described(config: dict[str, Any]) -> str:
    """The same text for the same configuration, also where something in it is described by its place in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(sorted(config.items())))


def gpus() -> list[dict[str, Any]]:
    """What nvidia-smi says: name, driver, free and total megabytes of each GPU; none where it is not there."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.free,memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
        lines = [[word.strip() for word in line.split(",")] for line in said.splitlines() if line.strip()]
        return [{"name": name, "driver": driver, "free": int(free), "total": int(total)} for name, driver, free, total in lines]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def data_of(config: Any) -> list[str]:
    """Files and folders that the run reads, without patterns and remote addresses."""
    fields = (config.data.train, config.data.subset, config.data.exclude, config.evaluation.data)
    names = [name.strip() for field in fields for name in str(field).split(",")]
    return [name for name in dict.fromkeys(names) if name and "://" not in name and not set("*?[{") & set(name)]


def seen(name: str) -> int | None:
    """Bytes of a file, 0 of a folder, -1 of what is not there."""
    try:
        return os.stat(name).st_size if os.path.isfile(name) else 0 if os.path.isdir(name) else -1
    except OSError:
        return -1


def free(place: str) -> int:
    """Bytes free where `place` is or would be; -1 where that cannot be told."""
    path = Path(place).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return -1


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, leave)
    signal.alarm(MOST_SECONDS)  # where the launcher's machine went down, the input stays open
    connection = os.environ.get("SSH_CONNECTION", "").split()
    address = connection[2] if len(connection) == 4 else LOOPBACK
    say("hello", address=address, machine=machine(), ray=version("ray"), python=platform.python_version(), prefix=sys.prefix)
    look = None
    try:
        for line in sys.stdin:
            order = json.loads(line)
            os.environ.update(order.get("variables", {}))
            look = look or Look(order["folder"])
            say("answer", answer=getattr(look, order["what"])(**order["with"]))
    finally:
        if look is not None:
            look.remove()


if __name__ == "__main__":
    main()
