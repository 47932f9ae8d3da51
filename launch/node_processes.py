"""The processes of one Ray node: which ones live, on which ports they listen, and their end. launch/ray_node.py starts them."""

import ctypes
import fcntl
import glob
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress

ALIVE = "alive"  # a file in the node's folder, locked while the node lives
NODE = "PROTOSHARD_RAY_NODE"  # the variable by which all that a node has started is known
STOP_SECONDS = 3  # the job is over by then; Ray itself would wait half a minute for Ray Train's detached actor


def end_with_parent() -> None:
    """In the new process: the kernel ends it where this one is killed, which then can stop nothing."""
    with suppress(AttributeError):  # not Linux
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


def listening(folder: str, session: int) -> set[int]:
    """The ports on which what the node has started listens."""
    import psutil

    ports = set()
    for pid in (*started(folder), *of_session(session)):
        with suppress(psutil.Error):
            connections = psutil.Process(pid).net_connections("tcp")
            ports |= {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}
    return ports


def stop(node: subprocess.Popen[str], folder: str) -> None:
    node.terminate()
    try:
        node.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        node.kill()
        node.wait()
    end_all(folder)
    for pid in of_session(node.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


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


def of_session(session: int) -> list[int]:
    """Processes of the session that the node leads. Those of Ray that give themselves a title write it over their environment."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with suppress(ProcessLookupError):
            if os.getsid(pid) == session:
                found.append(pid)
    return found


def started(folder: str) -> list[int]:
    """What lives of all that the node has started. A job's driver has a session of its own, and no parent any more; but the environment
    of the node, in which the name of its folder is."""
    sign = f"{NODE}={folder}\0".encode()
    return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and sign in _read(f"/proc/{pid}/environ")]


def _read(path: str) -> bytes:
    with suppress(OSError), open(path, "rb") as file:
        return file.read()
    return b""
