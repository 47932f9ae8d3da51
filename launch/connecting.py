"""From an address to the job server of a Ray cluster, within seconds, or a sentence that says what answers there instead."""

import http.client
import json
import os
import queue
import socket
import threading
import time
from urllib.parse import urlsplit

import ray

from launch.addresses import is_loopback, is_this_machine
from launch.following import Client

CONNECT_SECONDS = 5
ANSWER_SECONDS = 15
TRY_AGAIN_SECONDS = 0.5
EXPECTED = "give http://host:8265 or host:6379"
OVERRULING = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # variables that Ray takes instead of the address that it is given
# What a client of HTTP/2, which gRPC speaks, says first, and the kind of frame with which its server begins.
HELLO_OF_GRPC, SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), 4


def connect(address: str, patience: float = 0.0) -> Client:
    """Client of the job server of `address`: its http://host:port, or host:port of the head's control store.

    ValueError: nothing there, or something else, or it refuses. A cluster that was just started here is asked again for `patience` seconds;
    then RuntimeError."""
    for name in OVERRULING:
        os.environ.pop(name, None)
    without_proxy(parts(address)[0])
    deadline = time.monotonic() + patience
    while True:
        try:
            return asked(address)
        except ValueError as error:
            if not patience:
                raise
            if time.monotonic() > deadline:
                raise RuntimeError(f"The Ray cluster started, but takes no jobs: {error}") from None
        time.sleep(TRY_AGAIN_SECONDS)


def without_proxy(host: str) -> None:
    """A proxy of the shell is for the world outside: it does not know this machine's loopback, and would be told the cluster's token."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), host]))


def asked(address: str) -> Client:
    """One try. In a thread, because Ray waits for minutes for a control store that says nothing."""
    host, port, scheme = parts(address)
    reach(address, host, port)
    if scheme == "http":
        look_for_dashboard(address, host, port)
    elif not scheme and os.environ.get("RAY_USE_TLS") != "1":
        look_for_head(address, host, port)
    answers: queue.Queue[Client | BaseException] = queue.Queue()
    threading.Thread(target=ask, args=(address, answers), daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        raise ValueError(silent(address)) from None
    if isinstance(answer, SystemExit):  # Ray's own way out when the control store does not answer
        raise ValueError(refused(address, "no control store answers there"))
    if isinstance(answer, BaseException):  # Ray raises anything from ConnectionError to AuthenticationError
        raise ValueError(refused(address, str(answer).strip().partition("\n")[0].rstrip(".")))
    same_version(address, answer)
    return answer


def ask(address: str, answers: "queue.Queue[Client | BaseException]") -> None:
    try:
        client = Client(address)
        dashboard, head = urlsplit(client.get_address()).hostname, urlsplit(f"//{address}").hostname
        if "://" not in address and dashboard and head and on_loopback(dashboard) and not is_this_machine(head):
            # Asked for its jobs, this machine's loopback might answer for another cluster.
            raise ConnectionError(
                f"its dashboard listens on {dashboard} of its own host alone; run this there, or forward the port by ssh -L"
            )
        answers.put(client)
    except BaseException as error:
        answers.put(error)


def on_loopback(host: str) -> bool:
    try:
        return is_loopback(host)
    except ValueError:
        return host == "localhost"


def parts(address: str) -> tuple[str, int, str]:
    """Host, port and scheme, which is http, https or empty."""
    try:
        split = urlsplit(address if "://" in address else f"//{address}")
        host, port = split.hostname, split.port
    except ValueError:
        host = port = None
    if host is None or port is None or split.scheme not in ("", "http", "https"):
        bare = address.count(":") > 2 and "[" not in address
        advice = f"{EXPECTED}, an IPv6 address in brackets" if bare else EXPECTED
        raise ValueError(f"--address {address} is not the address of a Ray cluster; {advice}.")
    return host, port, split.scheme


def reach(address: str, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "no answer"
        raise ValueError(f"No Ray cluster answers at {address} ({reason}); check the address, or leave it out to start one.") from None


def look_for_dashboard(address: str, host: str, port: int) -> None:
    """ValueError: what answers is no dashboard of Ray."""
    connection = http.client.HTTPConnection(host, port, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", "/api/version")
        response = connection.getresponse()
        body = response.read(10_000)
        if response.status not in (401, 403) and "ray_version" not in json.loads(body):
            raise ValueError
    except TimeoutError:
        raise ValueError(silent(address)) from None
    except (http.client.HTTPException, OSError) as error:
        said = str(error).strip() if type(error) is http.client.BadStatusLine else ""
        raise ValueError(other(address, f"it says {said!r}" if said else "it closes the connection")) from None
    except ValueError:
        raise ValueError(other(address, f"HTTP {response.status}, from {response.getheader('Server') or 'an unnamed server'}")) from None
    finally:
        connection.close()


def look_for_head(address: str, host: str, port: int) -> None:
    """ValueError: what answers does not speak as the control store of a head does."""
    with socket.create_connection((host, port), timeout=ANSWER_SECONDS) as connection:
        try:
            connection.sendall(HELLO_OF_GRPC)
            said = connection.recv(100)
        except TimeoutError:
            raise ValueError(silent(address)) from None
        except OSError:
            said = b""
    if said.startswith((b"HTTP/", b"<")):
        raise ValueError(other(address, f"it speaks HTTP: give http://{address} if it is the dashboard"))
    if said[3:4] != bytes([SETTINGS]):
        start = said.partition(b"\n")[0].strip().decode("ascii", "replace")
        raise ValueError(other(address, f"it says {start!r}" if start else "it closes the connection"))


def silent(address: str) -> str:
    return f"What listens at {address} accepts connections, but says nothing for {ANSWER_SECONDS} s; is that the address of a Ray cluster?"


def other(address: str, what: str) -> str:
    return f"What answers at {address} is no Ray cluster ({what}); {EXPECTED}."


def refused(address: str, reason: str) -> str:
    return (
        f"The Ray cluster at {address} accepts no jobs ({reason}); give --address its dashboard (http://host:8265) "
        f"or head address (host:6379), with RAY_AUTH_MODE and RAY_AUTH_TOKEN if it asks for a token."
    )


def same_version(address: str, client: Client) -> None:
    theirs = getattr(client, "_server_ray_version", None)
    if theirs is not None and theirs != ray.__version__:
        raise ValueError(
            f"The Ray cluster at {address} runs Ray {theirs}, but this checkout has {ray.__version__}; start its nodes from this .venv."
        )
