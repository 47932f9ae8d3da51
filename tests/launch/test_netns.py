"""That the hosts of the launch tests are like separate machines."""

import signal
import subprocess
import sys
import time

import psutil

from tests.launch.netns import ROOT, Host


def ping(host: Host, address: str, count: int = 3) -> list[float]:
    """Milliseconds of round trips over TCP, to sshd."""
    script = (
        "import socket, sys, time\nfor _ in range(int(sys.argv[2])):\n    before = time.monotonic()\n"
        "    socket.create_connection((sys.argv[1], 22), timeout=1).close()\n    print((time.monotonic() - before) * 1000)"
    )
    done = host.run([sys.executable, "-S", "-c", script, address, str(count)])
    return [float(line) for line in done.stdout.split()] if done.returncode == 0 else []


def test_hosts_are_apart(hosts, tmp_path):
    first, second = hosts[:2]
    assert [host.sh("hostname").strip() for host in hosts] == ["node1", "node2", "node3"]
    for target in (second.name, second.address, second.address6):
        said = first.run(["ssh", "-o", "BatchMode=yes", target, "hostname; getent hosts $(hostname)"]).stdout
        assert said.split()[:2] == ["node2", "127.0.1.1"]
    first.sh(f"touch /tmp/mine /dev/shm/mine {tmp_path}/ours")
    assert sorted(first.left()) == ["/dev/shm/mine", "/tmp/mine"] and second.left() == []
    assert second.sh(f"ls {tmp_path}").split() == ["ours"]
    first.sh("rm /tmp/mine /dev/shm/mine")
    assert not [name for name in psutil.net_if_addrs() if name.startswith(("port", "eth0@", "switch"))]


def test_signals_reach_a_command_on_a_host(hosts):
    script = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nprint('up', flush=True)\nsignal.pause()"
    command = hosts[0].popen([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE)
    assert command.stdout.readline() == "up\n" and len(hosts[0].left()) == 1
    command.terminate()
    assert command.wait(10) == 75
    command = hosts[0].popen([sys.executable, "-S", "-c", script], stdout=subprocess.PIPE)
    assert command.stdout.readline() == "up\n"
    command.kill()
    assert command.wait(10) == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while hosts[0].left():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_faults_and_what_heals_them(hosts, network):
    first, second, third = hosts
    second.cut()
    assert ping(first, second.address, 1) == [] and ping(first, third.address, 1) != []
    second.restore()
    assert ping(first, second.address, 1) != []
    second.delay(20)
    assert min(ping(first, second.address)) >= 40 and min(ping(second, third.address6)) >= 40
    second.delay(0)
    assert ping(first, second.address) != []
    second.clock(3600)
    now = first.run(["ssh", "node2", f"{sys.executable} -c 'import time; print(time.time())'"])
    assert float(now.stdout) > time.time() + 3000
    second.cover(ROOT / "launch", size="1m")
    assert second.run(["ls", ROOT / "launch"]).stdout == "" and first.run(["ls", ROOT / "launch"]).stdout != ""
    third.kill()
    assert ping(first, third.address, 1) == []
    network.heal()
    assert ping(first, second.address) != [] and ping(first, third.address) != []
    assert second.run(["ls", ROOT / "launch"]).stdout != "" and not second.changed


def test_a_limited_link(hosts):
    """2 MB at 40 Mbit/s take 0.4 s or more, delayed or not."""
    first, second = hosts[:2]
    second.limit("40mbit")
    for milliseconds in (0, 5):
        if milliseconds:
            second.delay(milliseconds)
        began = time.monotonic()
        assert first.run(["sh", "-c", "head -c 2000000 /dev/urandom | ssh node2 'wc -c'"]).stdout.strip() == "2000000"
        assert time.monotonic() - began >= 0.35


def test_nothing_stays_when_the_tests_are_killed(network, tmp_path):
    script = f"""
import time
from pathlib import Path
from tests.launch.netns import Network
network = Network(Path({str(tmp_path)!r}), count=1)
network.open()
network.hosts[0].delay(1)
job = network.hosts[0].popen(["sleep", "1000"])
print(*[pid for machine in (*network.everyone, network) for pid in machine.processes()], network.hosts[0].cable.pid, job.pid, flush=True)
time.sleep(1000)
"""
    tests = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in tests.stdout.readline().split()]
    assert len(pids) >= 7 and all(map(psutil.pid_exists, pids))
    tests.kill()
    tests.wait()
    deadline = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
