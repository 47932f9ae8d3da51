"""What --address says about an address where no Ray cluster takes jobs: within seconds, in a sentence that names it and what answers."""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
import ray

from launch import connecting

Serving = Callable[[Callable[[socket.socket], None]], int]


@pytest.fixture
def serving(monkeypatch) -> Iterator[Serving]:
    """A function from what is done with each connection to the port where that happens."""
    monkeypatch.setattr(connecting, "ANSWER_SECONDS", 1)
    servers: list[socket.socket] = []
    kept: list[socket.socket] = []

    def serve(answer: Callable[[socket.socket], None]) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def loop() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                kept.append(connection)
                answer(connection)

        threading.Thread(target=loop, daemon=True).start()
        return server.getsockname()[1]

    yield serve
    for server in (*servers, *kept):
        server.close()


def fails(address: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        connecting.connect(address)
    assert str(caught.value).count("\n") == 0 and address in str(caught.value)


def test_a_port_that_says_nothing(serving):
    port = serving(lambda connection: None)
    for scheme in ("", "http://"):
        fails(f"{scheme}127.0.0.1:{port}", "accepts connections, but says nothing for 1 s")


def test_a_port_that_says_something_else(serving):
    port = serving(lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"))
    for scheme in ("", "http://"):
        fails(f"{scheme}127.0.0.1:{port}", "is no Ray cluster (it says 'SSH-2.0-OpenSSH_9.2'")
    port = serving(lambda connection: connection.close())
    fails(f"127.0.0.1:{port}", "is no Ray cluster (it closes the connection); give http://host:8265 or host:6379.")
    fails(f"http://127.0.0.1:{port}", "is no Ray cluster (it closes the connection)")


def test_a_control_store_that_hangs(serving):
    """It greets as HTTP/2 does, and then answers nothing."""
    port = serving(lambda connection: connection.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])))
    fails(f"127.0.0.1:{port}", "says nothing for 1 s")


@pytest.fixture
def web(request):
    """A web server with one answer: status, and its JSON or text."""
    status, body = request.param

    class Answer(http.server.BaseHTTPRequestHandler):
        server_version, sys_version = "nginx", ""

        def do_GET(self) -> None:
            text = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("web", [(404, "not here"), (200, "<html>"), (200, {"version": 1}), (200, [1])], indirect=True)
def test_another_web_server(web):
    fails(f"http://127.0.0.1:{web}", "is no Ray cluster (HTTP ")
    fails(f"127.0.0.1:{web}", f"it speaks HTTP: give http://127.0.0.1:{web} if it is the dashboard")


@pytest.mark.parametrize("web", [(200, {"ray_version": "2.9.3", "version": "4", "ray_commit": "c", "session_name": "s"})], indirect=True)
def test_a_cluster_of_another_ray(web, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # which Ray would take instead
    fails(f"http://127.0.0.1:{web}", f"runs Ray 2.9.3, but this checkout has {ray.__version__}; start its nodes from this .venv.")
    assert "RAY_ADDRESS" not in os.environ


@pytest.mark.parametrize("address", ["head", "head:x", "ray://head:10001", "fd77::1:6379", "http://head", ""])
def test_what_is_no_address(address):
    fails(address, "is not the address of a Ray cluster; give http://host:8265 or host:6379")


def test_ipv6_addresses_stand_in_brackets():
    assert connecting.parts("[fd77::1]:6379") == ("fd77::1", 6379, "")
    assert connecting.parts("http://[fd77::1]:8265") == ("fd77::1", 8265, "http")
    fails("fd77::1:6379", "an IPv6 address in brackets")


def test_a_cluster_that_was_started_here_is_asked_for_longer(monkeypatch):
    monkeypatch.setattr(connecting, "TRY_AGAIN_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(RuntimeError, match=r"The Ray cluster started, but takes no jobs: No Ray cluster answers at http://127.0.0.1:"):
        connecting.connect(f"http://127.0.0.1:{port}", patience=0.2)
