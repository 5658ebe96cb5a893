"""Starts Python programs by forking a process that has loaded the large libraries: milliseconds instead of seconds.

Run by `processes.py` as a program: fork_server.py FD, the descriptor of a listening socket. It ends when its standard
input is closed, and kills what it has started. Every connection is one program: a line of JSON with `arguments` (those
of `python`: -m MODULE, -c CODE, a script or a folder, and what follows), `environment`, `cwd` and `preload` (modules to
load before the fork), and the three standard streams as file descriptors; with others, `descriptors` has their numbers
in the program. The answers are {"pid": N} and {"status": S}, as in `subprocess`. A connection that is closed before
kills its program.

far_scale is loaded, too, from this checkout. A program that finds another one by its PYTHONPATH loads that instead.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import importlib.machinery
import io
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from typing import Any

PRELOAD = (
    "torch._dynamo", "torch._inductor.compile_fx", "torch._subclasses.schema_check_mode",
    "torch.nn.attention.flex_attention", "torch.distributed.checkpoint", "torch.utils.serialization.config",
    "deepspeed", "deepspeed.module_inject.auto_ep_config", "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer", "torchmetrics.functional.image", "matplotlib.pyplot",
    "safetensors.torch", "far_scale.train.loop", "far_scale.train.lease", "far_scale.train.plan",
    "far_scale.train.profiler", "far_scale.evaluation.validation_videos", "far_scale.autoencoder.training.loop",
    "far_scale.utils.command_line",
)  # fmt: skip
CHECKOUT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SIGNALS = (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE)


class Server:
    def __init__(self, listener: socket.socket) -> None:
        self.selector = selectors.DefaultSelector()
        self.listener = listener
        self.programs: dict[int, socket.socket] = {}  # by process id
        self.paths = [path for path in sys.path if path != os.path.dirname(os.path.abspath(__file__))]
        self.wakeup, ended = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(ended)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> dict[str, Any] | None:
        """None at the end; in a forked process its request."""
        for source in (self.listener, self.wakeup, 0):
            self.selector.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == 0:
                    for pid in self.programs:
                        kill_group(pid)
                    return None
                if key.fileobj == self.wakeup:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self.wakeup, 4096)
                    self._reap()
                elif key.fileobj is self.listener:
                    connection, _ = self.listener.accept()
                    if (request := self._start(connection)) is not None:
                        return request
                else:
                    self._kill(key.fileobj)

    def _start(self, connection: socket.socket) -> dict[str, Any] | None:
        data, descriptors = b"", []
        with contextlib.suppress(ConnectionError):
            data, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 64)
            while not data.endswith(b"\n") and (part := connection.recv(1 << 20)):
                data += part
        if not data.endswith(b"\n"):  # its client was killed
            for descriptor in descriptors:
                os.close(descriptor)
            connection.close()
            return None
        request = json.loads(data)
        for name in request["preload"]:
            importlib.import_module(name)
        pid = os.fork()
        if pid == 0:
            self.selector.close()
            for other in (self.listener, connection, *self.programs.values()):
                other.close()
            os.close(signal.set_wakeup_fd(-1))
            os.close(self.wakeup)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            targets = request.get("descriptors", (0, 1, 2))
            # First out of the way, since one's number may be the target of another.
            moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 1 + max(targets)) for descriptor in descriptors]
            for descriptor in descriptors:
                os.close(descriptor)
            for target, descriptor in zip(targets, moved, strict=True):
                os.dup2(descriptor, target)
                os.close(descriptor)
            return {**request, "paths": self.paths}
        for descriptor in descriptors:
            os.close(descriptor)
        self.programs[pid] = connection
        self.selector.register(connection, selectors.EVENT_READ)
        with contextlib.suppress(OSError):  # a client that is gone is noticed by `serve`
            connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")
        return None

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if (connection := self.programs.pop(pid, None)) is not None:
                self.selector.unregister(connection)
                with contextlib.suppress(OSError):
                    connection.sendall(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
                connection.close()

    def _kill(self, connection: Any) -> None:
        """Its client is gone."""
        pid = next((pid for pid, other in self.programs.items() if other is connection), None)
        if pid is None:  # it ended at the same moment, and `_reap` came first
            return
        kill_group(pid)
        self.selector.unregister(connection)
        del self.programs[pid]
        connection.close()


def kill_group(pid: int) -> None:
    """SIGKILL for a program and what it has started in its process group."""
    for kill in (os.killpg, os.kill):  # before its setsid it leads no group
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def run(request: dict[str, Any]) -> None:
    """What `python ARGUMENTS` does, in this process."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in SIGNALS:  # also where the tests were started by nohup
        signal.signal(number, signal.SIG_IGN if number == signal.SIGPIPE else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        buffer = open(number, "rb" if number == 0 else "wb", closefd=False)  # noqa: SIM115
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = io.TextIOWrapper(buffer, encoding="utf-8", errors=errors, line_buffering=name == "stderr")
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if "numpy" in sys.modules:  # as in a new process, no two have the same global state; Python reseeds `random` itself
        sys.modules["numpy"].random.seed()
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None:
        sys.modules["torch"].set_num_threads(int(threads))
    own = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    first, *rest = request["arguments"]
    while first[0] == "-" and first not in ("-m", "-c"):  # options of the interpreter, from execnet
        first, *rest = rest[1:] if first == "-X" else rest
    if first == "-m":
        sys.path[:] = [os.getcwd(), *own, *request["paths"]]
        sys.argv[:] = rest
        unload_other_far_scale()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.path[:] = ["", *own, *request["paths"]]
        sys.argv[:] = ["-c", *rest[1:]]
        unload_other_far_scale()
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        folder = first if os.path.isdir(first) else os.path.dirname(os.path.abspath(first))
        sys.path[:] = [folder, *own, *request["paths"]]
        sys.argv[:] = [first, *rest]
        unload_other_far_scale()
        runpy.run_path(first, run_name="__main__")


def unload_other_far_scale() -> None:
    """Forget far_scale where `sys.path` leads to another copy of it, or to none."""
    found = importlib.machinery.PathFinder.find_spec("far_scale", sys.path)
    if found is None or found.origin is None or not found.origin.startswith(CHECKOUT + os.sep):
        for name in [name for name in sys.modules if name.partition(".")[0] == "far_scale"]:
            del sys.modules[name]


def end(status: Any) -> None:
    """What Python does at its end, but for taking apart all modules: that copies the memory that was shared so far."""
    if not isinstance(status, int):
        if status is not None:
            print(status, file=sys.stderr)
        status = 0 if status is None else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError, ValueError):  # multiprocessing's resource tracker has closed it
        sys.stdout.flush()
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.flush()
    os._exit(status & 0xFF)


def main() -> None:
    sys.path.insert(0, CHECKOUT)
    for name in PRELOAD:
        importlib.import_module(name)
    sys.path.remove(CHECKOUT)
    _ = sys.modules["deepspeed.ops"].__compatible_ops__  # found out at the first access, by a compiler
    gc.freeze()  # the children do not touch, and so do not copy, what is loaded
    listener = socket.socket(fileno=int(sys.argv[1]))
    server = Server(listener)
    if (request := server.serve()) is not None:
        del server
        status: Any = 0
        try:
            run(request)
        except SystemExit as exit:
            status = exit.code
        end(status)


if __name__ == "__main__":
    main()
