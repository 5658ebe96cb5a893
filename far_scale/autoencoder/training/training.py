"""Trains an autoencoder by a recipe, on any number of ranks, from its latest checkpoint where there is one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from far_scale.autoencoder import AutoencoderNetwork, network_of
from far_scale.autoencoder.compact import CompactAutoencoder
from far_scale.autoencoder.training.checkpoints import Checkpoints
from far_scale.autoencoder.training.export import export
from far_scale.autoencoder.training.frames import EpisodeFrames, Frames, VideoFrames, to_pixels
from far_scale.autoencoder.training.log import Log
from far_scale.autoencoder.training.recipe import AutoencoderRecipe, CompactModel, EpisodeData, TrainSection
from far_scale.autoencoder.training.trainer import Trainer, schedule
from far_scale.distributed.consensus import Consensus
from far_scale.distributed.process_group import Processes
from far_scale.distributed.signals import StopSignals
from far_scale.utils.errors import UserError, rank_prefix
from far_scale.utils.io import flatten, read_json, write_json

_FRAMES_FOR_START = 1024  # whose patches the principal components are of
# What may differ from the checkpoint's recipe: where files lie, and what does not change the weights.
_FREE = (
    "name",
    "data.videos",
    "data.split",
    "data.heldout_videos",
    "data.heldout_split",
    "data.heldout_seeds",
    "train.perceptual_weights",
    "train.checkpoint_every",
    "train.log_every",
)


@dataclass(frozen=True)
class Places:
    """Where a training reads and writes.

    Attributes:
        out: folder for NAME.safetensors and its card NAME.json.
        run: folder for checkpoints/, log.jsonl and recipe.json.
        episodes: folder for recorded episodes; those in it already are not recorded again.
        workers: processes that record, or threads that read videos.
    """

    out: Path
    run: Path
    episodes: Path
    workers: int


def train_autoencoder(
    recipe: AutoencoderRecipe[Any, Any],
    places: Places,
    command: str,
    processes: Processes,
    signals: StopSignals | None = None,
) -> bool:
    """Train to the last step and export; every process calls this.

    Losses and weights are the same bit for bit however often the run is killed and started again, on as many ranks
    of the same machines; another number of ranks changes them by rounding.

    Args:
        recipe: what to train.
        places: where it reads and writes.
        command: the command line that the card tells.
        processes: who trains it.
        signals: what may ask for a stop; then the run ends after a step, with a checkpoint.

    Returns:
        Whether all steps are done, and the weights exported.

    Raises:
        UserError: ranks, frames, perceptual weights, checkpoint or disk do not fit the recipe, or the loss is not
            finite.
    """
    compute_repeatably(processes.device)
    settings = recipe.train

    def say(text: str) -> None:
        tqdm.write(f"{rank_prefix()}{text}")

    def say_once(text: str) -> None:
        if processes.is_main_process:
            tqdm.write(text)

    with frames_of(recipe, places, processes, say) as frames:
        network = first_network(recipe, frames, processes)
        trainer = Trainer(recipe, network, processes)
        if settings.loss.perceptual > 0 and not trainer.perceptual:
            say_once("no perceptual loss: train.perceptual_weights is not set, so that term is off")
        checkpoints = Checkpoints(places.run / "checkpoints", processes, say)
        card = {"recipe": json.dumps(recipe.model_dump(mode="json")), "frames": frames.fingerprint}
        card["perceptual"] = str(trainer.perceptual)
        start = restore(checkpoints, trainer, card, settings)
        say_once(f"{recipe.name}: from step {start} to {settings.steps} on {processes.world_size} ranks")
        if processes.is_main_process:
            write_json(places.run / "recipe.json", recipe.model_dump(mode="json"))
        consensus, done = Consensus(signals, processes), start
        with Log(places.run / "log.jsonl", settings.steps, start, processes) as log:
            for step in range(start, settings.steps):
                told = trainer.step(step, frames.batch(step))
                done, last = step + 1, step + 1 == settings.steps
                consensus.start(saving=False, damaged=False)
                log.end_step()
                logging = last or done == 1 or done % settings.log_every == 0
                stopping = consensus.flags().stop
                saving = last or stopping or done % settings.checkpoint_every == 0
                if logging or saving:
                    values = means(told, processes)
                    check_finite(recipe, done, values)
                if logging:
                    log.tell(done, {**values, "learning_rate": settings.learning_rate * schedule(step, settings)})
                if saving:
                    checkpoints.save(done, {**trainer.state(), **card})
                if stopping and not last:
                    say_once(f"step {done}: stopped as asked; the same command goes on from here")
                    break
        if done == settings.steps and processes.is_main_process:
            path = places.out / f"{recipe.name}.safetensors"
            weights = trainer.average
            made = export(path, recipe, network.card_config(), weights, frames, command, processes.device)
            quality = "" if made["psnr_db"] is None else f"{made['psnr_db']} dB on held-out frames, "
            say_once(f"{path}: {quality}scaling factor {made['scaling_factor']:.4f}")
        dist.barrier(processes.host_group)  # a launcher that sees one process end may kill the others
        return done == settings.steps


def frames_of(
    recipe: AutoencoderRecipe[Any, Any], places: Places, processes: Processes, say: Callable[[str], None]
) -> Frames:
    """The frames that the recipe asks for.

    Raises:
        UserError: there are none, or the ranks do not divide the batch.
    """
    batch, ranks = recipe.train.batch, processes.world_size
    if isinstance(recipe.data, EpisodeData):
        shares, what = batch, f"train.batch: {batch} frames"
    else:
        shares = batch // recipe.data.clip_frames
        what = f"train.batch: {batch} frames, {shares} clips,"
    if shares % ranks:
        raise UserError(
            f"{recipe.name}: {what} cannot be shared evenly by {ranks} ranks; start a number of ranks that divides "
            f"{shares}, or change train.batch"
        )
    if isinstance(recipe.data, EpisodeData):
        return EpisodeFrames(recipe, places.episodes, places.workers, processes)
    return VideoFrames(recipe, places.workers, processes, say)


def first_network(recipe: AutoencoderRecipe[Any, Any], frames: Frames, processes: Processes) -> AutoencoderNetwork:
    """The network with its first weights, which depend on the seed, and the compact one's on the frames, too.

    Raises:
        UserError: model.config is no configuration of an AutoencoderDC, or data.size does not fit the network.
    """
    model = recipe.model
    if isinstance(model, CompactModel):
        config: Any = model.model_dump(exclude={"kind"})
    elif model.preset is not None:
        from far_scale.autoencoder.deep_compression import CLASS_NAME, PRESETS

        config = {"_class_name": CLASS_NAME, **PRESETS[model.preset]}
    else:
        config = read_json(model.config, "config of an autoencoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        try:
            network = network_of(config)
        except UserError:
            raise
        except Exception as error:  # of whatever kind: diffusers does not check what it is given
            raise UserError(
                f"{model.config}: model.config: not a configuration of diffusers' AutoencoderDC ({error!r})"
            ) from None
    if frames.size % network.downsample:
        raise UserError(
            f"{recipe.name}: data.size: {frames.size} is no multiple of {network.downsample}, which is how many pixels "
            "a side make one latent position"
        )
    if (
        isinstance(network, CompactAutoencoder) and processes.is_main_process
    ):  # the others get the main process's weights
        network.start_from_patches(to_pixels(frames.sample(_FRAMES_FOR_START)))
    return network


def restore(checkpoints: Checkpoints, trainer: Trainer, card: dict[str, Any], settings: TrainSection) -> int:
    """Load the newest checkpoint, if there is one; returns the steps done.

    Args:
        checkpoints: the run's.
        trainer: which gets its state.
        card: `recipe` (JSON), `frames` and `perceptual`, as they stand in a checkpoint.
        settings: of the training; its steps may change where the learning rate does not follow from them.

    Raises:
        UserError: it was trained by another recipe, on other videos, for more steps, or cannot be read.
    """
    newest = checkpoints.newest()
    if newest is None:
        return 0
    path, state = newest
    old, new = flatten(json.loads(state["recipe"])), flatten(json.loads(card["recipe"]))
    free = _FREE if settings.schedule == "cosine" else (*_FREE, "train.steps")
    keys = [key for key in dict.fromkeys([*new, *old]) if key not in free]
    changed = [f"{key} {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
    if state["frames"] != card["frames"]:
        changed.append("other videos in data.videos")
    if state["perceptual"] != card["perceptual"]:
        changed.append(f"perceptual loss {state['perceptual']} -> {card['perceptual']}")
    if changed:
        raise UserError(
            f"{path}: changed since this checkpoint: {', '.join(changed)}; put it back, or give another --run-dir"
        )
    if state["step"] > settings.steps:
        raise UserError(f"{path}: train.steps: {settings.steps} are fewer than this checkpoint has; raise them")
    trainer.load_state(state)
    return int(state["step"])


def compute_repeatably(device: torch.device) -> None:
    """Take the GPU kernels that give the same bits every time; those of a CPU do."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling what is not yet written costs time and changes nothing here.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def means(told: dict[str, Tensor], processes: Processes) -> dict[str, float]:
    """What `Trainer.step` tells, as means over the ranks."""
    values = processes.mean(torch.stack([value.double() for value in told.values()])).tolist()
    return dict(zip(told, values, strict=True))


def check_finite(recipe: AutoencoderRecipe[Any, Any], step: int, values: dict[str, float]) -> None:
    """Refuse to go on with weights that no checkpoint may hold, on all ranks alike.

    Raises:
        UserError: a loss or the gradient is not finite.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"{recipe.name}: step {step}: not finite: {', '.join(bad)}; set train.learning_rate lower and begin anew "
            "with another --run-dir, or go on from the last checkpoint by the same command"
        )
