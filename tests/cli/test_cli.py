"""The `far-scale` command: its list of subcommands, how it finds them, and its errors."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from far_scale.cli.main import COMMANDS, main
from harness.launch import ROOT, environment


def far_scale(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    start = f"import sys; sys.argv = {['far-scale', *arguments]}; from far_scale.cli.main import main; main()"
    command = [sys.executable, "-c", f"{before}\n{start}"]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


def test_every_tool_has_a_subcommand() -> None:
    names = {path.stem.replace("_", "-") for path in (ROOT / "tools").glob("*.py")}
    assert names == {name for name, command in COMMANDS.items() if not command.is_script}


def test_every_subcommand_is_found() -> None:
    for command in COMMANDS.values():
        assert importlib.util.find_spec(command.module) is not None, command


def test_tools_are_thin_wrappers() -> None:
    for module in Path(ROOT, "far_scale", "cli").glob("*.py"):
        if module.stem not in ("__init__", "main"):
            code = (ROOT / "tools" / module.name).read_text().partition('"""\n\n')[2]
            expected = f'from far_scale.cli.{module.stem} import main\n\nif __name__ == "__main__":\n    main()\n'
            assert code == expected, module.name


def test_help_and_version_load_no_torch() -> None:
    refuse = "import sys; sys.modules['torch'] = None; sys.modules['pydantic'] = None"
    done = far_scale("--help", before=refuse)
    assert done.returncode == 0 and done.stdout.startswith("usage: far-scale COMMAND"), done.stderr
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert far_scale("--version", before=refuse).stdout == "far_scale 0.1.0\n"


@pytest.mark.parametrize("name", ["recipe", "export-checkpoint", "inspect-shards"])  # a module, a command, a tool
@pytest.mark.slow
def test_a_subcommand_gets_its_arguments(name: str) -> None:
    done = far_scale(name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: far-scale {name} [-h]")


@pytest.mark.slow
def test_exit_statuses_are_those_of_the_subcommand(tmp_path: Path) -> None:
    done = far_scale("train", "demo_cpu", f"data.shards={tmp_path}", "--dry-run")
    assert done.returncode == 2 and done.stderr.startswith(f"error: {tmp_path}"), done.stderr


def test_wrong_commands_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        (["trian"], "trian: no such command; nearest is train; far-scale --help lists all"),
        (["nope"], "nope: no such command; far-scale --help lists all"),
        ([], "a command is missing"),
    ):
        monkeypatch.setattr(sys, "argv", ["far-scale", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        error = capsys.readouterr().err.splitlines()[0]
        assert ended.value.code == 2 and error == f"error: {said}"
