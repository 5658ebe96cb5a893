"""Trains an autoencoder by a recipe on any number of ranks, resuming from its latest checkpoint."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from far_scale.autoencoder import AutoencoderNetwork, build_network
from far_scale.autoencoder.compact import CompactAutoencoder
from far_scale.autoencoder.training.checkpoints import Checkpoints
from far_scale.autoencoder.training.export import export
from far_scale.autoencoder.training.frames import EpisodeFrames, FrameSource, VideoFrames, to_pixels
from far_scale.autoencoder.training.recipe import (
    AutoencoderRecipe,
    CompactModel,
    DCAEModel,
    EpisodeData,
    TrainSection,
    VideoData,
)
from far_scale.autoencoder.training.trainer import Trainer, lr_factor
from far_scale.distributed.consensus import Consensus
from far_scale.distributed.process_group import Processes
from far_scale.distributed.signals import StopSignals
from far_scale.utils.errors import UserError, rank_prefix
from far_scale.utils.event_log import lines_up_to
from far_scale.utils.io import JsonlWriter, atomic_write, flatten, read_json, write_json

_FRAMES_FOR_INIT = 1024  # for the principal components of their patches
# Keys that may differ from the checkpoint's recipe: paths, and keys that do not change the weights.
_CHANGEABLE = (
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
class TrainingPaths:
    """The folders of a training, and its number of workers.

    Attributes:
        out: folder for NAME.safetensors and its metadata NAME.json.
        run: folder for checkpoints/, log.jsonl and recipe.json.
        episodes: folder for recorded episodes; existing ones are reused.
        workers: processes that record, or threads that read videos.
    """

    out: Path
    run: Path
    episodes: Path
    workers: int


def train_autoencoder(
    recipe: AutoencoderRecipe[Any, Any],
    paths: TrainingPaths,
    command: str,
    processes: Processes,
    signals: StopSignals | None = None,
) -> bool:
    """Train to the last step and export; called on every rank.

    Losses and weights are bitwise the same however often the run is killed and restarted on as many ranks of the same
    machines; another number of ranks changes them by rounding.

    Args:
        recipe: what to train.
        paths: where to read and write.
        command: the command line, for the metadata.
        processes: the ranks.
        signals: requests to stop; the run then ends after a step, with a checkpoint.

    Returns:
        Whether all steps are done and the weights exported.

    Raises:
        UserError: ranks, frames, perceptual weights, checkpoint or disk do not fit the recipe, or the loss is not
            finite.
    """
    use_deterministic_kernels(processes.device)
    settings = recipe.train

    def log_line(text: str) -> None:
        tqdm.write(f"{rank_prefix()}{text}")

    def log_once(text: str) -> None:
        if processes.is_main_process:
            tqdm.write(text)

    with open_frames(recipe, paths, processes, log_line) as frames:
        network = init_network(recipe, frames, processes)
        trainer = Trainer(settings, recipe.seed, network, processes)
        if settings.loss.perceptual > 0 and not trainer.has_perceptual_loss:
            log_once("no perceptual loss: train.perceptual_weights is not set, so that term is off")
        checkpoints = Checkpoints(paths.run / "checkpoints", processes, log_line)
        identity = {"recipe": json.dumps(recipe.model_dump(mode="json")), "frames": frames.fingerprint}
        identity["perceptual"] = str(trainer.has_perceptual_loss)
        start = restore(checkpoints, trainer, identity, settings)
        log_once(f"{recipe.name}: from step {start} to {settings.steps} on {processes.world_size} ranks")
        if processes.is_main_process:
            write_json(paths.run / "recipe.json", recipe.model_dump(mode="json"))
        consensus, done = Consensus(signals, processes), start
        with StepLog(paths.run / "log.jsonl", settings.steps, start, processes) as step_log:
            for step in range(start, settings.steps):
                metrics = trainer.step(step, frames.batch(step))
                done, is_last = step + 1, step + 1 == settings.steps
                consensus.start(saving=False, damaged=False)
                step_log.end_step()
                is_logging = is_last or done == 1 or done % settings.log_every == 0
                is_stopping = consensus.flags().stop
                is_saving = is_last or is_stopping or done % settings.checkpoint_every == 0
                if is_logging or is_saving:
                    values = mean_over_ranks(metrics, processes)
                    check_finite(recipe.name, done, values)
                if is_logging:
                    step_log.write(
                        done, {**values, "learning_rate": settings.learning_rate * lr_factor(step, settings)}
                    )
                if is_saving:
                    checkpoints.save(done, {**trainer.state(), **identity})
                if is_stopping and not is_last:
                    log_once(f"step {done}: stopped as requested; run the same command to resume")
                    break
        if done == settings.steps and processes.is_main_process:
            path = paths.out / f"{recipe.name}.safetensors"
            weights, config = trainer.ema_state_dict, network.config_dict()
            metadata = export(path, recipe, config, weights, frames, command, processes.device)
            quality = "" if metadata["psnr_db"] is None else f"{metadata['psnr_db']} dB on held-out frames, "
            log_once(f"{path}: {quality}scaling factor {metadata['scaling_factor']:.4f}")
        dist.barrier(processes.host_group)  # a launcher may kill the others when one process ends
        return done == settings.steps


class StepLog:
    """Progress bar, console lines and log.jsonl, on the main process; a resumed run logs each step once.

    Args:
        file: log.jsonl.
        steps: of the whole run.
        start: steps already done; lines of later steps, written after the last checkpoint, are dropped.
        processes: the ranks.
    """

    def __init__(self, file: Path, steps: int, start: int, processes: Processes) -> None:
        self._lines, self._steps, self._is_main = JsonlWriter(file), steps, processes.is_main_process
        self._last_step, self._last_time = start, time.perf_counter()
        if self._is_main and file.exists():
            lines = lines_up_to(file, start)
            with atomic_write(file) as staged:
                staged.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._bar: Any = tqdm(
            total=steps, initial=start, desc="train", unit="step", disable=None if self._is_main else True
        )

    def end_step(self) -> None:
        """Advance the progress bar."""
        self._bar.update()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log the values of step number `step` (from 1)."""
        if self._is_main:
            seconds = (time.perf_counter() - self._last_time) / max(1, step - self._last_step)
            self._lines.append({"step": step, **values, "seconds_per_step": seconds})
            text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            tqdm.write(f"step {step}/{self._steps}  {text}")
        self._last_step, self._last_time = step, time.perf_counter()

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def open_frames(
    recipe: AutoencoderRecipe[Any, Any], paths: TrainingPaths, processes: Processes, log: Callable[[str], None]
) -> FrameSource:
    """Open the recipe's frames.

    Raises:
        UserError: there are none, or the ranks do not divide the batch.
    """
    data, train = recipe.data, recipe.train
    if isinstance(data, EpisodeData):
        divisible, what = train.batch, f"train.batch: {train.batch} frames"
    else:
        divisible = train.batch // data.clip_frames
        what = f"train.batch: {train.batch} frames, {divisible} clips,"
    if divisible % processes.world_size:
        raise UserError(
            f"{recipe.name}: {what} cannot be divided evenly among {processes.world_size} ranks; start a number of "
            f"ranks that divides {divisible}, or change train.batch"
        )
    if isinstance(data, EpisodeData):
        return EpisodeFrames(data, recipe.seed, train.batch, paths.episodes, paths.workers, processes)
    return open_video_frames(recipe, paths.workers, processes, log)


def open_video_frames(
    recipe: AutoencoderRecipe[Any, VideoData], workers: int, processes: Processes, log: Callable[[str], None]
) -> VideoFrames:
    """`VideoFrames` of a recipe; its errors begin with the recipe's name."""
    train = recipe.train
    try:
        return VideoFrames(recipe.data, recipe.seed, train.batch, train.steps, workers, processes, log)
    except UserError as error:
        raise UserError(f"{recipe.name}: {error}") from None


def init_network(recipe: AutoencoderRecipe[Any, Any], frames: FrameSource, processes: Processes) -> AutoencoderNetwork:
    """Build the network with initial weights, by the seed and, for the compact one, from the frames.

    Raises:
        UserError: model.config is not a configuration of an AutoencoderDC, or data.size does not fit the network.
    """
    model: CompactModel | DCAEModel = recipe.model
    if isinstance(model, CompactModel):
        config: Any = model.model_dump(exclude={"kind"})
    elif model.preset is not None:
        from far_scale.autoencoder.deep_compression import CLASS_NAME, PRESETS

        config = {"_class_name": CLASS_NAME, **PRESETS[model.preset]}
    else:
        assert model.config is not None  # checked by load_autoencoder_recipe
        config = read_json(model.config, "config of an autoencoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        try:
            network = build_network(config)
        except UserError:
            raise
        except Exception as error:  # any kind: diffusers does not check its arguments
            raise UserError(
                f"{recipe.model.config}: model.config: not a configuration of diffusers' AutoencoderDC ({error!r})"
            ) from None
    if frames.size % network.downsample:
        raise UserError(
            f"{recipe.name}: data.size: {frames.size} is not a multiple of {network.downsample}, the network's pixels "
            "per latent position along each side"
        )
    # Other ranks get the main process's weights.
    if isinstance(network, CompactAutoencoder) and processes.is_main_process:
        network.start_from_patches(to_pixels(frames.sample(_FRAMES_FOR_INIT)))
    return network


def restore(checkpoints: Checkpoints, trainer: Trainer, identity: dict[str, Any], settings: TrainSection) -> int:
    """Load the newest checkpoint, if any; returns the number of steps done.

    Args:
        checkpoints: of the run.
        trainer: gets the state.
        identity: `recipe` (JSON), `frames` and `perceptual`, as stored in a checkpoint.
        settings: of the training; its steps may change if the learning rate does not depend on them.

    Raises:
        UserError: another recipe, other videos, more steps than the recipe's, or an unreadable checkpoint.
    """
    newest = checkpoints.load_newest()
    if newest is None:
        return 0
    path, state = newest
    old, new = flatten(json.loads(state["recipe"])), flatten(json.loads(identity["recipe"]))
    changeable = _CHANGEABLE if settings.schedule == "cosine" else (*_CHANGEABLE, "train.steps")
    keys = [key for key in dict.fromkeys([*new, *old]) if key not in changeable]
    changed = [f"{key} {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]
    if state["frames"] != identity["frames"]:
        changed.append("other videos in data.videos")
    if state["perceptual"] != identity["perceptual"]:
        changed.append(f"perceptual loss {state['perceptual']} -> {identity['perceptual']}")
    if changed:
        raise UserError(
            f"{path}: changed since this checkpoint: {', '.join(changed)}; put it back, or give another --run-dir"
        )
    if state["step"] > settings.steps:
        raise UserError(f"{path}: train.steps: {settings.steps} are fewer than this checkpoint has; raise them")
    trainer.load_state(state)
    return int(state["step"])


def use_deterministic_kernels(device: torch.device) -> None:
    """Select deterministic GPU kernels; CPU kernels already are."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling uninitialised memory costs time and changes nothing here.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def mean_over_ranks(metrics: dict[str, Tensor], processes: Processes) -> dict[str, float]:
    """Average the scalars of `Trainer.step` over ranks."""
    values = processes.mean(torch.stack([value.double() for value in metrics.values()])).tolist()
    return dict(zip(metrics, values, strict=True))


def check_finite(name: str, step: int, values: dict[str, float]) -> None:
    """Raise, on all ranks alike, before non-finite weights reach a checkpoint.

    Raises:
        UserError: a loss or the gradient is not finite.
    """
    bad = [key for key, value in values.items() if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"{name}: step {step}: not finite: {', '.join(bad)}; lower train.learning_rate and start over with "
            "another --run-dir, or resume from the last checkpoint by the same command"
        )
