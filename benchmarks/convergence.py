"""FAR and Video DiT while they train, and FAR with parts of it taken away: held-out score against steps and FLOPs.

    python benchmarks/convergence.py [--work DIR] [--steps N] [--minutes M] [--plot FILE.png]

See benchmarks/README.md for what is trained, how it is scored, and what the files hold.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from convergence_plot import draw
from convergence_scores import Held, Score, Scoring, repeat_last
from measure import REPOSITORY, Row, environment, print_table, write_result
from options import count

from far_scale.config.recipe import Recipe, load_recipe
from far_scale.evaluation.score_statistics import bootstrap_interval, over_seeds
from far_scale.evaluation.weights import load_lpips
from far_scale.train.checkpoint.export import export_if_needed
from far_scale.train.costs import train_flops
from far_scale.utils.command_line import command_line
from far_scale.utils.errors import UserError
from far_scale.utils.io import parse_json, read_json_lines, write_json

CURVES, FINAL, BASELINE = "Held-out score against steps and FLOPs", "At the last step", "Without a model"
SHORT, LONG_CLIPS = Scoring(given=8, frames=8), Scoring(given=24, frames=8)


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Attributes:
        name: of its runs.
        seeds: at most so many of the seeds.
        recipe: name.
        overrides: of the recipe.
        scorings: by the name that the tables have: how its checkpoints are scored.
    """

    name: str
    seeds: int
    recipe: str
    overrides: tuple[str, ...]
    scorings: dict[str, Scoring]


def long_variant(window: int, patch: int, seeds: int) -> Variant:
    """Clips of 32 frames, those before the window as context."""
    overrides = ("data.frames=32", f"model.window={window}", f"model.context_patch={patch}", "sample.given=24")
    name = f"long clips, window {window}, context patch {patch}"
    return Variant(f"window-{window}-patch-{patch}", seeds, "demo_cpu", overrides, {name: LONG_CLIPS})


GROUPS: tuple[tuple[Variant, ...], ...] = (
    (
        Variant("far", 3, "demo_cpu", (), {"FAR": SHORT}),
        Variant("video-dit", 3, "demo_video_dit", (), {"Video DiT": SHORT}),
    ),
    (
        Variant(
            "no-clean-frames",
            3,
            "demo_diffusion_forcing",
            (),
            {"FAR without clean frames": SHORT, "Diffusion Forcing": Scoring(8, 8, context_noise=0.02)},
        ),
    ),
    tuple(long_variant(window, patch, 2) for window, patch in ((8, 4), (4, 4), (16, 4), (8, 2), (8, 8))),
)
"""What is trained, what matters most first."""


@dataclass(frozen=True)
class Run:
    """One training of a variant."""

    variant: Variant
    seed: int
    folder: Path
    recipe: Recipe
    arguments: tuple[str, ...]

    def step_flops(self) -> int:
        """Of forward and backward of one step, over all lanes."""
        data, config = self.recipe.data, self.recipe.far_config()
        assert isinstance(data.frames, int) and data.clips_per_pack is not None
        layout = config.layout((data.frames,) * data.clips_per_pack, data.latent_shape[1:])
        return data.lanes * train_flops(config, layout)


@command_line
def main() -> None:
    args = arguments()
    begun = time.monotonic()
    torch.set_num_threads(args.threads)
    lpips = load_lpips("alex")  # before hours of training: it may not be there
    held = Held(args.heldout, args.episodes, args.sample_steps, lpips)
    runs = [run for run in planned(args) if args.only is None or run.variant.name in args.only]
    facts = environment(
        torch.device("cpu"),
        {
            "steps of a run": str(args.steps),
            "seeds": " ".join(map(str, args.seeds)),
            "clips of a step": str(runs[0].recipe.data.lanes * (runs[0].recipe.data.clips_per_pack or 0)),
            "scores": f"{args.episodes} held-out episodes, {args.sample_steps} Euler steps, EMA weights",
        },
    )
    rows: list[Row] = []
    baseline = repeat_last(held, (SHORT, LONG_CLIPS))
    for run in runs:
        if time.monotonic() - begun > 60 * args.minutes:
            print(f"{args.minutes:g} minutes are over; left out: {run.folder.name} and what follows", flush=True)
            break
        print(f"{run.folder.name}", flush=True)
        rows += run_rows(run, held, args.scored)
        tables = {FINAL: final_rows(rows), BASELINE: baseline, CURVES: rows}
        path = write_result(args.out, "convergence", facts, tables)
    if not rows:
        raise UserError(f"--minutes {args.minutes:g}: no run was begun; give more")
    print_table(FINAL, tables[FINAL])
    if args.plot is not None:
        draw(args.plot, rows, baseline)
    print(f"\nwritten: {path} and .json", flush=True)


def planned(args: argparse.Namespace) -> Iterator[Run]:
    """All runs, group by group, in a group seed by seed."""
    for group in GROUPS:
        for number, seed in enumerate(args.seeds):
            for variant in (each for each in group if number < each.seeds):
                folder = args.work / f"{variant.name}-seed-{seed}"
                arguments = (
                    variant.recipe, *variant.overrides, f"run_dir={folder}", f"data.shards={args.shards}",
                    f"seed={seed}", f"train.steps={args.steps}", f"checkpoint.every={args.steps // args.scored}",
                    f"checkpoint.keep={args.scored}", "train.zero_stage=1",
                )  # fmt: skip
                yield Run(variant, seed, folder, load_recipe(arguments[0], list(arguments[1:])), arguments)


def run_rows(run: Run, held: Held, scored: int) -> list[Row]:
    """Train what is not trained yet, score what is not scored yet; one row a scoring and checkpoint."""
    path = run.folder / "scores.json"
    asked = {"recipe": run.recipe.hash(), **held.settings()}
    known = parse_json(path.read_text()) if path.is_file() else {}
    if known.get("asked") != asked:
        train(run)
        known = {"asked": asked, "scores": scores(run, held, scored), **logged(run)}
        write_json(path, known)
    rows: list[Row] = []
    for name, scoring in run.variant.scorings.items():
        for step, values in known["scores"][name].items():
            score = Score(**values)
            rows.append(
                {
                    "side": name,
                    "seed": run.seed,
                    "steps": int(step),
                    "train TFLOP": int(step) * run.step_flops() / 1e12,
                    "LPIPS": statistics.fmean(score.lpips),
                    "PSNR": score.psnr(),
                    "SSIM": statistics.fmean(score.ssim),
                    "given": scoring.given,
                    "s/step": known["seconds a step"],
                    "memory GB": known["memory GB"],
                    "cache MB a clip": score.cache_mb,
                    "per clip": {"LPIPS": score.lpips, "MSE": score.mse, "SSIM": score.ssim},
                }
            )
    return rows


def train(run: Run) -> None:
    """Train, or go on with what was killed.

    Raises:
        UserError: the training failed; its last line.
    """
    log = run.folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    threads = str(torch.get_num_threads())
    with log.open("ab") as output:
        status = subprocess.run(
            [sys.executable, "-m", "far_scale.train", *run.arguments],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads},
            stdout=output,
            stderr=subprocess.STDOUT,
        ).returncode
    if status:
        last = (log.read_text(errors="replace").strip() or "no output").splitlines()[-1]
        raise UserError(f"{run.folder}: training ended with status {status}: {last}; see {log}")


def scores(run: Run, held: Held, scored: int) -> dict[str, dict[str, dict[str, object]]]:
    """By scoring and step."""
    every = run.recipe.checkpoint.every
    found: dict[str, dict[str, dict[str, object]]] = {name: {} for name in run.variant.scorings}
    for step in range(every, every * scored + 1, every):
        model_dir = run.folder / "models" / str(step)
        export_if_needed(run.folder, step, "ema", model_dir)
        for name, scoring in run.variant.scorings.items():
            found[name][str(step)] = held.score(model_dir, scoring)._asdict()
    return found


def logged(run: Run) -> dict[str, float]:
    """The median of a step's seconds and the largest resident set, of log.jsonl."""
    lines = [line for line in read_json_lines(run.folder / "log.jsonl") if line is not None]
    return {
        "seconds a step": statistics.median(line["seconds_per_step"] for line in lines),
        "memory GB": max(line["memory_gb"] for line in lines),
    }


def final_rows(rows: Sequence[Row]) -> list[Row]:
    """One row a side: its last step, mean and std over seeds, and 95% intervals over clips.

    The difference is from the first side that had as many frames given: clip by clip, so that hard clips cancel.
    """
    finals: list[Row] = []
    first: dict[int, list[float]] = {}  # LPIPS by clip, by frames given
    for side in dict.fromkeys(row["side"] for row in rows):
        last = max(row["steps"] for row in rows if row["side"] == side)
        own = [row for row in rows if row["side"] == side and row["steps"] == last]
        per_clip = [statistics.fmean(clip) for clip in zip(*(row["per clip"]["LPIPS"] for row in own), strict=True)]
        others = first.setdefault(own[0]["given"], per_clip)
        difference = [ours - other for ours, other in zip(per_clip, others, strict=True)]
        means = {metric: over_seeds([row[metric] for row in own]) for metric in ("LPIPS", "PSNR", "SSIM")}
        finals.append(
            {
                "side": side,
                "seeds": len(own),
                "steps": last,
                "train TFLOP": own[0]["train TFLOP"],
                "LPIPS": means["LPIPS"].mean,
                "std over seeds": "-" if means["LPIPS"].std is None else f"{means['LPIPS'].std:.3f}",
                "95% over clips": _interval(per_clip),
                "less the first's": "-" if others is per_clip else f"{statistics.fmean(difference):+.3f}",
                "its 95% over clips": "-" if others is per_clip else _interval(difference),
                "PSNR": means["PSNR"].mean,
                "SSIM": means["SSIM"].mean,
                "given": own[0]["given"],
                "s/step": statistics.median(row["s/step"] for row in own),
                "memory GB": max(row["memory GB"] for row in own),
                "cache MB a clip": own[0]["cache MB a clip"],
            }
        )
    return finals


def _interval(per_clip: Sequence[float]) -> str:
    low, high = bootstrap_interval(per_clip)
    return f"{low:.3f} to {high:.3f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train FAR, Video DiT and FAR's ablations; score them as they train.")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/convergence"), help="runs go here (default: %(default)s)"
    )
    parser.add_argument(
        "--shards", type=Path, default=Path("runs/quickstart/shards/train"), help="to train on (default: %(default)s)"
    )
    parser.add_argument(
        "--heldout",
        type=Path,
        default=Path("runs/quickstart/episodes/heldout"),
        help="held-out episodes of 32 frames, or their shard set (default: %(default)s)",
    )
    parser.add_argument("--steps", type=count, default=3000, help="of every run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="default: 0 1 2")
    parser.add_argument("--scored", type=count, default=5, help="checkpoints scored of a run (default: %(default)s)")
    parser.add_argument("--episodes", type=count, default=32, help="held-out episodes (default: %(default)s)")
    parser.add_argument("--sample-steps", type=count, default=8, help="Euler steps of a score (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=[variant.name for group in GROUPS for variant in group], help="default: all"
    )
    parser.add_argument("--minutes", type=float, default=180, help="begin no run after these (default: %(default)s)")
    parser.add_argument("--threads", type=count, default=2, help="torch threads (default: %(default)s)")
    parser.add_argument("--plot", type=Path, help="PNG to draw the curves into (default: none)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    args = parser.parse_args()
    if args.steps % args.scored:
        raise UserError(f"--steps {args.steps}: must be a multiple of --scored, {args.scored}")
    return args


if __name__ == "__main__":
    main()
