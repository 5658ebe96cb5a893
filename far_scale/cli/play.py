"""Walk through a learned world in the browser, beside the real engine: tools/play.py [MODEL]."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import signal
import webbrowser
from pathlib import Path
from urllib.parse import quote

from far_scale.config.yaml_loader import CHECKOUT
from far_scale.play.headless import parse_actions, play_actions, replay
from far_scale.play.recording import read_recording
from far_scale.play.world import World, open_world
from far_scale.utils.command_line import at_least, command_line
from far_scale.utils.errors import UserError, print_warning
from far_scale.utils.io import check_writable
from far_scale.utils.rng import MAX_SEED

DEFAULT_SEED = 50_015  # from 50,000 on no recipe trains; this walk begins in a corridor
DEMO_MODEL = CHECKOUT / "models" / "demo-maze"
MAX_THREADS = 4  # of small models, more only wait for each other


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "model_dir",
        type=Path,
        nargs="?",
        help="model directory, as tools/export_checkpoint.py writes it, or org/name of the hub (default: the demo's "
        "base model, models/demo-maze of the source tree)",
    )
    parser.add_argument(
        "--start",
        type=Path,
        metavar="VIDEO|SHARDS",
        help="begin from the first frames of a video or npz file, a folder of them, or a shard set (default: a maze of "
        "the real engine for a model of the demo world, else nothing)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="another needs --token (default: %(default)s)")
    parser.add_argument("--port", type=at_least(0), default=8760, help="0: any free one (default: %(default)s)")
    parser.add_argument("--token", help="a secret that the page's address must have")
    parser.add_argument("--steps", type=at_least(1), default=8, help="Euler steps per frame (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=1.0, help="1: none; above 1: guided (default: 1)")
    parser.add_argument(
        "--seed", type=at_least(0), default=DEFAULT_SEED, help="of the maze and of the noise (default: %(default)s)"
    )
    parser.add_argument("--sessions", type=at_least(1), default=4, help="walks at the same time (default: %(default)s)")
    parser.add_argument(
        "--headless",
        metavar="ACTIONS",
        help="walk by these actions without a browser, such as forward:8,left,3:2; writes --out",
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="make a recording (JSON) again; writes --out")
    parser.add_argument("--out", type=Path, metavar="X.mp4", help="of --headless (with X.json) and --replay")
    parser.add_argument("--no-browser", action="store_true", help="only print the page's address")
    args = parser.parse_args()

    if args.model_dir is None:
        if not DEMO_MODEL.is_dir():
            raise UserError("MODEL: name a model directory; the demo's base model is only in the source tree")
        args.model_dir = DEMO_MODEL
    without_page = args.headless is not None or args.replay is not None
    if args.headless is not None and args.replay is not None:
        raise UserError("--headless and --replay: give only one of them")
    if without_page != (args.out is not None):
        raise UserError("--out: names the video of --headless or --replay; give both, or neither for the page")
    if args.seed > MAX_SEED:
        raise UserError(f"--seed {args.seed}: must be at most 2^64 - 1")
    if without_page:
        if args.out.suffix != ".mp4":
            raise UserError(f"--out {args.out}: is the video to write, so it must end in .mp4")
        check_writable(args.out)
        _write_video(args)
    else:
        _serve(args)


def _write_video(args: argparse.Namespace) -> None:
    recording = None if args.replay is None else read_recording(args.replay)
    world = open_world(args.model_dir, args.start, _threads() if recording is None else recording.threads)
    if recording is None:
        actions = parse_actions(args.headless, world.inputs)
        play_actions(world, args.seed, actions, args.steps, args.guidance, args.out)
        print(f"{args.out}, with {args.out.stem}.json")
        return
    again = replay(world, recording, args.out)
    if again.frames_sha256 == recording.frames_sha256:
        print(f"{args.out}: {len(recording.actions)} frames, bit for bit as they were recorded")
    else:
        print_warning(
            f"{args.out}: the frames are not bit for bit those of {args.replay}; another processor, another version of "
            "torch or another device rounds differently"
        )


def _serve(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("aiohttp") is None:
        raise UserError("the page needs the package aiohttp, which is not installed; pip install 'far_scale[play]'")
    from far_scale.play.access import Access
    from far_scale.play.player import PlaySettings
    from far_scale.play.server import PlayServer, serve

    access = Access(args.host, args.token)
    world = open_world(args.model_dir, args.start, _threads())
    world.sampling(args.seed, args.steps, args.guidance)  # errors come before the page

    def announce(port: int) -> None:
        host = f"[{args.host}]" if ":" in args.host else args.host
        query = "" if args.token is None else f"?token={quote(args.token)}"
        address = f"http://{host}:{port}/{query}"
        print(f"{_describe(world)}\nopen {address} (Ctrl-C ends)", flush=True)
        if not args.no_browser:
            webbrowser.open(address)

    async def run() -> None:
        server = PlayServer(world, PlaySettings(args.seed, args.steps, args.guidance), access, args.sessions)
        serving = asyncio.ensure_future(serve(server, args.host, args.port, announce))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
        try:
            await serving
        except asyncio.CancelledError:
            print("ended", flush=True)

    asyncio.run(run())


def _describe(world: World) -> str:
    starts = {
        "maze": "in mazes of the real engine, which moves beside it",
        "recorded": "from recorded frames",
        "nothing": "from nothing",
    }
    return f"{world.name}: inputs {', '.join(world.inputs[:8])}; walks start {starts[world.start]}"


def _threads() -> int:
    """Torch threads: pinned, since the frames' last bits depend on them.

    One core is left to the browser and the engine: threads wait for one another, so that a frame takes ten times as
    long where another program holds one of their cores.
    """
    return max(1, min(len(os.sched_getaffinity(0)) - 1, MAX_THREADS))
