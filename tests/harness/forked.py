"""Stands for a Python of its own: forked.py ARGUMENTS runs `python ARGUMENTS` in a process of the fork server.

For launchers that start processes by themselves, such as torchrun. The socket is in $FORK_SERVER.
The other process gets the open files of this one. Signals are passed on; when this process is killed, so is the other.
It ends as the other ends, by the same signal or status.
"""

import contextlib
import json
import os
import signal
import socket
import sys


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:  # of the listing itself
        return False
    return True


def main() -> None:
    descriptors = [number for number in sorted(map(int, os.listdir("/proc/self/fd"))) if is_open(number)]
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ["FORK_SERVER"])
    request = {
        "arguments": sys.argv[1:], "environment": dict(os.environ), "cwd": os.getcwd(), "preload": [],
        "descriptors": descriptors,
    }  # fmt: skip
    data = json.dumps(request).encode() + b"\n"
    connection.sendall(data[socket.send_fds(connection, [data], descriptors) :])
    answers = connection.makefile()
    pid = json.loads(answers.readline())["pid"]

    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT):
        signal.signal(number, pass_on)
    status = json.loads(answers.readline())["status"]
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


main()
