"""Which code this is: the commit of its checkout and what differs from it. Loads no torch, for the launchers."""

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
_NAME = "code_version.json"
_PATIENCE = 30.0  # seconds for a command of git, on a slow file system


@dataclass(frozen=True)
class CodeVersion:
    """Of a checkout.

    Attributes:
        commit: None where the code is not in a checkout, or there is no git.
        diff: of the tracked files against the commit; empty where nothing is known.
        diff_cut: whether `diff` is only the first `MAX_DIFF_BYTES` of it.
    """

    commit: str | None = None
    diff: str = ""
    diff_cut: bool = False

    @property
    def diff_lines(self) -> int:
        """Lines that `diff` adds or removes."""
        lines = self.diff.splitlines()
        return sum(line.startswith(("+", "-")) and not line.startswith(("+++ ", "--- ")) for line in lines)


def running_code() -> CodeVersion:
    """Of the package that is loaded: of its checkout, or as its snapshot has recorded it."""
    root = Path(far_scale.__file__).resolve().parent.parent
    return _recorded(root) if (root / _NAME).is_file() else of_checkout(root)


def record(version: CodeVersion, folder: Path) -> None:
    """Leave it in a folder that the package is copied into."""
    write_json(folder / _NAME, asdict(version))


def of_checkout(root: Path) -> CodeVersion:
    """Of the checkout at `root`; nothing is known of a folder that is none, such as one that pip installed into."""
    # Asked for the package itself: the folder may well lie in somebody else's repository.
    if _git(root, "ls-files", "--error-unmatch", "far_scale/__init__.py") is None:
        return CodeVersion()
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return CodeVersion()
    diff = _git(root, "diff", "--no-ext-diff", "--no-color", "HEAD", "--", ".") or b""
    cut = len(diff) > MAX_DIFF_BYTES
    return CodeVersion(commit.decode().strip(), diff[:MAX_DIFF_BYTES].decode(errors="replace"), cut)


def _git(root: Path, *arguments: str) -> bytes | None:
    """What git prints, up to one byte more than `MAX_DIFF_BYTES`; None where it fails."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.DEVNULL, env=environment, timeout=_PATIENCE,
                check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
        output.seek(0)
        return output.read(MAX_DIFF_BYTES + 1) if done.returncode == 0 else None


def _recorded(root: Path) -> CodeVersion:
    try:
        found: Any = read_json(root / _NAME, "code version")
        return CodeVersion(**found)
    except (UserError, TypeError):
        return CodeVersion()
