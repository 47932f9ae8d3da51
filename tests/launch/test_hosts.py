import re
import socket

import pytest

from launch.hosts import Host, is_this_machine, read_hosts


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


def test_this_machine_under_another_user_needs_ssh(hosts_file):
    assert not read_hosts(hosts_file("someone-else@localhost\n"))[0].local


def test_names_of_this_machine():
    assert is_this_machine(socket.gethostname()) and is_this_machine("127.0.0.1")
    assert not is_this_machine("192.0.2.77")  # an address reserved for documentation


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
