"""Mutants: small errors put into the library one at a time, each of which the tests must find.

    python benchmarks/mutants.py [--only WORD]

Copies the checkout, applies a mutant to the copy, runs the test file that is responsible for it until its first
failure, and prints which mutants survived. It shows whether the tests are as strong as before after they have been
changed. Takes about ten minutes; exit status 1 where a mutant survives, or where its text is no longer in the file.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    """The text `old` of a file, which is there once, becomes `new`; `test` is what pytest is given."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTANTS = (
    Mutant(
        "a frame does not see itself",
        "far_scale/model/layout.py",
        "frame[:, None] >= frame[None, :]",
        "frame[:, None] > frame[None, :]",
        "tests/model/test_model.py",
    ),
    Mutant(
        "merged log-sum-exp of one part",
        "far_scale/model/attention/causal_pair.py",
        "merged_lse = torch.logaddexp(seen_lse, part_lse)",
        "merged_lse = torch.maximum(seen_lse, part_lse)",
        "tests/model/test_attention.py",
    ),
    Mutant(
        "rotary theta 1000",
        "far_scale/model/layers.py",
        "ROTARY_THETA = 10000.0",
        "ROTARY_THETA = 1000.0",
        "tests/convert/test_official.py",
    ),
    Mutant(
        "output modulation: shift before scale",
        "far_scale/model/layers.py",
        "scale, shift = self.modulation(condition).chunk(2, dim=-1)",
        "shift, scale = self.modulation(condition).chunk(2, dim=-1)",
        "tests/convert/test_official.py",
    ),
    Mutant(
        "clean context timestep -1",
        "far_scale/train/flow_matching.py",
        "CLEAN_CONTEXT = -2.0",
        "CLEAN_CONTEXT = -1.0",
        "tests/train/test_flow_matching.py",
    ),
    Mutant(
        "target without the latent",
        "far_scale/train/flow_matching.py",
        "target=noise - x,",
        "target=noise,",
        "tests/train/test_flow_matching.py",
    ),
    Mutant(
        "loss of clean frames counted",
        "far_scale/train/flow_matching.py",
        "weight, member = noisy.has_loss.float(),",
        "weight, member = torch.ones_like(noisy.has_loss, dtype=torch.float32),",
        "tests/train/test_flow_matching.py",
    ),
    Mutant(
        "samples not shuffled",
        "far_scale/data/loader/lanes.py",
        "return draw.permutation(length)",
        "return np.arange(length)",
        "tests/data/test_lanes.py",
    ),
    Mutant(
        "best filling may exceed its room",
        "far_scale/data/loader/packing.py",
        "sums[sums > room] = -1",
        "sums[sums > room + 1] = -1",
        "tests/data/test_packing.py",
    ),
    Mutant(
        "checksum of a checkpoint not compared",
        "far_scale/train/checkpoint/folders.py",
        'if sha256(path) != expected.get("sha256"):',
        "if False:",
        "tests/train/test_checkpoint.py",
    ),
    Mutant(
        "a missing file of a checkpoint is passed over",
        "far_scale/train/checkpoint/folders.py",
        'if not path.is_file():\n            return f"{path}: this file is missing"',
        "if not path.is_file():\n            continue",
        "tests/train/test_checkpoint.py",
    ),
    Mutant(
        "`latest` ignored",
        "far_scale/train/run_dir.py",
        "up_to_named = [step for step in existing if step <= named]",
        "up_to_named = existing",
        "tests/train/test_run_dir.py",
    ),
    Mutant(
        "recipe hash includes its name",
        "far_scale/config/recipe.py",
        '                "name": True,\n',
        "",
        "tests/config/test_recipe.py",
    ),
    Mutant(
        "ranks need not divide the lanes",
        "far_scale/config/recipe.py",
        "    if not ranks % size and not lanes % (ranks // size):",
        "    if True:",
        "tests/config/test_recipe.py",
    ),
    Mutant(
        "half of the memory counted as free",
        "far_scale/train/sharding.py",
        "\nUSABLE_FRACTION = 0.9",
        "\nUSABLE_FRACTION = 0.45",
        "tests/train/test_sharding_choice.py",
    ),
    Mutant(
        "hpZ on one node",
        "far_scale/train/sharding.py",
        '    if len(nodes) == 1:\n        return 1, ", no hpZ: one node"\n',
        "",
        "tests/train/test_sharding_choice.py",
    ),
    Mutant(
        "slow ranks named late",
        "far_scale/health/straggler.py",
        "MEDIANS = 1.5",
        "MEDIANS = 15",
        "tests/health/test_straggler.py",
    ),
    Mutant(
        "Frechet distance without the cross term",
        "far_scale/evaluation/score_statistics.py",
        "- 2 * trace",
        "- trace",
        "tests/evaluation/test_score_statistics.py",
    ),
    Mutant(
        "covariance divided by N",
        "far_scale/evaluation/score_statistics.py",
        "return self._scatter / (self.count - 1)",
        "return self._scatter / self.count",
        "tests/evaluation/test_score_statistics.py",
    ),
    Mutant(
        "PSNR of twice the error",
        "far_scale/evaluation/rollouts/psnr_ssim.py",
        "psnr=psnr(sum(self._mse) / clips)",
        "psnr=psnr(sum(self._mse) / clips * 2)",
        "tests/evaluation/test_metrics_pictures.py",
    ),
    Mutant(
        "Euler grid without its end",
        "far_scale/sampling/noise.py",
        "evenly = np.linspace(1.0, 1.0 / TRAIN_TIMESTEPS, steps)",
        "evenly = np.linspace(1.0, 1.0 / steps, steps)",
        "tests/sampling/test_sampler.py",
    ),
    Mutant(
        "noise does not depend on the clip",
        "far_scale/sampling/noise.py",
        "draw = generator(seed, purpose, step=frame, lane=clip_id)",
        "draw = generator(seed, purpose, step=frame, lane=0)",
        "tests/sampling/test_sampler.py",
    ),
    Mutant(
        "cache: the window does not move",
        "far_scale/sampling/denoisers.py",
        "self._first, self._window_frames, self._prepared = first, 0, None",
        "self._first, self._prepared = first, None",
        "tests/sampling/test_cache.py",
    ),
    Mutant(
        "cache: finished frames at timestep 500",
        "far_scale/sampling/denoisers.py",
        "condition = model.condition(seen.new_full((group.frames,), self._schedule.seen_timestep), classes)",
        "condition = model.condition(seen.new_full((group.frames,), 500.0), classes)",
        "tests/sampling/test_cache.py",
    ),
    Mutant(
        "cache: a slid window keeps the places of before",
        "far_scale/sampling/denoisers.py",
        "self._first, self._window_frames, self._prepared = first, 0, None",
        "self._first, self._window_frames = first, 0",
        "tests/sampling/test_session.py",
    ),
    Mutant(
        "cache: free slots are seen",
        "far_scale/sampling/denoisers.py",
        "seen = (token < window_end) | ((token >= context_start) & (token < end))",
        "seen = token < end",
        "tests/sampling/test_session.py",
    ),
    Mutant(
        "cache: the newest context frame is dropped",
        "far_scale/sampling/cache.py",
        "numbers = numbers % self.context_limit",
        "numbers = (numbers - 1) % self.context_limit",
        "tests/sampling/test_session.py",
    ),
    Mutant(
        "a refused training starts again",
        "far_scale/slurm/lifecycle.py",
        "    if status == REFUSED:\n",
        "    if status == -12345:\n",
        "tests/slurm/test_jobs.py",
    ),
    Mutant(
        "a cancelled job starts again",
        "far_scale/slurm/lifecycle.py",
        'if state.state != "RUNNING" and state.reason != "TimeLimit":',
        "if False:",
        "tests/slurm/test_jobs.py",
    ),
    Mutant(
        "protocol hash without the seeds of clips",
        "far_scale/evaluation/protocol.py",
        'texts |= {"clips": {"source"}',
        'texts |= {"clips": {"source", "seed"}',
        "tests/evaluation/test_protocol.py",
    ),
    Mutant(
        "official q and k exchanged",
        "far_scale/convert/official.py",
        '("attn.to_q", "attn.to_k", "attn.to_v")',
        '("attn.to_k", "attn.to_q", "attn.to_v")',
        "tests/convert/test_official.py",
    ),
    Mutant(
        "draws of all lanes alike",
        "far_scale/utils/rng.py",
        "(step << 128) | (lane << 192)",
        "(step << 128)",
        "tests/train/test_flow_matching.py",
    ),
    Mutant(
        "unknown recipe keys accepted",
        "far_scale/config/schema.py",
        'extra="forbid", frozen=True',
        'extra="ignore", frozen=True',
        "tests/config/test_recipe.py",
    ),
    Mutant(
        "a copied run keeps its identity",
        "far_scale/train/run_dir.py",
        "return isinstance(recorded, dict) and all(",
        "return False and all(",
        "tests/train/test_run_dir.py",
    ),
    Mutant(
        "guidance towards the null class",
        "far_scale/sampling/denoisers.py",
        "return null + guidance * (conditioned - null)",
        "return conditioned + guidance * (null - conditioned)",
        "tests/sampling/test_sampler.py",
    ),
    Mutant(
        "conditions never dropped",
        "far_scale/train/flow_matching.py",
        ".random(len(classes)) < fraction",
        ".random(len(classes)) < 0",
        "tests/train/test_flow_matching.py",
    ),
    Mutant(
        "conditions dropped twice as often",
        "far_scale/train/flow_matching.py",
        ".random(len(classes)) < fraction",
        ".random(len(classes)) < 2 * fraction",
        "tests/train/test_flow_matching.py",
    ),
    Mutant(
        "bootstrap of the largest",
        "far_scale/evaluation/score_statistics.py",
        "size=(_BLOCK, len(values)))].mean(1)",
        "size=(_BLOCK, len(values)))].max(1)",
        "tests/evaluation/test_score_statistics.py",
    ),
    Mutant(
        "model directory: damage not seen",
        "far_scale/model/model_files.py",
        "        if sha256(path) != files[name].sha256:",
        "        if False:",
        "tests/train/test_export.py",
    ),
    Mutant(
        "arithmetic of the modulations not counted",
        "far_scale/train/costs.py",
        "+ 6 * width**2 * layout.frames",
        "",
        "tests/train/test_curriculum.py",
    ),
    Mutant(
        "fetched bytes not compared",
        "far_scale/data/remote/fetch.py",
        "        if digest != expected:",
        "        if False:",
        "tests/data/test_remote.py",
    ),
    Mutant(
        "a mixture's spread without its mean",
        "far_scale/data/loader/mixture.py",
        "math.sqrt(max(0.0, s - m * m))",
        "math.sqrt(max(0.0, s))",
        "tests/data/test_mixture.py",
    ),
    Mutant(
        "changed videos not noticed",
        "far_scale/data/encode/fingerprints.py",
        "    return status.st_mtime_ns != previous.mtime_ns and _hash_ends(path) != previous.ends",
        "    return False",
        "tests/data/test_layouts.py",
    ),
    Mutant(
        "timesteps from 0",
        "far_scale/train/flow_matching.py",
        "torch.from_numpy(TIMESTEPS - np.minimum(",
        "torch.from_numpy(TIMESTEPS - 1 - np.minimum(",
        "tests/train/test_flow_matching.py",
    ),
    Mutant(
        "timesteps rounded up",
        "far_scale/train/flow_matching.py",
        "np.floor(u * TIMESTEPS)",
        "np.ceil(u * TIMESTEPS)",
        "tests/train/test_flow_matching.py",
    ),
    Mutant(
        "lanes shuffle alike",
        "far_scale/data/loader/lanes.py",
        "epoch, lane)\n        return draw.permutation",
        "epoch, 0)\n        return draw.permutation",
        "tests/data/test_lanes.py",
    ),
)


def is_killed(mutant: Mutant, checkout: Path) -> tuple[bool, str]:
    """Whether the test fails with the mutant, and the first test that does."""
    path = checkout / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return False, f"its text is there {text.count(mutant.old)} times"
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "--show-capture=no", "-p", "no:cacheprovider"]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *mutant.test.split()], cwd=checkout, env=environment, capture_output=True, text=True
        )
    finally:
        path.write_text(text)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 1, failed[0] if failed else "no test failed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutants whose name or file has this in it")
    only = parser.parse_args().only
    chosen = [mutant for mutant in MUTANTS if only in mutant.name or only in mutant.file]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(checkout)], check=True)
        for mutant in chosen:
            start = time.monotonic()
            killed, by = is_killed(mutant, checkout)
            survivors += not killed
            seconds = time.monotonic() - start
            print(f"{'killed  ' if killed else 'SURVIVED'}  {mutant.name}: {by} ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
