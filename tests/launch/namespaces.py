"""Programs that netns.py runs: `boot` is the first process of a host in namespaces of its own, `enter` runs a command in one.

Both die with whoever started them, and what they started dies with them. Only the standard library: `python -S -I` starts in 20 ms."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_MOUNTS, NEW_NAME, NEW_IPC, NEW_PROCESSES, NEW_NETWORK = 0x20000, 0x4000000, 0x8000000, 0x20000000, 0x40000000
DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def call(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def die_with_parent() -> None:
    """SIGKILL for this process when the thread that started it ends."""
    call(LIBC.prctl(DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0))


def boot(setup: list[str]) -> NoReturn:
    """New namespaces for all of this; `setup` runs in them, then whatever has lost its parent is reaped, for ever. Says `up PID` with the
    first process' number outside."""
    die_with_parent()
    call(LIBC.unshare(NEW_MOUNTS | NEW_NAME | NEW_IPC | NEW_PROCESSES | NEW_NETWORK))
    first = os.fork()
    if first:
        print(f"up {first}", flush=True)
        os.waitpid(first, 0)  # returns when the last process of the host has gone
        os._exit(0)
    die_with_parent()
    sys.stdin.readline()  # the network card is plugged in
    done = subprocess.run(setup)
    print(f"ready {done.returncode}", flush=True)
    while True:
        try:
            os.wait()
        except ChildProcessError:
            signal.pause()


def enter(process: int, folder: str, command: list[str]) -> NoReturn:
    """Runs `command` in the namespaces of `process`, in `folder`; passes signals on to it, and ends as it ends."""
    die_with_parent()
    spaces = {name: os.open(f"/proc/{process}/ns/{name}", os.O_RDONLY) for name in ("pid", "net", "uts", "ipc", "mnt")}
    call(LIBC.setns(spaces.pop("pid"), 0))  # of the processes to come
    child = os.fork()
    if child == 0:
        die_with_parent()
        for space in spaces.values():
            call(LIBC.setns(space, 0))
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell starts what runs in its background with Ctrl-C ignored
        try:
            os.execvp(command[0], command)
        except OSError as error:
            print(f"{command[0]}: {error.strerror}", file=sys.stderr)
            os._exit(127)
    for number in PASSED_ON:
        signal.signal(number, lambda number, frame: os.kill(child, number))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if -code in PASSED_ON:
        signal.signal(-code, signal.SIG_DFL)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "boot":
        boot(arguments)
    else:
        enter(int(arguments[0]), arguments[1], arguments[2:])

PROGRAM = [sys.executable, "-S", "-I", str(Path(__file__).resolve())]
