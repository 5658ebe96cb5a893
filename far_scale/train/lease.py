"""The lease of a run directory: one job at a time trains in it.

`run_dir/lease.json` names its holder, which renews it every 30 seconds. It needs no lock of the file system: `flock`
is not kept between nodes on many shared file systems, and a job that is killed removes nothing. A file becomes the
lease by link(2), of which only one can succeed, also on NFS. All ages are taken between times that the file server
gave, so the clocks of the nodes do not matter.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from far_scale.distributed.exit_codes import REFUSED
from far_scale.distributed.process_group import Processes, broadcast_from_main
from far_scale.train.checkpoint.run_dir import is_copy, place_of
from far_scale.utils.errors import UserError, print_error, print_warning
from far_scale.utils.event_log import EventLog
from far_scale.utils.hosts import host_name
from far_scale.utils.io import parse_json

NAME = "lease.json"
RENEWED_EVERY = 30.0
"""Seconds between two renewals."""
VALID_FOR = 300.0
"""Seconds after its last renewal for which a lease holds, if its holder may still be alive."""
_TAKEOVER_SECONDS = 60.0  # after which a takeover that was killed in its middle no longer keeps others from one


class Lease:
    """Holds a run directory for the processes of one job; a context manager that every process enters.

    The main process takes the lease and renews it. Where it finds that another job took the lease over meanwhile, as
    after a long suspension, it ends the process with status 2.

    A lease is taken over where its holder is the same job before a restart, or a process of this machine that is
    dead, or did not renew it for `VALID_FOR` seconds.

    Args:
        run: the run directory.
        processes: those of the job.

    Raises:
        UserError: on all processes, when entered: another job holds the directory.
    """

    def __init__(self, run: Path, processes: Processes) -> None:
        self._run, self._processes = run, processes
        self._holder = _this_job(str(uuid.uuid4()))
        self._made: list[Path] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        broadcast_from_main(self._acquire, self._processes)
        if self._processes.is_main_process:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._processes.is_main_process:
            self._over.set()
            self._thread.join()
            if _read(self._run / NAME).get("token") == self._holder["token"]:
                (self._run / NAME).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the run was refused before it wrote anything: leave no empty folders
                for folder in self._made:
                    folder.rmdir()

    def _acquire(self) -> None:
        self._made = [folder for folder in (self._run, *self._run.parents) if not folder.exists()]
        self._run.mkdir(parents=True, exist_ok=True)
        self._holder["directory"] = place_of(self._run)
        lease = self._run / NAME
        first_renewal: float | None = None
        while True:
            with self._candidate() as (candidate, now):
                if _link(candidate, lease):
                    return
                holder, renewed = _read_with_time(lease)
                if renewed is None:
                    continue  # released just now
                if renewed > now + VALID_FOR:  # copied, or the clock was set back: its age counts from now
                    os.utime(lease)
                    renewed = now
                why = self._may_take_over(holder, now - renewed)
                if why is not None:
                    if self._take_over(candidate, holder, now):
                        text = f"took over {lease} from {_name(holder)}: {why}"
                        EventLog(self._run, is_main_process=True).emit("lease", 0, text, holder=holder)
                        return
                    continue
            first_renewal = renewed if first_renewal is None else first_renewal
            # The same torchrun job on another node, whose restart count is its own: is the old holder still alive?
            if not _same_torchrun(self._holder, holder) or renewed > first_renewal:
                raise _refusal(lease, holder, now - renewed)
            time.sleep(1.0)

    def _may_take_over(self, holder: dict[str, Any], age: float) -> str | None:
        """Why the lease of `holder`, renewed `age` seconds ago, may be taken; None where it may not."""
        if is_copy(self._run, holder.get("directory")):
            return "it was copied with the directory"
        if age > VALID_FOR:
            return f"it was not renewed for {age:.0f} s"
        own = self._holder
        same_machine = holder.get("machine") == own["machine"]
        if same_machine and not _is_alive(holder.get("pid"), holder.get("pid_start")):
            return "that process is dead"
        later_start = "this is a later start of the same job"
        restarts = holder.get("restarts") or []
        if own["job"] is None or holder.get("job") != own["job"] or not _are_counts(restarts):
            return None
        if own["restarts"][0] != restarts[0]:
            return later_start if own["restarts"][0] > restarts[0] else None
        # torchrun's count says something of its own workers alone. Those of this machine are dead before others
        # start, so who lives here is of another torchrun of the same job.
        if _same_torchrun(own, holder) and not same_machine and own["restarts"][1] > restarts[1]:
            return later_start
        return None

    def _take_over(self, candidate: Path, holder: dict[str, Any], now: float) -> bool:
        """Replace the lease of `holder`, unless somebody else did or does."""
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

    def _keep(self) -> None:
        """Renew the lease until the end; between renewals notice when this process was stopped for a while."""
        renewed = before = time.monotonic()
        warned = False
        while not self._over.wait(1.0):
            now = time.monotonic()
            stopped, before = now - before > RENEWED_EVERY, now
            if now - renewed < RENEWED_EVERY and not stopped:
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
        if renewed is None:  # removed, by a person
            with self._candidate() as (candidate, _):
                if _link(candidate, lease):
                    return
            holder = _read(lease)
        elif "token" not in holder:  # overwritten, but by no other job: those replace the file as a whole
            with self._candidate() as (candidate, _):
                os.replace(candidate, lease)
                return
        if holder.get("token") != self._holder["token"]:
            self._lost(holder)
        os.utime(lease)  # to now, by the file server's clock

    def _lost(self, holder: dict[str, Any]) -> NoReturn:
        print_error(UserError(f"{self._run / NAME}: taken over by {_name(holder)}, so this job ends"))
        os._exit(REFUSED)  # at once, for each further step would write into the other job's run


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
    """Where process ids mean the same: this boot of this machine, and in a container this one's process namespace.

    Where the system does not say, a text that no other process has: then only time ends a lease.
    """
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex


def _same_torchrun(own: dict[str, Any], holder: dict[str, Any]) -> bool:
    return own["torchrun"] is not None and holder.get("torchrun") == own["torchrun"]


def _are_counts(restarts: Any) -> bool:
    return isinstance(restarts, list) and len(restarts) == 2 and all(type(count) is int for count in restarts)


def _process_start(pid: Any) -> str | None:
    """When the process `pid` of this machine started, in clock ticks since boot; None where it is dead."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _is_alive(pid: Any, start: Any) -> bool:
    """Whether the process `pid` of this machine that started at `start` still lives."""
    found = _process_start(pid)
    if found is None:
        try:
            os.kill(int(pid), 0)
        except PermissionError:
            return True  # another user's, whose /proc entry a mount option hides
        except (OSError, ValueError, TypeError, OverflowError):
            return False
    return found == start


def _link(candidate: Path, name: Path) -> bool:
    """Give `candidate` the further name `name`; False where that is taken."""
    try:
        os.link(candidate, name)
    except FileExistsError:
        return candidate.stat().st_nlink == 2  # NFS may repeat a request whose answer was lost
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
    """What a lease says (nothing where it is not readable) and when it was renewed; None where there is none."""
    try:
        with open(path, "rb") as file:  # opened, so that NFS asks the server anew
            renewed = os.fstat(file.fileno()).st_mtime
            content = parse_json(file.read())
    except FileNotFoundError:
        return {}, None
    except ValueError:
        return {}, renewed
    return (content if isinstance(content, dict) else {}), renewed


def _read(path: Path) -> dict[str, Any]:
    return _read_with_time(path)[0]


def _name(holder: dict[str, Any]) -> str:
    job = f", {holder['job']}" if holder.get("job") else ""
    return f"host {holder.get('host', 'unknown')}, pid {holder.get('pid', 'unknown')}{job}"


def _refusal(lease: Path, holder: dict[str, Any], age: float) -> UserError:
    return UserError(
        f"{lease}: another job trains in this run directory: {_name(holder)}, started {holder.get('started')}, lease "
        f"renewed {max(0.0, age):.0f} s ago; wait for its end, or take another run_dir. If it is dead, start again "
        f"{VALID_FOR:.0f} s after the last renewal"
    )
