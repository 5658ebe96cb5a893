"""Stands for a Python of its own: forked.py ARGUMENTS runs `python ARGUMENTS` in a process of the fork server.

For launchers that start processes by themselves, such as torchrun. The socket is in $FORK_SERVER. Signals are passed
on; when this process is killed, so is the other. It ends as the other ends, by the same signal or status.
"""

import contextlib
import json
import os
import signal
import socket
import sys


def main() -> None:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ["FORK_SERVER"])
    request = {"arguments": sys.argv[1:], "environment": dict(os.environ), "cwd": os.getcwd(), "preload": []}
    data = json.dumps(request).encode() + b"\n"
    connection.sendall(data[socket.send_fds(connection, [data], [0, 1, 2]) :])
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
