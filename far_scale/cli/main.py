"""The `far-scale` command: runs the `main` of a subcommand's module. It imports no other module, so help is quick."""

from __future__ import annotations

import difflib
import importlib
import runpy
import sys
from typing import NamedTuple

import far_scale
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError


class Command(NamedTuple):
    """A subcommand; `module` has its `main`, or is run like `python -m module` where `is_script` is set."""

    summary: str
    module: str
    is_script: bool = False


def _tool(name: str, summary: str) -> tuple[str, Command]:
    return name, Command(summary, f"far_scale.cli.{name.replace('-', '_')}")


COMMANDS: dict[str, Command] = dict(
    [
        ("train", Command("train by a recipe, or check it with --dry-run", "far_scale.train", is_script=True)),
        ("recipe", Command("list the keys of a recipe", "far_scale.recipe", is_script=True)),
        ("attention", Command("test and time the attention kernels", "far_scale.model.attention", is_script=True)),
        _tool("record-demo", "record episodes of the demo world"),
        _tool("encode-latents", "encode videos to a latent shard set"),
        _tool("adopt-shards", "index existing WebDataset or MDS latents as a shard set"),
        _tool("convert-shards", "convert a shard set between tar and MDS"),
        _tool("inspect-shards", "show, verify or fix a shard set"),
        _tool("train-autoencoder", "train an autoencoder by a recipe"),
        _tool("plan", "plan memory, time and traffic of a training, or measure this machine"),
        _tool("submit", "submit a training to SLURM"),
        _tool("fork-run", "start a new run from a checkpoint of another"),
        _tool("export-checkpoint", "export a checkpoint as a model directory or official file"),
        _tool("model-card", "write a model directory's card, README.md"),
        _tool("import-checkpoint", "import official weights, of a model or of DC-AE"),
        _tool("sample", "predict how videos continue"),
        _tool("play", "walk through a learned world in the browser"),
        _tool("evaluate", "compute FVD, LPIPS, PSNR and SSIM by a protocol"),
        _tool("report-run", "write the page of a run, report.html, and sample from its model"),
        _tool("metric-weights", "get the networks of FVD and LPIPS"),
    ]
)


def help_text() -> str:
    """Usage and the list of subcommands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: far-scale COMMAND ...   (far-scale COMMAND --help lists its options)",
            "",
            "Training of frame-autoregressive video models (FAR).",
            "",
            *lines,
            "",
            "On several processes: torchrun --no-python --nproc_per_node 2 far-scale train RECIPE",
        ]
    )


@command_line
def main() -> None:
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(f"far_scale {far_scale.__version__}")
    elif name in COMMANDS:
        sys.argv = [f"far-scale {name}", *arguments]  # argparse takes the name of the program from it
        _run(COMMANDS[name])
    elif not name:
        raise UserError(f"a command is missing\n{help_text()}")
    else:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"nearest is {nearest[0]}; " if nearest else ""
        raise UserError(f"{name}: no such command; {hint}far-scale --help lists all")


def _run(command: Command) -> None:
    if command.is_script:
        runpy.run_module(command.module, run_name="__main__")
    else:
        importlib.import_module(command.module).main()


if __name__ == "__main__":
    main()
