import re
import socket

import pytest

from launch import cluster
from launch.addresses import free_ports, is_this_machine, with_port
from launch.hosts import Host, read_hosts
from pipeline.network_card import address_towards, card_of


@pytest.fixture
def hosts_file(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "hosts.txt").write_text(text)
        return str(tmp_path / "hosts.txt")

    return write


def test_hosts_with_users_slots_and_comments(hosts_file):
    path = hosts_file("# two machines\n\ngpu-1.invalid slots=8\nann@gpu-2.invalid   slots=4  # the old one\n")
    assert read_hosts(path) == [
        Host("gpu-1.invalid", "gpu-1.invalid", 8, False),
        Host("ann@gpu-2.invalid", "gpu-2.invalid", 4, False),
    ]


def test_this_machine_is_the_head_wherever_it_is_listed(hosts_file):
    hosts = read_hosts(hosts_file("gpu-1.invalid\nlocalhost\ngpu-2.invalid\n"))
    assert [(host.name, host.local) for host in hosts] == [("localhost", True), ("gpu-1.invalid", False), ("gpu-2.invalid", False)]


@pytest.mark.parametrize("line", ["fd77::1", "[fd77::1]", "[fd77::1] slots=2", "ann@[fd77::1]", "ann@fd77::1 address=fd77::9"])
def test_ipv6_addresses_with_and_without_brackets(hosts_file, line):
    (host,) = read_hosts(hosts_file(line))
    assert host.name == "fd77::1" and host.target in ("fd77::1", "ann@fd77::1")  # ssh knows no brackets


def test_an_address_for_the_other_hosts(hosts_file):
    path = hosts_file(
        "gpu-1.invalid address=10.0.0.1 slots=2\ngpu-2.invalid slots=2 address=[fd77::2]\nfe80::1%eth0 slots=1 address=10.0.0.3\n"
    )
    assert [(host.slots, host.address) for host in read_hosts(path)] == [(2, "10.0.0.1"), (2, "fd77::2"), (1, "10.0.0.3")]


def test_under_which_address_hosts_know_each_other():
    hosts = [Host(name, name, None, name == "a", "10.9.0.1" if name == "c" else None) for name in "abc"]
    assert cluster.reachable(hosts[1:], ["10.0.0.2", "192.168.0.3"]) == ["10.0.0.2", "10.9.0.1"]
    assert cluster.reachable(hosts[:1], ["127.0.0.1"]) == ["127.0.0.1"]
    with pytest.raises(ValueError, match=r"Host b is reached as 127.0.0.1, which means another host elsewhere; give its line an address=A"):
        cluster.reachable([hosts[1], hosts[0]], ["127.0.0.1", "127.0.0.1"])
    with pytest.raises(ValueError, match=r"Host b is reached as fe80::1%eth0, which means another host elsewhere"):
        cluster.reachable(hosts[1:], ["fe80::1%eth0", "10.0.0.3"])


def hello(**changes):
    return {"machine": "m1", "ray": "2.60.0", "python": "3.11.7", "prefix": "/x/.venv"} | changes


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (hello(), "Hosts a and b are the same machine; list it once, with slots=N for N ranks."),
        (hello(machine="m2", ray=""), "Host b has no Ray in /x/.venv; run launch/quickstart.sh there."),
        (hello(machine="m2", ray="2.9.0"), "Host b has Ray 2.9.0, but a has 2.60.0; install the same versions"),
        (hello(machine="m2", python="3.12.1"), "Host b has Python 3.12.1, but a has 3.11.7; install"),
    ],
)
def test_hosts_that_cannot_be_in_one_cluster(second, sentence):
    hosts = [Host("a", "a", None, True), Host("b", "b", None, False)]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        fit_together(hosts, [hello(), second])
    fit_together(hosts, [hello(), hello(machine="m2")])


def fit_together(hosts, hellos):
    cluster.one_of_each(hosts, hellos)
    cluster.same_versions(hosts, hellos)


def test_this_machine_under_another_user_needs_ssh(hosts_file):
    assert not read_hosts(hosts_file("someone-else@localhost\n"))[0].local


def test_names_of_this_machine():
    assert is_this_machine(socket.gethostname()) and is_this_machine("127.0.0.1")
    assert is_this_machine("localhost") and is_this_machine("127.0.0.9") and is_this_machine(socket.gethostname().upper())
    assert not is_this_machine("192.0.2.77") and not is_this_machine("2001:db8::77")  # addresses reserved for documentation
    assert not is_this_machine("x" * 70) and not is_this_machine("host.invalid")


def test_addresses_and_ports_of_this_machine():
    assert address_towards("127.0.0.1") == "127.0.0.1" and card_of("127.0.0.1") == "lo" and card_of("192.0.2.77") is None
    assert (with_port("10.0.0.1", 9), with_port("fd77::1", 9)) == ("10.0.0.1:9", "[fd77::1]:9")
    assert len(set(free_ports("127.0.0.1", 4))) == 4
    if socket.has_ipv6 and is_this_machine("::1"):
        assert address_towards("::1") == "::1" and len(set(free_ports("::1", 4))) == 4


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "names no host; write one host per line"),
        ("# nothing\n\n", "names no host"),
        ("gpu-1 gpu-2\n", "line 1: 'gpu-1 gpu-2' is not a host"),
        ("gpu-1\ngpu-2 slots=many\n", "line 2: 'gpu-2 slots=many' is not a host"),
        ("-oProxyCommand=true\n", "is not a host"),
        ("gpu-1 slots=0\n", "slots=0 leaves gpu-1 without a rank"),
        ("gpu-1\nann@gpu-1\n", "lists gpu-1 more than once"),
        ("fd77::1\n[fd77:0::1]\n", "lists fd77::1 more than once"),
        ("gpu-1\nGPU-1.\n", "lists gpu-1 more than once"),
        ("gpu-1 address=10.0.0.1\ngpu-2 address=10.0.0.1\n", "lists 10.0.0.1 more than once"),
        ("gpu-1 address=\n", "line 1: address= is no IP address; give that under which the other hosts reach gpu-1"),
        ("gpu-1 address=gpu-1-ib\n", "address=gpu-1-ib is no IP address"),
        ("gpu-1 slots=1 slots=2\n", "is not a host; expected [user@]host, then slots=N and address=A if wanted"),
        ("gpu-1 gpus=1\n", "is not a host"),
        ("[gpu-1]\n", "is not a host"),
        ("-l@gpu-1\n", "is not a host"),
        ("fe80::1%eth0\n", "line 1: fe80::1%eth0 holds on one network card only; give fe80::1%eth0 an address=A that all hosts reach"),
        ("gpu-1 address=fe80::1\n", "fe80::1 holds on one network card only"),
        ("gpu-1 slots=2\ngpu-2\n", "for some hosts only"),
    ],
)
def test_bad_hosts_files(hosts_file, text, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_hosts(hosts_file(text))


def test_hosts_file_that_is_missing_or_not_text(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read \(No such file or directory\); give a text file"):
        read_hosts(str(tmp_path / "none.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        read_hosts(str(tmp_path / "binary"))
