"""One Ray node, alive only as long as its standard input: launch/cluster.py starts this on every machine, directly or over ssh.
The node stops when its input closes, which a killed launcher or a lost connection does too, or when its launcher, whose machine may be gone
without a word, gives no sign of life on it. So nothing is left running."""

import fcntl
import importlib.metadata
import json
import os
import platform
import queue
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

from launch import job_logs
from launch.addresses import free_ports, with_port
from launch.node_processes import ALIVE, NODE, end_with_parent, listening, remove_left, stop

OBJECT_STORE_BYTES = 100_000_000  # near the minimum instead of 30 % of memory: batches and checkpoints never pass through Ray
# Of the head, which gives up a host that is cut off: after about 14 s, where Ray's own settings take 72.
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2500",
    "RAY_health_check_failure_threshold": "4",
}
# Of the agents beside the ranks: what the dashboard shows of processes is older, and they take less of the processors.
QUIET = {"REPORTER_UPDATE_INTERVAL_MS": "30000", "EVENT_AGENT_REPORT_INTERVAL_SECONDS": "2"}
PRIORITY = {"RAY_worker_niceness": "0"}  # of the ranks: Ray would run them at 15, behind its own processes and any other of the machine
MEETING_FOLDER = "PROTOSHARD_RAY_FOLDER"  # the variable that tells ranks of this machine alone where they meet
SILENT_SECONDS = 60.0  # of a launcher that has promised beats
TOKEN = "token"  # a file in the folder of the head
STARTS = 3  # Ray gives up after 30 s, which a busy machine or file system exceeds, and another program may take a port that was free
START_SECONDS = 90
PORTS_SECONDS = 30  # for the dashboard and its agent to listen, once Ray says that it has started
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
LOOPBACK = "127.0.0.1"
OVER = threading.Event()  # the launcher has gone


def main() -> None:
    """Says hello, reads its order (one JSON line), says ready or failed, then waits for the end of its input."""
    for number in SIGNALS:
        signal.signal(number, leave)
    connection = os.environ.get("SSH_CONNECTION", "").split()  # client address, client port, server address, server port
    address = connection[2] if len(connection) == 4 else LOOPBACK
    say("hello", address=address, machine=machine(), ray=version("ray"), python=platform.python_version(), prefix=sys.prefix)
    heard: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=listen, args=(heard,), daemon=True).start()
    line = heard.get()
    if line:
        run(json.loads(line))


def machine() -> str:
    """What two names of one machine have in common, and no two machines, virtual ones and containers included."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"
    except OSError:  # not Linux
        return str(uuid.getnode())


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def run(order: dict[str, Any]) -> None:
    """Order: address (of this node), alone (whether no other machine has a part in the cluster), token, head (address of the head's control
    store, or null to be the head), slots (or null), dashboard (the address on which the head's listens, or null for the loopback), logs (a
    folder, or null: where Ray's own logs are kept at the end)."""
    remove_left()
    try:
        free_ports(order["address"], 1)
    except OSError as error:
        say("failed", reason=f"{order['address']} is no address of this host ({error.strerror}): mend address=A of its line")
        return
    for left in reversed(range(STARTS)):
        reason = attempt(order)
        if reason is None or OVER.is_set():  # by a signal that came while a try was cleared away
            return
        say("again" if left else "failed", reason=reason)


def attempt(order: dict[str, Any]) -> str | None:
    """A node from its start to its end; or why it did not start."""
    folder = tempfile.mkdtemp(prefix="protoshard-ray-", dir="/tmp")  # a long TMPDIR would exceed the 107 bytes of a Unix socket's path
    alive = os.open(os.path.join(folder, ALIVE), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(alive, fcntl.LOCK_EX)
    if order["head"] is None:
        write_token(os.path.join(folder, TOKEN), order["token"])
    node = None
    try:
        command = start_command(order, folder)
        node = subprocess.Popen(
            command,
            cwd=folder,  # a job starts there, and Python looks there first, before PYTHONPATH
            env=environment(order, folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        return follow(node, order, folder)
    finally:
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
        if node is not None:
            stop(node, folder)
        if order.get("logs"):
            job_logs.keep_those_of_ray(f"{folder}/r/session_latest", order["logs"])
        shutil.rmtree(folder, ignore_errors=True)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def listen(heard: queue.Queue[str | None]) -> None:
    """A thread: lines of the launcher. Ends this process where they end, or where there is none for SILENT_SECONDS, once the first one has
    promised beats."""
    rest, limit = b"", None
    while select.select([0], [], [], limit)[0]:
        try:
            data = os.read(0, 1 << 16)
        except OSError:
            break
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in filter(None, lines):
            heard.put(line.decode())
            limit = SILENT_SECONDS if json.loads(line).get("beats") else limit
    heard.put(None)
    OVER.set()
    os.kill(os.getpid(), signal.SIGTERM)


def write_token(path: str, token: str) -> None:
    """For this user alone, who may want to see Ray's dashboard, which asks for it."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{token}\n")


def start_command(order: dict[str, Any], folder: str) -> list[str]:
    """Of a node that keeps its files below `folder`: Ray makes its own folder open to everyone, and whoever writes there runs code."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--log-style=record"]
    command += [f"--node-ip-address={order['address']}", f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={folder}/r"]
    if order["slots"] is not None:
        command.append(f"--resources={json.dumps({'rank_slots': order['slots']})}")
    # Others may have the usual ones.
    ports = order.get("ports") or free_ports(order["address"], 4)
    order["port"], order["dashboard_port"], order["agent_port"], client_port = ports
    command.append(f"--dashboard-agent-listen-port={order['agent_port']}")
    if order["head"] is not None:
        return [*command, f"--address={order['head']}"]
    command += ["--head", f"--port={order['port']}", f"--ray-client-server-port={client_port}"]
    return [*command, f"--dashboard-host={order.get('dashboard') or LOOPBACK}", f"--dashboard-port={order['dashboard_port']}"]


def environment(order: dict[str, Any], folder: str) -> dict[str, str]:
    """What the workers inherit: the cluster's own token, and a folder for temporary files that is removed with all else. Where no other
    machine takes part, nothing of Ray listens to others either, and ranks, which choose the card of the node's address, meet in a file."""
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": order["token"], "TMPDIR": folder, NODE: folder}
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
        env.pop(name, None)
    env.pop(MEETING_FOLDER, None)
    for name, value in (HEALTH | QUIET | PRIORITY).items():
        env.setdefault(name, value)
    if order["alone"]:
        # Otherwise Ray takes another address for 127.0.0.1. Its servers listen on every interface, unless the node's address is this one.
        env |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", MEETING_FOLDER: folder}
    return env


def follow(node: subprocess.Popen[str], order: dict[str, Any], folder: str) -> str | None:
    """Announces the node once it runs, and returns when it ends. Why it did not start, if it did not."""
    output = Output(node)
    deadline = time.monotonic() + START_SECONDS
    while not output.started:
        time.sleep(0.1)
        if output.ended or time.monotonic() > deadline:
            return output.tail() or f"it said nothing for {START_SECONDS} s"
    awaited = {order["agent_port"]} | ({order["dashboard_port"]} if order["head"] is None else set())
    deadline = time.monotonic() + PORTS_SECONDS
    while not awaited <= listening(folder, node.pid):
        time.sleep(0.1)
        if node.poll() is not None or time.monotonic() > deadline:
            return "it started, but another program has taken one of its ports"
    if order["head"] is None:
        host = order.get("dashboard") or LOOPBACK
        host = order["address"] if host in ("0.0.0.0", "::") else host
        head, dashboard = with_port(order["address"], order["port"]), f"http://{with_port(host, order['dashboard_port'])}"
        say("ready", head=head, dashboard=dashboard, token_file=os.path.join(folder, TOKEN))
    else:
        say("ready")
    node.wait()  # unless `listen` ends this process
    return None


class Output:
    """What Ray prints, read all along, because a full pipe would block it."""

    def __init__(self, node: subprocess.Popen[str]) -> None:
        self.started = self.ended = False
        self._lines: deque[str] = deque(maxlen=8)
        threading.Thread(target=self._read, args=(node.stdout,), daemon=True).start()

    def _read(self, lines: Any) -> None:
        for line in lines:
            self._lines.append(line.strip())
            self.started |= "Ray runtime started" in line
        self.ended = True

    def tail(self) -> str:
        return " ".join(filter(None, self._lines))


def say(event: str, **fields: Any) -> None:
    print(f"ray-node {json.dumps({'event': event, **fields})}", flush=True)


def leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
