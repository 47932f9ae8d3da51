"""One Ray node, alive only as long as its standard input: launch/cluster.py starts this on every machine, directly or over ssh.
The node stops when its input closes, which a killed launcher or a lost connection does too, or when its launcher, whose machine may be gone
without a word, gives no sign of life on it. So nothing is left running."""

import ctypes
import fcntl
import glob
import json
import os
import queue
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any, NoReturn

from launch import job_logs

OBJECT_STORE_BYTES = 100_000_000  # near the minimum instead of 30 % of memory: batches and checkpoints never pass through Ray
# Of the head, which gives up a host that is cut off: after about 14 s, where Ray's own settings take 72.
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2500",
    "RAY_health_check_failure_threshold": "4",
}
# Of the agents beside the ranks: what the dashboard shows of processes is older, and they take less of the processors.
QUIET = {"REPORTER_UPDATE_INTERVAL_MS": "30000", "EVENT_AGENT_REPORT_INTERVAL_SECONDS": "2"}
MEETING_FOLDER = "PROTOSHARD_RAY_FOLDER"  # the variable that tells ranks of this machine alone where they meet
SILENT_SECONDS = 60.0  # of a launcher that has promised beats
TOKEN = "token"  # a file in the folder of the head
ALIVE = "alive"  # a file in the node's folder, locked while the node lives
NODE = "PROTOSHARD_RAY_NODE"  # the variable by which all that a node has started is known
STOP_SECONDS = 3  # the job is over by then; Ray itself would wait half a minute for Ray Train's detached actor


def main() -> None:
    """Says hello, reads its order (one JSON line), says ready or failed, then waits for the end of its input."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, leave)
    connection = os.environ.get("SSH_CONNECTION", "").split()  # client address, client port, server address, server port
    say("hello", address=connection[2] if len(connection) == 4 else "127.0.0.1")
    heard: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=listen, args=(heard,), daemon=True).start()
    line = heard.get()
    if line:
        run(json.loads(line))


def run(order: dict[str, Any]) -> None:
    """Order: address (of this node), alone (whether no other machine has a part in the cluster), token, head (address of the head's control
    store, or null to be the head), slots (or null), logs (a folder, or null: where Ray's own logs are kept at the end)."""
    remove_left()
    folder = tempfile.mkdtemp(prefix="protoshard-ray-", dir="/tmp")  # a long TMPDIR would exceed the 107 bytes of a Unix socket's path
    alive = os.open(os.path.join(folder, ALIVE), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(alive, fcntl.LOCK_EX)
    if order["head"] is None:
        write_token(os.path.join(folder, TOKEN), order["token"])
    node = None
    try:
        node = subprocess.Popen(
            start_command(order, folder),
            env=environment(order, folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        follow(node, order, folder)
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if node is not None:
            stop(node, folder)
        if order.get("logs"):
            job_logs.keep_those_of_ray(f"{folder}/r/session_latest", order["logs"])
        shutil.rmtree(folder, ignore_errors=True)


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
    os.kill(os.getpid(), signal.SIGTERM)


def write_token(path: str, token: str) -> None:
    """For this user alone, who may want to see Ray's dashboard, which asks for it."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{token}\n")


def end_with_parent() -> None:
    """In the new process: the kernel ends it where this one is killed, which then can stop nothing."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def remove_left() -> None:
    """Folders of nodes that were killed: nobody holds their lock any more."""
    for path in glob.glob(f"/tmp/protoshard-ray-*/{ALIVE}"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                end_all(os.path.dirname(path))
                shutil.rmtree(os.path.dirname(path), ignore_errors=True)
            finally:
                os.close(descriptor)


def start_command(order: dict[str, Any], folder: str) -> list[str]:
    """Of a node that keeps its files below `folder`: Ray makes its own folder open to everyone, and whoever writes there runs code."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--log-style=record"]
    command += [f"--node-ip-address={order['address']}", f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={folder}/r"]
    if order["slots"] is not None:
        command.append(f"--resources={json.dumps({'rank_slots': order['slots']})}")
    order["port"], order["dashboard_port"], agent_port, client_port = free_ports(order["address"], 4)  # others may have the usual ones
    command.append(f"--dashboard-agent-listen-port={agent_port}")
    if order["head"] is not None:
        return [*command, f"--address={order['head']}"]
    command += ["--head", f"--port={order['port']}", f"--ray-client-server-port={client_port}"]
    return [*command, f"--dashboard-host={order['address']}", f"--dashboard-port={order['dashboard_port']}"]


def environment(order: dict[str, Any], folder: str) -> dict[str, str]:
    """What the workers inherit: the cluster's own token and, for gloo, the network interface of the node's address. Where no other machine
    takes part, nothing listens to other machines either: not Ray, not NCCL, and ranks meet in a file."""
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": order["token"], NODE: folder}
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
        env.pop(name, None)
    interface = interface_of(order["address"])
    if interface:  # gloo would take the address of the host's name, which Debian maps to 127.0.1.1
        env.setdefault("GLOO_SOCKET_IFNAME", interface)
    env.pop(MEETING_FOLDER, None)
    for name, value in (HEALTH | QUIET).items():
        env.setdefault(name, value)
    if order["alone"]:
        # Otherwise Ray takes another address for 127.0.0.1. Its servers listen on every interface, unless the node's address is this one.
        env |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", MEETING_FOLDER: folder}
        env.setdefault("NCCL_SOCKET_IFNAME", "lo")
    return env


def follow(node: subprocess.Popen[str], order: dict[str, Any], folder: str) -> None:
    """Announces the node once it runs; returns when standard input closes or the node ends."""
    assert node.stdout is not None
    tail: deque[str] = deque(maxlen=8)
    for line in node.stdout:
        tail.append(line.strip())
        if "Ray runtime started" in line:
            break
    else:
        say("failed", reason=" ".join(filter(None, tail)))
        return
    threading.Thread(target=deque, args=(node.stdout, 0), daemon=True).start()  # keeps reading, because a full pipe would block Ray
    if order["head"] is None:
        address = order["address"]
        say(
            "ready",
            head=f"{address}:{order['port']}",
            dashboard=f"http://{address}:{order['dashboard_port']}",
            token_file=os.path.join(folder, TOKEN),
        )
    else:
        say("ready")
    node.wait()  # unless `listen` ends this process


def stop(node: subprocess.Popen[str], folder: str) -> None:
    node.terminate()
    try:
        node.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        node.kill()
        node.wait()
    end_all(folder)


def end_all(folder: str) -> None:
    for spare in (b"log_file.py", b""):  # which writes the last words of the others
        for _ in range(10):
            left = [pid for pid in started(folder) if not (spare and spare in _read(f"/proc/{pid}/cmdline"))]
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
            if not left:
                break


def started(folder: str) -> list[int]:
    """What lives of all that the node has started. A job's driver has a session of its own, and no parent any more; but the environment
    of the node, in which the name of its folder is."""
    sign = f"{NODE}={folder}\0".encode()
    return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and sign in _read(f"/proc/{pid}/environ")]


def _read(path: str) -> bytes:
    with suppress(OSError), open(path, "rb") as file:
        return file.read()
    return b""


def say(event: str, **fields: str) -> None:
    print(f"ray-node {json.dumps({'event': event, **fields})}", flush=True)


def leave(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)


def free_ports(address: str, count: int) -> list[int]:
    probes = [socket.create_server((address, 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def interface_of(address: str) -> str | None:
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    return None


if __name__ == "__main__":
    main()
