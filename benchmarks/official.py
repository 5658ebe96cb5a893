"""The official FAR code (showlab/FAR), loaded from a clone and run unchanged.

Its packages import everything they know of on their first import, metrics and video readers too. So the four modules
that matter are loaded by path, and what the trainer imports for logging and evaluation is stood in for: nothing that
is run here uses it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from far_scale.model import FARConfig
from far_scale.model.layers import HEAD_DIM
from far_scale.utils.errors import UserError

NEEDED_PACKAGES = ("diffusers", "einops")
PACKAGES = {
    "far": {},
    "far.models": {"build_model": None},
    "far.pipelines": {"build_pipeline": None},
    "far.trainers": {},
}
STAND_INS = (
    "accelerate",
    "accelerate.logging",
    "accelerate.utils",
    "pytorchvideo",
    "pytorchvideo.data",
    "pytorchvideo.data.encoded_video",
    "far.metrics",
    "far.metrics.metric",
    "far.models.autoencoder_dc_model",
    "far.utils.ema_util",
    "far.utils.vis_util",
)
CLEAN_FRAME_RATIO = 0.1


@dataclass(frozen=True)
class Draws:
    """Fixed values for the official trainer's random draws.

    Attributes:
        noise: `[B, F, C, H, W]`.
        timesteps: `[B, F]`, 1..1000.
        clean: `[B, Fw]` bool, which window frames (of a FAR without context: which frames) are given clean.
    """

    noise: Tensor
    timesteps: Tensor
    clean: Tensor


class PassThrough:
    """Stands in for the autoencoder: the given frames' latents come out of `encode`, and `decode` keeps what it gets.

    Args:
        given: `[B, G, C, H, W]`, or None where no autoencoder is asked to encode.
    """

    def __init__(self, dtype: torch.dtype, given: Tensor | None = None) -> None:
        self.dtype, self.given = dtype, given
        self.config = types.SimpleNamespace(scaling_factor=1.0)
        self.latents: Tensor | None = None

    def eval(self) -> None:
        """There is nothing to switch."""

    def encode(self, frames: Tensor) -> types.SimpleNamespace:
        assert self.given is not None
        return types.SimpleNamespace(latent=self.given.flatten(0, 1))

    def decode(self, latents: Tensor) -> types.SimpleNamespace:
        self.latents = latents
        return types.SimpleNamespace(sample=latents)


class OfficialCode:
    """The modules of a clone.

    Args:
        clone: the folder that holds `far/`.

    Raises:
        UserError: it is no clone, or a package that the official code needs is not installed.
    """

    def __init__(self, clone: Path) -> None:
        if not (clone / "far" / "models" / "far_long_model.py").is_file():
            raise UserError(f"{clone}: no official FAR code here; clone github.com/showlab/FAR and name that folder")
        missing = [name for name in NEEDED_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"the official code needs {' and '.join(missing)}; pip install {' '.join(missing)}")
        self.clone = clone
        importlib.import_module("diffusers").logging.set_verbosity_error()  # it warns at every model that is moved
        register_packages(clone)
        self._short = importlib.import_module("far.models.far_model")
        self._long = importlib.import_module("far.models.far_long_model")
        self._pipeline = importlib.import_module("far.pipelines.pipeline_far")
        self._scheduler = importlib.import_module("diffusers").FlowMatchEulerDiscreteScheduler
        importlib.import_module("diffusers.training_utils")  # before the stand-ins: it would look at accelerate
        with stood_in(STAND_INS):
            self._trainer = importlib.import_module("far.trainers.trainer_far")

    def model(self, config: FARConfig) -> nn.Module:
        """The official model of `config`'s shape, with its own first weights; its condition dropout is off."""
        arguments: dict[str, Any] = {
            "patch_size": config.patch,
            "in_channels": config.channels,
            "out_channels": config.channels,
            "num_layers": config.layers,
            "attention_head_dim": HEAD_DIM,
            "num_attention_heads": config.heads,
            "short_term_ctx_winsize": config.window,
        }
        if config.actions:
            arguments["condition_cfg"] = {"type": "action", "num_action_classes": config.actions}
        if config.labels:
            arguments["condition_cfg"] = {"type": "label", "num_classes": config.labels}
        if config.context_patch:
            model = self._long.FAR_Long(context_patch_size=config.context_patch, **arguments)
        else:
            model = self._short.FAR(**arguments)
        for name in ("action_embedder", "label_embedder"):
            if hasattr(model, name):
                getattr(model, name).dropout_prob = 0.0
        return model

    def trainer(self, model: nn.Module, config: FARConfig) -> Any:
        """The official trainer around `model`: `train_step({"latent": ..., "action": ...})["total_loss"]`.

        It takes the frames as they come, where its own `sample_frames` would cut a random length out of them.
        """
        trainer = object.__new__(self._trainer.FARTrainer)
        dtype = next(model.parameters()).dtype
        trainer.accelerator = types.SimpleNamespace(unwrap_model=lambda wrapped: wrapped)
        trainer.model, trainer.vae, trainer.weight_dtype = model, PassThrough(dtype), dtype
        trainer.scheduler = self._scheduler()
        trainer.weighting_scheme, trainer.context_timestep_idx = "logit_normal", -1
        trainer.clean_context_ratio = CLEAN_FRAME_RATIO
        trainer.training_type = "long_context" if config.context_patch else "base"
        trainer.sample_frames = lambda batch: batch
        return trainer

    def loss(self, trainer: Any, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """The trainer's loss of `batch` where all that it draws at random is `draws`."""
        shares = (
            1000 - draws.timesteps.flatten().cpu() + 0.5
        ) / 1000  # the trainer takes the timestep 1000 - floor(1000 u)
        below_or_above = torch.where(draws.clean, 0.0, 1.0)  # it gives a frame clean where its draw is below the ratio
        with (
            mock.patch.object(self._trainer, "compute_density_for_timestep_sampling", return_value=shares),
            mock.patch.object(torch, "randn_like", return_value=draws.noise.flatten(0, 1)),
            mock.patch.object(torch, "rand", return_value=below_or_above),
        ):
            return trainer.train_step(dict(batch))["total_loss"]

    def roll_out(
        self,
        model: nn.Module,
        given: Tensor,
        noise: Tensor,
        steps: int,
        guidance: float = 1.0,
        conditions: Mapping[str, Tensor] | None = None,
        cache: bool = True,
    ) -> Tensor:
        """The official pipeline's `generate` around a stand-in autoencoder.

        Args:
            given: `[B, G, C, H, W]`; G may be 0.
            noise: `[B, F, C, H, W]`, where each new frame starts.
            guidance: 1 or more. Its own -1 fails (it reads an attribute that its model lacks): give null classes.

        Returns:
            The new frames `[B, F, C, H, W]`.
        """
        batch, frames = noise.shape[:2]
        dtype = next(model.parameters()).dtype
        autoencoder = PassThrough(dtype, given.to(dtype))
        pipeline = self._pipeline.FARPipeline(transformer=model.eval(), vae=autoencoder, scheduler=self._scheduler())
        pipeline.execution_device = noise.device
        pipeline.set_progress_bar_config(disable=True)
        with mock.patch.object(self._pipeline, "randn_tensor", return_value=noise.to(dtype)):
            pipeline.generate(
                unroll_length=frames,
                guidance_scale=guidance,
                context_sequence=given if given.shape[1] else None,
                conditions=None if conditions is None else dict(conditions),
                num_inference_steps=steps,
                sample_size=noise.shape[-1],
                batch_size=batch,
                use_kv_cache=cache,
                show_progress=False,
            )
        assert autoencoder.latents is not None
        return autoencoder.latents.unflatten(0, (batch, -1))[:, given.shape[1] :]


def register_packages(clone: Path) -> None:
    """Make the packages of a clone importable, without what they would import themselves."""
    for name, attributes in PACKAGES.items():
        package = types.ModuleType(name)
        package.__path__ = [str(clone.joinpath(*name.split(".")))]
        package.__dict__.update(attributes)
        sys.modules[name] = package


@contextlib.contextmanager
def stood_in(names: tuple[str, ...]) -> Iterator[None]:
    """A context in which `names` are modules with every attribute."""
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update({name: mock.MagicMock() for name in names})
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
