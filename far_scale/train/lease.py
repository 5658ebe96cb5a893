"""The lease of a run directory: one job at a time trains in it.

`run_dir/lease.json` names its holder, which renews it every 30 seconds. It needs no file system lock: on many shared
file systems `flock` does not work between nodes, and a killed job removes nothing. A file becomes the lease by link(2),
which succeeds for one process only, also on NFS. All ages are differences of the file server's times, so the clocks of
the nodes do not matter.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from far_scale.distributed.exit_codes import REFUSED
from far_scale.distributed.process_group import Processes, broadcast_from_main
from far_scale.train.run_dir import directory_id, is_copy
from far_scale.utils.errors import UserError, print_error, print_warning
from far_scale.utils.event_log import EventLog
from far_scale.utils.hosts import host_name
from far_scale.utils.io import parse_json

NAME = "lease.json"
RENEW_SECONDS = 30.0
"""Between two renewals."""
VALID_SECONDS = 300.0
"""Time after its last renewal for which a lease is valid, if its holder may still be alive."""
_TAKEOVER_SECONDS = 60.0  # after which a takeover that was killed no longer blocks others


class Lease:
    """Holds a run directory for the processes of one job; a context manager that every process enters.

    The main process acquires the lease and renews it. If another job took it over meanwhile, as after a long
    suspension, the process ends with status 2.

    A lease is taken over if its holder is the same job before a restart, or a dead process of this machine, or did not
    renew it for `VALID_SECONDS`.

    Args:
        run: the run directory.
        processes: the job's.

    Raises:
        UserError: on all processes, when entered: another job holds the directory.
    """

    def __init__(self, run: Path, processes: Processes) -> None:
        self._run, self._processes = run, processes
        self._holder = _this_job(str(uuid.uuid4()))
        self._new_folders: list[Path] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        broadcast_from_main(self._acquire, self._processes)
        if self._processes.is_main_process:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._processes.is_main_process:
            self._stop.set()
            self._thread.join()
            if _read(self._run / NAME).get("token") == self._holder["token"]:
                (self._run / NAME).unlink(missing_ok=True)
            # A run that was refused before it wrote anything leaves no empty folders.
            with contextlib.suppress(OSError):
                for folder in self._new_folders:
                    folder.rmdir()

    def _acquire(self) -> None:
        self._new_folders = [folder for folder in (self._run, *self._run.parents) if not folder.exists()]
        self._run.mkdir(parents=True, exist_ok=True)
        self._holder["directory"] = directory_id(self._run)
        lease = self._run / NAME
        first_renewal: float | None = None
        while True:
            with self._candidate() as (candidate, now):
                if _link(candidate, lease):
                    return
                holder, renewed = _read_with_time(lease)
                if renewed is None:
                    continue  # released a moment ago
                if renewed > now + VALID_SECONDS:  # copied, or the clock was set back: its age counts from now
                    os.utime(lease)
                    renewed = now
                reason = self._takeover_reason(holder, now - renewed)
                if reason is not None:
                    if self._take_over(candidate, holder, now):
                        text = f"took over {lease} from {_describe(holder)}: {reason}"
                        EventLog(self._run, is_main_process=True).emit("lease", 0, text, holder=holder)
                        return
                    continue
            first_renewal = renewed if first_renewal is None else first_renewal
            # Another node of the same torchrun job has a restart count of its own: is the old holder still alive?
            if not _same_torchrun(self._holder, holder) or renewed > first_renewal:
                raise _refusal(lease, holder, now - renewed)
            time.sleep(1.0)

    def _takeover_reason(self, holder: dict[str, Any], age: float) -> str | None:
        """Why the lease of `holder`, renewed `age` seconds ago, may be taken over; None if it may not."""
        if is_copy(self._run, holder.get("directory")):
            return "it was copied with the directory"
        if age > VALID_SECONDS:
            return f"it was not renewed for {age:.0f} s"
        this_job = self._holder
        same_machine = holder.get("machine") == this_job["machine"]
        if same_machine and not _is_alive(holder.get("pid"), holder.get("pid_start")):
            return "that process is dead"
        later_start = "this is a later start of the same job"
        restarts = holder.get("restarts") or []
        if this_job["job"] is None or holder.get("job") != this_job["job"] or not _are_counts(restarts):
            return None
        if this_job["restarts"][0] != restarts[0]:
            return later_start if this_job["restarts"][0] > restarts[0] else None
        # torchrun's count holds for its own workers only. Those of this machine are dead before new ones start, so a
        # living holder on this machine belongs to another torchrun of the same job.
        if _same_torchrun(this_job, holder) and not same_machine and this_job["restarts"][1] > restarts[1]:
            return later_start
        return None

    def _take_over(self, candidate: Path, holder: dict[str, Any], now: float) -> bool:
        """Replace the lease of `holder`, unless another job did or does; returns whether it did."""
        lease, gate = self._run / NAME, self._run / f"{NAME}.takeover"
        if not _link(candidate, gate):
            _, since = _read_with_time(gate)
            if since is not None and now - since > _TAKEOVER_SECONDS:
                gate.unlink(missing_ok=True)
            time.sleep(0.2)
            return False
        try:
            if _read(lease).get("token") != holder.get("token"):
                return False
            os.replace(candidate, lease)
            return True
        finally:
            gate.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _candidate(self) -> Any:
        """A file that can become the lease, and the file server's time."""
        path = self._run / f".lease.{uuid.uuid4().hex[:12]}.part"
        try:
            path.write_text(json.dumps(self._holder, indent=2) + "\n")
            yield path, path.stat().st_mtime
        finally:
            path.unlink(missing_ok=True)

    def _renew_until_stopped(self) -> None:
        """Renew the lease until the end, and at once after this process was suspended."""
        renewed = last_wake = time.monotonic()
        warned = False
        while not self._stop.wait(1.0):
            now = time.monotonic()
            was_suspended, last_wake = now - last_wake > RENEW_SECONDS, now
            if now - renewed < RENEW_SECONDS and not was_suspended:
                continue
            renewed = now
            try:
                self._renew()
            except OSError as error:  # the file server may come back
                if not warned:
                    print_warning(f"{self._run / NAME}: cannot be renewed ({error.strerror}); trying again")
                warned = True

    def _renew(self) -> None:
        lease = self._run / NAME
        holder, renewed = _read_with_time(lease)
        if renewed is None:  # removed by a user
            with self._candidate() as (candidate, _):
                if _link(candidate, lease):
                    return
            holder = _read(lease)
        elif "token" not in holder:  # overwritten, but not by another job, which would replace the whole file
            with self._candidate() as (candidate, _):
                os.replace(candidate, lease)
                return
        if holder.get("token") != self._holder["token"]:
            self._lost(holder)
        os.utime(lease)  # to now, by the file server's clock

    def _lost(self, holder: dict[str, Any]) -> NoReturn:
        print_error(UserError(f"{self._run / NAME}: taken over by {_describe(holder)}, so this job ends"))
        os._exit(REFUSED)  # at once, since each further step would write into the other job's run


def active_holder(run: Path) -> str | None:
    """The job that trains in a run directory, as text; None if there is none, or if it is dead or lost its lease."""
    holder, renewed = _read_with_time(run / NAME)
    if renewed is None or is_copy(run, holder.get("directory")):
        return None
    with tempfile.NamedTemporaryFile(dir=run, prefix=".lease.", suffix=".part") as file:
        age = os.fstat(file.fileno()).st_mtime - renewed  # both by the file server's clock
    is_dead = holder.get("machine") == _machine() and not _is_alive(holder.get("pid"), holder.get("pid_start"))
    if age > VALID_SECONDS or is_dead:
        return None
    return f"{_describe(holder)}, lease renewed {max(0.0, age):.0f} s ago"


def _this_job(token: str) -> dict[str, Any]:
    variable = os.environ.get
    torchrun = variable("TORCHELASTIC_RUN_ID")
    torchrun = None if torchrun == "none" else torchrun  # torchrun's default, which all jobs share
    job = None if torchrun is None else f"torchrun {torchrun}"
    if "SLURM_JOB_ID" in os.environ:
        job = f"SLURM job {os.environ['SLURM_JOB_ID']}"
        if "SLURM_CLUSTER_NAME" in os.environ:
            job += f" on {os.environ['SLURM_CLUSTER_NAME']}"
    return {
        "token": token,
        "host": host_name(),
        "pid": os.getpid(),
        "pid_start": _process_start(os.getpid()),
        "machine": _machine(),
        "job": job,
        "torchrun": torchrun,
        "restarts": [int(variable(name, "0")) for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")],
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _machine() -> str:
    """An id of the process namespace: this boot of this machine, or this container.

    A random text if the system has none: then only time ends a lease.
    """
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex


def _same_torchrun(this_job: dict[str, Any], holder: dict[str, Any]) -> bool:
    return this_job["torchrun"] is not None and bool(holder.get("torchrun") == this_job["torchrun"])


def _are_counts(restarts: Any) -> bool:
    return isinstance(restarts, list) and len(restarts) == 2 and all(type(count) is int for count in restarts)


def _process_start(pid: Any) -> str | None:
    """Start time of process `pid` of this machine, in clock ticks since boot; None if it is dead."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _is_alive(pid: Any, start: Any) -> bool:
    """Whether the process `pid` of this machine that started at `start` is alive."""
    actual_start = _process_start(pid)
    if actual_start is None:
        try:
            os.kill(int(pid), 0)
        except PermissionError:
            return True  # another user's process: a mount option may hide its /proc entry
        except (OSError, ValueError, TypeError, OverflowError):
            return False
    return bool(actual_start == start)


def _link(candidate: Path, name: Path) -> bool:
    """Link `candidate` to `name`; False if that exists."""
    try:
        os.link(candidate, name)
    except FileExistsError:
        return candidate.stat().st_nlink == 2  # NFS may repeat a request after its answer was lost
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        # A file system without links.
        try:
            with open(name, "x") as file:
                file.write(candidate.read_text())
        except FileExistsError:
            return False
    return True


def _read_with_time(path: Path) -> tuple[dict[str, Any], float | None]:
    """The content of a lease (empty if unreadable), and when it was renewed (None if there is none)."""
    try:
        with open(path, "rb") as file:  # open() makes NFS ask the server
            renewed = os.fstat(file.fileno()).st_mtime
            content = parse_json(file.read())
    except FileNotFoundError:
        return {}, None
    except ValueError:
        return {}, renewed
    return (content if isinstance(content, dict) else {}), renewed


def _read(path: Path) -> dict[str, Any]:
    return _read_with_time(path)[0]


def _describe(holder: dict[str, Any]) -> str:
    job = f", {holder['job']}" if holder.get("job") else ""
    return f"host {holder.get('host', 'unknown')}, pid {holder.get('pid', 'unknown')}{job}"


def _refusal(lease: Path, holder: dict[str, Any], age: float) -> UserError:
    return UserError(
        f"{lease}: another job trains in this run directory: {_describe(holder)}, started {holder.get('started')}, "
        f"lease renewed {max(0.0, age):.0f} s ago; wait for its end, or take another run_dir. If it is dead, start "
        f"again {VALID_SECONDS:.0f} s after the last renewal"
    )
