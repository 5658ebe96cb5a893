"""Differences of the official code's numbers and ours, on the same weights, inputs and noise, in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from measure import Row
from official import CLEAN_FRAME_RATIO, Draws, OfficialCode
from pairs import Clips, Pair, random_pair
from torch import Tensor
from tqdm import tqdm

from far_scale.config.schema import ObjectiveSection
from far_scale.model import FARConfig
from far_scale.sampling.config import SamplingConfig
from far_scale.sampling.noise import frame_noise
from far_scale.sampling.sampler import roll_out
from far_scale.train.flow_matching import CLEAN, add_noise, pack_loss

FORWARD_TOLERANCE = 1e-5
ROLL_OUT_TOLERANCE = 1e-4
BATCH = 2
GIVEN = 2
WINDOW = 16
ROLL_OUT_WINDOW = 4  # a short one: past it is soon reached, and it is the same code
ROLL_OUT_STEPS = 4


@dataclass(frozen=True)
class Kind:
    """A model by its conditions, and whether it has a context."""

    name: str
    context_patch: int = 0
    actions: int = 0
    labels: int = 0

    def config(self, layers: int, heads: int, window: int) -> FARConfig:
        return FARConfig(
            layers,
            heads,
            window=window,
            context_patch=self.context_patch,
            actions=self.actions,
            labels=self.labels,
            condition_dropout=0.0,
        )


KINDS = (
    Kind("FAR"),
    Kind("FAR, actions", actions=4),
    Kind("FAR, labels", labels=10),
    Kind("FAR-Long", context_patch=4),
    Kind("FAR-Long, actions", context_patch=4, actions=4),
)


def parity(code: OfficialCode, layers: int, heads: int, device: torch.device) -> dict[str, list[Row]]:
    """The tables of differences."""
    training: list[Row] = []
    steps: list[Row] = []
    roll_outs: list[Row] = []
    for kind in tqdm(KINDS, desc="parity", unit="model"):
        config = kind.config(layers, heads, WINDOW)
        training += training_rows(code, kind, config, random_pair(code, config, device), device)
        config = kind.config(layers, heads, ROLL_OUT_WINDOW)
        pair = random_pair(code, config, device)
        given = 2 * ROLL_OUT_WINDOW if config.context_patch else ROLL_OUT_WINDOW - 1
        steps += sampling_rows(code, kind, config, pair, device, given, new=1, steps=1)
        total = 2 * ROLL_OUT_WINDOW + 2 if config.context_patch else ROLL_OUT_WINDOW
        roll_outs += sampling_rows(code, kind, config, pair, device, GIVEN, total - GIVEN, ROLL_OUT_STEPS)
        roll_outs += sampling_rows(code, kind, config, pair, device, 0, total, ROLL_OUT_STEPS)[:1]
    of_roll_outs = f"window {ROLL_OUT_WINDOW}, batch {BATCH}"
    return {
        f"Training form (window {WINDOW}, batch {BATCH}): largest difference of the velocity, and the loss'": training,
        f"One forward while sampling ({of_roll_outs}): largest difference of the new frame": steps,
        f"Roll-outs ({of_roll_outs}, {ROLL_OUT_STEPS} steps a frame): largest difference of a new frame": roll_outs,
    }


def holds(tables: dict[str, list[Row]]) -> bool:
    """Whether every difference is within its limit."""
    return all(row["holds"] for rows in tables.values() for row in rows)


@torch.no_grad()
def training_rows(code: OfficialCode, kind: Kind, config: FARConfig, pair: Pair, device: torch.device) -> list[Row]:
    """Velocity and loss on clips shorter than, as long as, and (with a context) longer than the window."""
    pair.theirs.train()
    pair.ours.train()
    trainer = code.trainer(pair.theirs, config)
    rows = []
    for frames in (5, WINDOW, WINDOW + 1, 3 * WINDOW) if config.context_patch else (5, WINDOW):
        clips = Clips.random(config, BATCH, frames, device)
        conditions = clips.official_conditions(config)
        noisy = add_noise(clips.pack(), ObjectiveSection(clean_frame_ratio=CLEAN_FRAME_RATIO), config, seed=0).to(
            device
        )
        in_window = min(frames, config.window)
        batched = noisy.latents.unflatten(0, (BATCH, frames))
        timesteps = noisy.timesteps.view(BATCH, frames)

        # The official FAR-Long doubles the -1 of a clean context frame itself.
        theirs = pair.theirs(batched, timestep=timesteps.clamp(min=CLEAN), conditions=conditions).sample[:, -in_window:]
        ours = pair.ours(noisy.latents, noisy.timesteps, noisy.actions, noisy.labels, noisy.layout)

        target = noisy.target.unflatten(0, (BATCH, in_window))
        noise = torch.zeros_like(clips.latents)
        noise[:, -in_window:] = target + clips.latents[:, -in_window:]
        draws = Draws(noise, timesteps.clamp(min=1), clean=timesteps[:, -in_window:] == CLEAN)
        row: Row = {"model": kind.name, "frames": frames, "std of velocity": float(theirs.std())}
        row["velocity"] = largest(theirs.flatten(0, 1), ours)
        if config.context_patch and frames < config.window:
            row["loss"] = None  # the official trainer takes no clip shorter than the window
        else:
            batch = {"latent": clips.latents} | (conditions or {})
            row["loss"] = largest(code.loss(trainer, batch, draws), pack_loss(ours, noisy))
        row["allowed"] = FORWARD_TOLERANCE
        row["holds"] = max(row["velocity"], row["loss"] or 0.0) <= FORWARD_TOLERANCE
        rows.append(row)
    return rows


@torch.no_grad()
def sampling_rows(
    code: OfficialCode,
    kind: Kind,
    config: FARConfig,
    pair: Pair,
    device: torch.device,
    given: int,
    new: int,
    steps: int,
) -> list[Row]:
    """New frames by both codes, with their caches and without, at every guidance that the model has."""
    pair.theirs.eval()
    pair.ours.eval()
    clips = Clips.random(config, BATCH, given + new, device)
    noise = roll_out_noise(BATCH, given, new, clips.latents.shape[2:]).to(device)
    known = clips.latents[:, :given]
    rows = []
    for guidance in (1.0, 1.5, -1.0) if config.actions or config.labels else (1.0,):
        conditions = (clips.null(config) if guidance == -1 else clips).official_conditions(config)
        found = {}
        for cache in (True, False):
            found["official", cache] = code.roll_out(pair.theirs, known, noise, steps, abs(guidance), conditions, cache)
            found["ours", cache] = roll_out(
                pair.ours,
                known,
                SamplingConfig(frames=new, steps=steps, guidance=guidance, seed=0, use_cache=cache),
                actions=clips.actions,
                labels=clips.labels,
            )
        allowed = FORWARD_TOLERANCE if steps == new == 1 else ROLL_OUT_TOLERANCE
        differences = {
            "both with cache": largest(found["official", True], found["ours", True]),
            "both without": largest(found["official", False], found["ours", False]),
            "ours with and without": largest(found["ours", True], found["ours", False]),
            "official with and without": largest(found["official", True], found["official", False]),
        }
        ours = [difference for name, difference in differences.items() if not name.startswith("official")]
        row: Row = {"model": kind.name, "given": given, "new": new, "guidance": guidance}
        row["std of frames"] = float(found["official", False].std())
        rows.append(row | differences | {"allowed": allowed, "holds": max(ours) <= allowed})
    return rows


def roll_out_noise(batch: int, given: int, new: int, shape: torch.Size) -> Tensor:
    """`[B, new, C, H, W]`: the noise that our sampler draws for the frames after `given` ones, with seed 0."""
    return torch.stack(
        [
            torch.stack([frame_noise(0, clip, frame, shape) for frame in range(given, given + new)])
            for clip in range(batch)
        ]
    )


def largest(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs.float() - ours.float()).abs().max())
