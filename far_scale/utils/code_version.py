"""The version of the running code: the commit and the differences from it. Needs no torch, for the launchers."""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import far_scale
from far_scale.utils.errors import UserError
from far_scale.utils.io import read_json, write_json

MAX_DIFF_BYTES = 1_000_000
_FILE_NAME = "code_version.json"
_GIT_TIMEOUT = 30.0  # seconds, for slow file systems


@dataclass(frozen=True)
class CodeVersion:
    """The commit of a checkout, and its changes.

    Attributes:
        commit: None without a checkout or git.
        diff: of the tracked files against the commit; empty without one.
        diff_cut: whether `diff` was cut to `MAX_DIFF_BYTES`.
    """

    commit: str | None = None
    diff: str = ""
    diff_cut: bool = False

    @property
    def diff_lines(self) -> int:
        """Number of lines that `diff` adds or removes."""
        lines = self.diff.splitlines()
        return sum(line.startswith(("+", "-")) and not line.startswith(("+++ ", "--- ")) for line in lines)


def running_code() -> CodeVersion:
    """The version of the imported package: of its checkout, or as recorded in its snapshot."""
    root = Path(far_scale.__file__).resolve().parent.parent
    return _recorded(root) if (root / _FILE_NAME).is_file() else read_checkout(root)


def record(version: CodeVersion, folder: Path) -> None:
    """Record the version in a folder with a copy of the package."""
    write_json(folder / _FILE_NAME, asdict(version))


def read_checkout(root: Path) -> CodeVersion:
    """The version of the checkout at `root`; empty if it is none, such as where pip installed the package."""
    # Check the package itself: the folder may be inside another repository.
    if _git(root, "ls-files", "--error-unmatch", "far_scale/__init__.py") is None:
        return CodeVersion()
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return CodeVersion()
    diff = _git(root, "diff", "--no-ext-diff", "--no-color", "HEAD", "--", ".") or b""
    cut = len(diff) > MAX_DIFF_BYTES
    return CodeVersion(commit.decode().strip(), diff[:MAX_DIFF_BYTES].decode(errors="replace"), cut)


def _git(root: Path, *arguments: str) -> bytes | None:
    """The output of git, up to `MAX_DIFF_BYTES` and one byte; None if it fails."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.DEVNULL, env=environment,
                timeout=_GIT_TIMEOUT, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        output.seek(0)
        return output.read(MAX_DIFF_BYTES + 1) if done.returncode == 0 else None


def _recorded(root: Path) -> CodeVersion:
    try:
        values: Any = read_json(root / _FILE_NAME, "code version")
        return CodeVersion(**values)
    except (UserError, TypeError):
        return CodeVersion()
