"""Separate hosts on one machine: Linux network namespaces with a sshd each, on a switch of their own. conftest.py has the fixtures.

Nothing of it is in the machine's own network, so several test runs do not meet. Everything dies with the process that made it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.launch.namespaces import PROGRAM

ROOT = Path(__file__).resolve().parents[2]
DELAY = Path(__file__).with_name("delay.py")
SSHD = shutil.which("sshd", path="/usr/sbin:/sbin:" + os.environ.get("PATH", ""))
PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "mount": "mount", "ssh": "openssh-client", "ssh-keygen": "openssh-client"}
SECONDS = 20  # for a host to boot
CONFIG = """PermitRootLogin yes
StrictModes no
UsePAM no
UseDNS no
PidFile none
MaxStartups 100
PasswordAuthentication no
KbdInteractiveAuthentication no
"""
# The first program of a host. What a host shares with the others is the root file system, without what lies in /tmp, /run and /dev/shm:
# there only the folders of the tests and of this checkout are the same everywhere, as on a shared file system.
SETUP = """set -e
mount -t proc proc /proc
mount -t tmpfs -o size=4g tmpfs /dev/shm
mount -t tmpfs -o size=64m tmpfs /run && mkdir /run/sshd
mount -t tmpfs -o size=4g,mode=1777 tmpfs {folder}/tmp
for shared in {shared}; do mkdir {folder}/tmp/$(basename $shared) && mount --bind $shared {folder}/tmp/$(basename $shared); done
mount --move {folder}/tmp /tmp
if [ -d ~/.ssh ]; then mount -t tmpfs tmpfs ~/.ssh; fi
if [ -e ~/.bashrc ]; then mount --bind /dev/null ~/.bashrc; fi
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/resolv.conf /etc/resolv.conf
mount --bind {folder}/../ssh_config /etc/ssh/ssh_config
hostname {name}
ip link set lo up
ip address add {address}/24 dev eth0
ip address add {address6}/64 dev eth0 nodad
ip link set eth0 address {hardware} up
ip route add default via 10.77.0.254
{sshd} -f {folder}/sshd_config -E {folder}/sshd.log
"""
SWITCH = """set -e
ip link set lo up
ip link add switch type bridge mcast_snooping 0 forward_delay 0
ip address add 10.77.0.254/24 dev switch
ip link set switch up
echo 1 > /proc/sys/net/ipv4/ip_forward
ip route add unreachable default
"""


def why_not() -> str | None:
    """Why this machine can have no separate hosts, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "separate hosts are network namespaces of Linux, which only root can make"
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            return f"separate hosts need the program {program} (package {package})"
    if SSHD is None:
        return "separate hosts need the program sshd (package openssh-server)"
    making = "ip link add near type veth peer name far && ip link add switch type bridge"
    making += " && tc qdisc add dev near root tbf rate 1mbit burst 9kb latency 9ms"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "sh", "-c", making], capture_output=True, text=True)
    return f"this kernel makes no network namespaces with bridges: {tried.stderr.strip()}" if tried.returncode else None


class Machine:
    """Namespaces of their own, with a first process."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.first = 0  # process number outside of the first process

    def start(self, setup: str, folder: Path) -> None:
        (folder / "setup.sh").write_text(setup)
        self.process = subprocess.Popen(
            [*PROGRAM, "boot", "sh", str(folder / "setup.sh")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.first = int(self.process.stdout.readline().split()[1])

    def set_up(self) -> None:
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line == "ready 0\n", line

    def stop(self) -> None:
        """All processes of the machine have gone when this returns."""
        if self.process is not None:
            self.process.stdin.close()  # type: ignore[union-attr]
            os.kill(self.first, signal.SIGKILL)
            self.process.wait(SECONDS)
            self.process.stdout.close()  # type: ignore[union-attr]
            self.process = None

    def popen(self, command: Sequence[str], cwd: str | os.PathLike[str] = "/", **options: Any) -> subprocess.Popen[str]:
        """`command` on this machine. Signals to the process that is returned reach it, SIGKILL too."""
        return subprocess.Popen([*PROGRAM, "enter", str(self.first), str(cwd), *map(str, command)], **{"text": True, **options})

    def run(
        self, command: Sequence[str], cwd: str | os.PathLike[str] = "/", timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Output and exit code of `command` on this machine; stderr is in stdout unless given."""
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        entering = [*PROGRAM, "enter", str(self.first), str(cwd), *map(str, command)]
        return subprocess.run(entering, timeout=timeout, **{**pipes, **options})

    def sh(self, script: str) -> str:
        done = self.run(["sh", "-c", script])
        assert done.returncode == 0, f"{script}\n{done.stdout}"
        return done.stdout

    def processes(self) -> dict[int, str]:
        """Command lines by process number outside, without zombies."""
        space, found = os.readlink(f"/proc/{self.first}/ns/pid"), {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.readlink(f"/proc/{pid}/ns/pid") == space:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                    if words != [b""]:
                        found[int(pid)] = b" ".join(words).decode(errors="replace").strip()
            except OSError:  # it has ended
                pass
        return found


class Host(Machine):
    """A host with its own addresses, processes, name, /tmp, /run and /dev/shm, whose sshd lets the others in as root.

    `ssh NAME`, `ssh 10.77.0.N` and `ssh fd77::N` work on every host, with host keys checked. Its own name means 127.0.1.1 there, as Debian
    has it; other names mean nothing outside of ssh. Folders of tests (tmp_path), the checkout and what lies outside of /tmp are shared."""

    def __init__(self, number: int, name: str, network: "Network") -> None:
        super().__init__()
        self.name, self.network = name, network
        self.address, self.address6 = f"10.77.0.{number}", f"fd77::{number}"
        self.hardware = f"02:77:00:00:00:{number:02x}"
        self.folder = network.folder / name
        self.port = f"port{number}"  # of the switch
        self.cable: subprocess.Popen[bytes] | None = None  # what delays frames
        self.changed = False  # by a fault, which the next boot heals
        self.variables: dict[str, str] = {"OMP_NUM_THREADS": "1"}  # of whoever comes in by ssh
        (self.folder / "tmp").mkdir(parents=True)
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n::1 localhost ip6-localhost\n")
        (self.folder / "resolv.conf").write_text("")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "host_key")], check=True)

    def boot(self) -> None:
        """Switches it on, with an empty /tmp and all its faults healed."""
        self.variables = {"OMP_NUM_THREADS": "1"}
        self._write_sshd_config()
        self.start(
            SETUP.format(
                name=self.name, address=self.address, address6=self.address6, hardware=self.hardware, folder=self.folder, sshd=SSHD,
                shared=" ".join(self.network.shared),
            ),
            self.folder,
        )  # fmt: skip
        self.network.plug_in(self)
        self.set_up()
        self.changed = False
        self.own = set(self.processes())

    def kill(self) -> None:
        """The power goes: no connection is closed, and nothing is left of it."""
        self.cut()
        self.stop()
        self._take_cable()
        self.network.sh(f"ip link delete {self.port} 2>/dev/null || true")

    def cut(self) -> None:
        """Its cable is pulled out."""
        self.changed = True
        self.network.sh(f"ip link set {self.port} down")

    def restore(self) -> None:
        self.network.sh(f"ip link set {self.port} up")

    def limit(self, rate: str | None) -> None:
        """Its link has that rate in both directions, as in 100mbit; None: no limit."""
        self.changed = True
        words = f"replace dev {{}} root tbf rate {rate} burst 128kb latency 300ms" if rate else "delete dev {} root"
        self.network.sh("tc qdisc " + words.format(self.port))
        self.sh("tc qdisc " + words.format("eth0"))

    def delay(self, milliseconds: float) -> None:
        """Each frame to it and from it takes that much longer, so its round trips twice that. 0: no delay."""
        self.changed = True
        self._take_cable()
        if milliseconds == 0:
            self.network.sh(f"ip link set {self.port} master switch")
            return
        ends = f"near{self.port[4:]}", f"far{self.port[4:]}"
        self.network.sh(
            f"ip link add {ends[0]} type veth peer name {ends[1]} && ip link set {ends[0]} up && ip link set {ends[1]} up && "
            f"ip link set {ends[1]} master switch && ip link set {self.port} nomaster"
        )
        command = [sys.executable, "-S", "-I", str(DELAY), self.port, ends[0], str(milliseconds)]
        self.cable = subprocess.Popen([*PROGRAM, "enter", str(self.network.first), "/", *command])
        time.sleep(0.2)  # it opens both cards

    def cover(self, path: str | os.PathLike[str], source: str | os.PathLike[str] | None = None, size: str = "64m") -> None:
        """Another folder or file, `source`, in place of `path` on this host alone; without `source` an empty folder of that size."""
        self.changed = True
        self.sh(f"mount --bind {source} {path}" if source else f"mount -t tmpfs -o size={size} tmpfs {path}")

    def uncover(self, path: str | os.PathLike[str]) -> None:
        self.sh(f"umount -l {path}")

    def clock(self, seconds: float) -> None:
        """Python that comes in by ssh reads another time (namespaces shift no wall clock)."""
        folder = self.folder / "clock"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(
            f"import time\nnow, now_ns = time.time, time.time_ns\ntime.time = lambda: now() + {seconds}\n"
            f"time.time_ns = lambda: now_ns() + int({seconds} * 1e9)\n"
        )
        self.environment(PYTHONPATH=str(folder))

    def environment(self, **variables: str) -> None:
        """Variables for whoever comes in by ssh."""
        self.changed = True
        self.variables |= variables
        self._write_sshd_config()
        log, deadline = self.folder / "sshd.log", time.monotonic() + 20
        before = log.read_text().count("Server listening on")
        os.kill(next(pid for pid, words in self.processes().items() if pid in self.own and "sshd" in words), signal.SIGHUP)
        while log.read_text().count("Server listening on") < before + 2:  # at IPv4 and IPv6 anew; until then it refuses
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)

    def left(self) -> list[str]:
        """What is there that was not when the host had booted: command lines of processes, files in /tmp and /dev/shm."""
        found = [words for pid, words in self.processes().items() if pid not in self.own]
        for place in ("/tmp", "/dev/shm"):
            names = os.listdir(f"/proc/{self.first}/root{place}")
            found += [f"{place}/{name}" for name in names if f"{place}/{name}" not in self.network.shared]
        return found

    def _take_cable(self) -> None:
        if self.cable is not None:
            self.cable.terminate()
            self.cable.wait()
            self.cable = None
            self.network.sh(f"ip link delete near{self.port[4:]}")

    def _write_sshd_config(self) -> None:
        words = " ".join(f'"{name}={value}"' for name, value in self.variables.items())
        lines = [f"HostKey {self.folder}/host_key", f"AuthorizedKeysFile {self.network.folder}/key.pub", f"SetEnv {words}"]
        (self.folder / "sshd_config").write_text(CONFIG + "\n".join(lines) + "\n")


class Network(Machine):
    """A switch and the hosts at it. `hosts` are called node1 to nodeN; `desk` is one more, for a launcher that has no rank."""

    def __init__(self, folder: Path, count: int = 3) -> None:
        super().__init__()
        self.folder = folder
        below = [path.resolve() for path in (folder, ROOT, Path(sys.prefix)) if path.resolve().is_relative_to("/tmp")]
        self.shared = sorted({f"/tmp/{path.parts[2]}" for path in below})  # folders of /tmp that hosts have in common
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
        self.hosts = [Host(number, f"node{number}", self) for number in range(1, count + 1)]
        self.desk = Host(100, "desk", self)
        self.everyone = [*self.hosts, self.desk]
        known = [f"{host.name},{host.address},{host.address6} {(host.folder / 'host_key.pub').read_text()}" for host in self.everyone]
        (folder / "known_hosts").write_text("".join(known))
        names = [f"Host {host.name}\n  HostName {host.address}\n  HostKeyAlias {host.name}\n" for host in self.everyone]
        rules = f"Host *\n  IdentityFile {folder}/key\n  UserKnownHostsFile {folder}/known_hosts\n  StrictHostKeyChecking yes\n"
        (folder / "ssh_config").write_text("".join(names) + rules)

    def open(self) -> None:
        self.start(SWITCH, self.folder)
        self.set_up()
        for host in self.everyone:
            host.boot()

    def close(self) -> None:
        for machine in (*self.everyone, self):
            machine.stop()

    def plug_in(self, host: Host) -> None:
        assert host.process is not None
        self.sh(
            f"ip link add {host.port} type veth peer name eth0 netns /proc/{host.first}/ns/net && ip link set {host.port} master switch up"
        )

    def heal(self) -> None:
        """Hosts with a fault are switched off and on again."""
        for host in self.everyone:
            if host.process is None:
                host.boot()
            elif host.changed:
                host.kill()
                host.boot()
