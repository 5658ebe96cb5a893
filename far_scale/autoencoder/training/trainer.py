"""One optimizer step of an autoencoder and its discriminator, and all that a run must keep to go on from there.

The losses and their schedule are those of the official FAR code (showlab/FAR, far/trainers/trainer_dcae.py, with the
settings of options/train/dcae): absolute error + 1.0 x LPIPS; after `discriminator_start` steps also 0.5 x the patch
discriminator's judgement, weighed by the ratio of gradients, while the encoder stays as it is.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from far_scale.autoencoder import AutoencoderNetwork
from far_scale.autoencoder.training.batch_norm import share_batch_norms
from far_scale.autoencoder.training.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from far_scale.autoencoder.training.frames import to_pixels
from far_scale.autoencoder.training.perceptual import PerceptualDistance
from far_scale.autoencoder.training.recipe import AutoencoderRecipe, TrainSection
from far_scale.distributed.process_group import Processes
from far_scale.utils.rng import generator

_CLIP_NORM = 1.0  # of the autoencoder's gradient; the discriminator's is not clipped, as officially
_FINAL_FACTOR = 0.01  # of the learning rate, at the end of the cosine


class Trainer:
    """An autoencoder in training, on every rank the same weights.

    Attributes:
        average: the running average of the weights, by their names; what is no parameter (a batch norm's statistics)
            is as it is now.
        perceptual: whether there is a perceptual loss.
    """

    def __init__(self, recipe: AutoencoderRecipe[Any, Any], network: AutoencoderNetwork, processes: Processes) -> None:
        """Take over `network`, whose weights are the first ones of rank 0.

        Raises:
            UserError: the perceptual weights cannot be read.
        """
        self._recipe, self._settings, self._processes = recipe, recipe.train, processes
        self._network = self._prepared(network)
        self._optimizer = self._optimizer_of(self._network)
        self._average = {name: weight.detach().clone() for name, weight in self._network.named_parameters()}
        loss = self._settings.loss
        self._distance: PerceptualDistance | None = None
        if loss.perceptual > 0 and self._settings.perceptual_weights is not None:
            distance = PerceptualDistance.load(self._settings.perceptual_weights)
            self._distance = distance.to(processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._discriminator: PatchDiscriminator | None = None
        if loss.discriminator > 0:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.seed)
                self._discriminator = self._prepared(PatchDiscriminator())
            self._discriminator_optimizer = self._optimizer_of(self._discriminator)

    @property
    def average(self) -> dict[str, Tensor]:
        return {**self._network.state_dict(), **self._average}

    @property
    def perceptual(self) -> bool:
        return self._distance is not None

    def step(self, step: int, frames: Tensor) -> dict[str, Tensor]:
        """Step number `step` (from 0) on this rank's share of the batch, `frames` uint8 [N, 3, H, W].

        Returns:
            Scalar tensors by name: this rank's losses, not yet weighed, and what weighs the adversarial one; and the
            norm of the gradient before clipping, which is the same on all ranks.
        """
        settings, loss = self._settings, self._settings.loss
        pixels = to_pixels(frames.to(self._processes.device)).contiguous(memory_format=torch.channels_last)
        adversarial = self._discriminator is not None and step >= settings.discriminator_start
        with self._autocast():
            with torch.set_grad_enabled(not adversarial):  # officially the encoder stays from then on
                latents = self._network.encode(pixels)
            seen = self._network.decode(self._with_noise(step, latents)).float()
        error = seen - pixels
        told = {"squared": error.square().mean(), "absolute": error.abs().mean()}
        total = loss.squared * told["squared"] + loss.absolute * told["absolute"]
        if self._distance is not None:
            told["perceptual"] = self._distance(seen, pixels)
            total = total + loss.perceptual * told["perceptual"]
        told["loss"] = total
        if adversarial:
            assert self._discriminator is not None
            self._discriminator.requires_grad_(False)
            told["adversarial"] = -self._judge(seen).mean()
            weight = adaptive_weight(total, told["adversarial"], self._network.last_layer, self._processes)
            told["adversarial_weight"] = loss.discriminator * weight
            total = total + told["adversarial_weight"] * told["adversarial"]
        told["grad_norm"] = self._update(self._network, self._optimizer, total, step, _CLIP_NORM)
        self._average_weights()
        if adversarial:
            assert self._discriminator is not None
            self._discriminator.requires_grad_(True)
            told["discriminator"] = hinge_loss(self._judge(pixels), self._judge(seen.detach()))
            self._update(self._discriminator, self._discriminator_optimizer, told["discriminator"], step, math.inf)
        return {name: value.detach() for name, value in told.items()}

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, for `load_state`."""
        state: dict[str, Any] = {
            "network": self._network.state_dict(),
            "average": self._average,
            "optimizer": self._optimizer.state_dict(),
        }
        if self._discriminator is not None:
            state["discriminator"] = self._discriminator.state_dict()
            state["discriminator_optimizer"] = self._discriminator_optimizer.state_dict()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        for name, weight in self._average.items():
            weight.copy_(state["average"][name])
        if self._discriminator is not None:
            self._discriminator.load_state_dict(state["discriminator"])
            self._discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])

    def _prepared(self, network: Any) -> Any:
        """On the device, with rank 0's weights and batch norms that see all ranks."""
        share_batch_norms(network, self._processes)
        network = network.to(self._processes.device).train()
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)
        return network.to(memory_format=torch.channels_last)

    def _optimizer_of(self, network: nn.Module) -> torch.optim.AdamW:
        settings = self._settings
        return torch.optim.AdamW(network.parameters(), settings.learning_rate, settings.betas, weight_decay=0.0)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._processes.device.type, torch.bfloat16, enabled=self._settings.precision == "bf16")

    def _judge(self, pixels: Tensor) -> Tensor:
        assert self._discriminator is not None
        with self._autocast():
            logits: Tensor = self._discriminator(pixels)
        return logits.float()

    def _with_noise(self, step: int, latents: Tensor) -> Tensor:
        """Latents [N, C, H, W] with noise in proportion to each channel's deviation over the global batch."""
        if self._settings.latent_noise == 0:
            return latents
        ranks, rank = self._processes.world_size, self._processes.rank
        values = latents.detach().float()
        centred = values - self._processes.mean(values.mean((0, 2, 3), keepdim=True)).float()
        count = ranks * values.numel() / values.shape[1]
        variance = self._processes.mean(centred.square().mean((0, 2, 3), keepdim=True)) * count / (count - 1)
        shape = (ranks * len(values), *values.shape[1:])
        drawn = generator(self._recipe.seed, "latent noise", step).standard_normal(shape, np.float32)
        noise = torch.from_numpy(drawn).chunk(ranks)[rank].to(values.device)
        return latents + self._settings.latent_noise * variance.sqrt().float() * noise

    def _update(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, step: int, clip_norm: float
    ) -> Tensor:
        """Step down the gradient of the mean of all ranks' `loss`; returns its norm before clipping.

        The gradients travel in one piece after the backward pass, not in buckets beside it: which weights have one
        changes when the discriminator joins, and autoencoders are small.
        """
        for group in optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * schedule(step, self._settings)
        optimizer.zero_grad()
        loss.backward()
        gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
        if self._processes.world_size > 1:
            together = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(together)
            together /= self._processes.world_size
            parts = together.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.step()
        return norm

    @torch.no_grad()
    def _average_weights(self) -> None:
        """average <- decay x average + (1 - decay) x weight of what has just trained: officially the encoder's average
        stays, too, once the encoder does."""
        trained = {name: weight for name, weight in self._network.named_parameters() if weight.grad is not None}
        averages = [self._average[name] for name in trained]
        torch._foreach_lerp_(averages, list(trained.values()), 1 - self._settings.ema_decay)


def schedule(step: int, settings: TrainSection) -> float:
    """The learning rate at `step` (from 0), as a share of its peak."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.schedule == "constant":
        return warm
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return warm * (_FINAL_FACTOR + (1 - _FINAL_FACTOR) * cosine)
