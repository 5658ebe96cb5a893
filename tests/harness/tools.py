"""Runs the tools in this process."""

from __future__ import annotations

import runpy
import sys

import pytest

from harness.launch import ROOT


def tool(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
