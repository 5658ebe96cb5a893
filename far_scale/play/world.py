"""What all walks share: the model, its autoencoder, the inputs that it knows, and what a walk starts from."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from far_scale.autoencoder import Autoencoder
from far_scale.convert.model_dir import ModelMetadata
from far_scale.data.demo.explorer import LEFT, NOOP
from far_scale.data.demo.world import ACTION_NAMES, ACTIONS, SIZE, TURNS_OF_A_CIRCLE, DemoWorld
from far_scale.evaluation.rollouts.episodes import EpisodeSelection, decode_frame, encode_frames, load_episodes
from far_scale.evaluation.rollouts.runner import load_autoencoder, load_for_sampling
from far_scale.evaluation.rollouts.video_grid import to_uint8
from far_scale.model import FAR
from far_scale.model.hub import find_model
from far_scale.model.model_files import weights_digest
from far_scale.sampling.config import SamplingConfig
from far_scale.utils.errors import UserError

Pixels = NDArray[np.uint8]
StartKind = Literal["maze", "recorded", "nothing"]
Condition = Literal["actions", "labels", "none"]

DEMO_AUTOENCODER = "compact-vizdoom-f8c32"  # trained on the demo's mazes and nothing else
DEFAULT_FPS = 8.0
MAX_CONTEXT_FRAMES = 256  # of a model that does not say how many it was trained on
MAX_EPISODES = 8  # of --start, in turn


class Given(NamedTuple):
    """The given frames of a walk.

    Attributes:
        latents: `[1, G, C, H, W]`, scaled.
        classes: `[1, G]` int64, their actions or labels; None for a model without conditions.
        engine: `[G, h, w, 3]` of the real engine, or None.
    """

    latents: Tensor
    classes: Tensor | None
    engine: Pixels | None


@dataclass(frozen=True)
class World:
    """A model that one can walk through; one is shared by all walks.

    Attributes:
        name: of the model directory.
        model: on the device and in the dtype of the computation.
        metadata: of the model.
        autoencoder: the model's.
        weights: SHA-256 of the weights (`weights_digest`).
        episodes: given frames from recorded videos or shards, if a walk starts from these.
        has_engine: whether the real engine of the demo world can run beside the model.
        threads: torch threads; the frames' last bits depend on them.
    """

    name: str
    model: FAR
    metadata: ModelMetadata
    autoencoder: Autoencoder
    weights: str
    episodes: tuple[Given, ...]
    has_engine: bool
    threads: int

    @property
    def condition(self) -> Condition:
        """The condition of a frame."""
        return "actions" if self.model.config.actions else "labels" if self.model.config.labels else "none"

    @property
    def is_demo(self) -> bool:
        """Whether the model has learned the demo's mazes."""
        return is_demo_world(self.model, self.metadata)

    @property
    def inputs(self) -> list[str]:
        """The names of the actions or labels; "next" alone for a model without conditions."""
        if self.condition == "none":
            return ["next"]
        if self.is_demo:
            return list(ACTION_NAMES)
        if self.condition == "labels" and self.metadata.classes is not None:
            return list(self.metadata.classes)
        return [str(number) for number in range(self.model.config.actions or self.model.config.labels)]

    @property
    def start(self) -> StartKind:
        """What new walks start from."""
        return "recorded" if self.episodes else "maze" if self.has_engine else "nothing"

    @property
    def fps(self) -> float:
        """Frames a second at most."""
        return (self.metadata.fps or DEFAULT_FPS) / self.metadata.frame_stride

    @property
    def latent_size(self) -> tuple[int, int]:
        """H, W of a latent."""
        _, height, width = self.metadata.latent_shape
        return height, width

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a frame in pixels."""
        height, width = self.latent_size
        return height * self.autoencoder.downsample, width * self.autoencoder.downsample

    def sampling(self, seed: int, steps: int, guidance: float) -> SamplingConfig:
        """The settings of a session: the grid that is best with few steps, and a window that slides by its half.

        The context is as long as in training at most; memory does not grow with the walk.

        Raises:
            UserError: they do not fit the model.
        """
        config, known = self.model.config, self.metadata.context_frames
        sampling = SamplingConfig(
            frames=1,
            steps=steps,
            guidance=guidance,
            seed=seed,
            grid="even",
            window_stride=max(1, config.window // 2),
            context_frames=(MAX_CONTEXT_FRAMES if known is None else known) if config.context_patch else None,
        )
        sampling.check(self.model.config)
        return sampling

    def decode(self, latents: Tensor) -> Pixels:
        """Scaled latents `[n, C, H, W]` to pixels `[n, h, w, 3]`."""
        return to_uint8(decode_frame(self.autoencoder, self.metadata.scaling.restore(latents)))

    def given(self, start: StartKind, seed: int, engine: DemoWorld | None) -> Given | None:
        """The given frames of the walk of `seed`; None where it starts from nothing.

        In a maze the player looks around once, so that the model has seen what is near.
        """
        if start == "recorded":
            return self.episodes[seed % len(self.episodes)]
        if start == "nothing":
            return None
        assert engine is not None
        engine.restart()
        frames = np.stack([engine.frame(), *(engine.step(LEFT) for _ in range(TURNS_OF_A_CIRCLE))])
        latents = self.metadata.scaling.normalise(encode_frames(self.autoencoder, frames, self.metadata))
        return Given(latents[None], torch.tensor([[NOOP] + [LEFT] * TURNS_OF_A_CIRCLE]), frames)


def open_world(source: Path, start: Path | None, threads: int) -> World:
    """Load a model.

    Args:
        source: a model directory, or a repository of the hub.
        start: a video, a folder of them or a shard set, whose first frames the walks start from.
        threads: torch threads of the computation.

    Raises:
        UserError: the model cannot be loaded or is not causal, or the start does not fit it.
    """
    torch.set_num_threads(threads)
    folder = find_model(source)
    model, metadata = load_for_sampling(folder)
    if not model.config.causal:
        raise UserError(
            f"{source}: the model is not causal, it denoises whole clips and cannot answer to one action at a time; "
            "use tools/sample.py, or play a FAR model"
        )
    autoencoder = load_autoencoder(metadata, next(model.parameters()).device)
    episodes: tuple[Given, ...] = ()
    if start is not None:
        selection = EpisodeSelection(given=None, frames=0, episodes=MAX_EPISODES, conditioned=True)
        loaded = load_episodes(start, model.config, metadata, autoencoder, selection)
        classes = loaded.actions
        if loaded.labels is not None:
            classes = loaded.labels[:, None].expand(-1, loaded.context.shape[1]).clone()
        rows = range(len(loaded.keys))
        episodes = tuple(
            Given(loaded.context[row][None], None if classes is None else classes[row][None], None) for row in rows
        )
    has_engine = is_demo_world(model, metadata) and start is None and importlib.util.find_spec("vizdoom") is not None
    name = source.name or folder.resolve().name
    return World(name, model, metadata, autoencoder, weights_digest(folder), episodes, has_engine, threads)


def is_demo_world(model: FAR, metadata: ModelMetadata) -> bool:
    """Whether a model's actions and frames are those of the demo's engine."""
    return (
        metadata.autoencoder.name == DEMO_AUTOENCODER
        and model.config.actions == ACTIONS
        and metadata.frame_stride == 1
        and metadata.latent_shape[1:] == (SIZE // 8, SIZE // 8)
    )
