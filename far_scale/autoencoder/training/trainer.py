"""One optimizer step of an autoencoder and its discriminator, and the state to resume from.

Losses and schedule are those of the official FAR code (showlab/FAR, far/trainers/trainer_dcae.py, with the settings of
options/train/dcae): absolute error + 1.0 x LPIPS; after `discriminator_start` steps also 0.5 x the adversarial loss,
times the adaptive weight, with the encoder frozen.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from far_scale.autoencoder import AutoencoderNetwork
from far_scale.autoencoder.training.batch_norm import sync_batch_norms
from far_scale.autoencoder.training.frames import to_pixels
from far_scale.autoencoder.training.losses import PatchDiscriminator, PerceptualLoss, adaptive_weight, hinge_loss
from far_scale.autoencoder.training.recipe import TrainSection
from far_scale.distributed.process_group import Processes
from far_scale.utils.rng import generator

_CLIP_NORM = 1.0  # of the autoencoder; the discriminator is not clipped, as in the official code
_FINAL_LR_FACTOR = 0.01  # at the end of the cosine


class Trainer:
    """An autoencoder in training, with the same weights on every rank.

    Attributes:
        ema_state_dict: the EMA of the parameters; buffers (batch norm statistics) are the current ones.
        has_perceptual_loss: whether LPIPS is part of the loss.
    """

    def __init__(self, settings: TrainSection, seed: int, network: AutoencoderNetwork, processes: Processes) -> None:
        """Take ownership of `network`; all ranks start from the weights of rank 0.

        Raises:
            UserError: the perceptual weights cannot be read.
        """
        self._settings, self._seed, self._processes = settings, seed, processes
        self._network = self._prepare(network)
        self._optimizer = self._make_optimizer(self._network)
        self._ema = {name: weight.detach().clone() for name, weight in self._network.named_parameters()}
        loss = self._settings.loss
        self._perceptual_loss: PerceptualLoss | None = None
        if loss.perceptual > 0 and self._settings.perceptual_weights is not None:
            perceptual_loss = PerceptualLoss.load(self._settings.perceptual_weights)
            self._perceptual_loss = perceptual_loss.to(processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._discriminator: PatchDiscriminator | None = None
        if loss.discriminator > 0:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self._discriminator = self._prepare(PatchDiscriminator())
            self._discriminator_optimizer = self._make_optimizer(self._discriminator)

    @property
    def ema_state_dict(self) -> dict[str, Tensor]:
        return {**self._network.state_dict(), **self._ema}

    @property
    def has_perceptual_loss(self) -> bool:
        return self._perceptual_loss is not None

    def step(self, step: int, frames: Tensor) -> dict[str, Tensor]:
        """Train step number `step` (from 0) on this rank's part of the batch, `frames` uint8 [N, 3, H, W].

        Returns:
            Scalar tensors by name: this rank's unweighted losses, the adversarial weight, and the gradient norm before
            clipping, which is the same on all ranks.
        """
        settings, loss = self._settings, self._settings.loss
        pixels = to_pixels(frames.to(self._processes.device)).contiguous(memory_format=torch.channels_last)
        adversarial = self._discriminator is not None and step >= settings.discriminator_start
        with self._autocast():
            with torch.set_grad_enabled(not adversarial):  # the official code freezes the encoder from then on
                latents = self._network.encode(pixels)
            decoded = self._network.decode(self._with_noise(step, latents)).float()
        error = decoded - pixels
        metrics = {"squared": error.square().mean(), "absolute": error.abs().mean()}
        total = loss.squared * metrics["squared"] + loss.absolute * metrics["absolute"]
        if self._perceptual_loss is not None:
            metrics["perceptual"] = self._perceptual_loss(decoded, pixels)
            total = total + loss.perceptual * metrics["perceptual"]
        metrics["loss"] = total
        if adversarial:
            assert self._discriminator is not None
            self._discriminator.requires_grad_(False)
            metrics["adversarial"] = -self._discriminate(decoded).mean()
            weight = adaptive_weight(total, metrics["adversarial"], self._network.last_layer, self._processes)
            metrics["adversarial_weight"] = loss.discriminator * weight
            total = total + metrics["adversarial_weight"] * metrics["adversarial"]
        metrics["grad_norm"] = self._update(self._network, self._optimizer, total, step, _CLIP_NORM)
        self._update_ema()
        if adversarial:
            assert self._discriminator is not None
            self._discriminator.requires_grad_(True)
            metrics["discriminator"] = hinge_loss(self._discriminate(pixels), self._discriminate(decoded.detach()))
            self._update(self._discriminator, self._discriminator_optimizer, metrics["discriminator"], step, math.inf)
        return {name: value.detach() for name, value in metrics.items()}

    def state(self) -> dict[str, Any]:
        """The state that the next step depends on, for `load_state`."""
        state: dict[str, Any] = {
            "network": self._network.state_dict(),
            "average": self._ema,
            "optimizer": self._optimizer.state_dict(),
        }
        if self._discriminator is not None:
            state["discriminator"] = self._discriminator.state_dict()
            state["discriminator_optimizer"] = self._discriminator_optimizer.state_dict()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from `state`."""
        self._network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        for name, weight in self._ema.items():
            weight.copy_(state["average"][name])
        if self._discriminator is not None:
            self._discriminator.load_state_dict(state["discriminator"])
            self._discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])

    def _prepare(self, network: Any) -> Any:
        """Move to the device, broadcast rank 0's weights, and synchronise batch norms."""
        sync_batch_norms(network, self._processes)
        network = network.to(self._processes.device).train()
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)
        return network.to(memory_format=torch.channels_last)

    def _make_optimizer(self, network: nn.Module) -> torch.optim.AdamW:
        settings = self._settings
        return torch.optim.AdamW(network.parameters(), settings.learning_rate, settings.betas, weight_decay=0.0)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._processes.device.type, torch.bfloat16, enabled=self._settings.precision == "bf16")

    def _discriminate(self, pixels: Tensor) -> Tensor:
        assert self._discriminator is not None
        with self._autocast():
            logits: Tensor = self._discriminator(pixels)
        return logits.float()

    def _with_noise(self, step: int, latents: Tensor) -> Tensor:
        """Add noise to latents [N, C, H, W], in units of each channel's std over the global batch."""
        if self._settings.latent_noise == 0:
            return latents
        ranks, rank = self._processes.world_size, self._processes.rank
        values = latents.detach().float()
        centred = values - self._processes.mean(values.mean((0, 2, 3), keepdim=True)).float()
        count = ranks * values.numel() / values.shape[1]
        variance = self._processes.mean(centred.square().mean((0, 2, 3), keepdim=True)) * count / (count - 1)
        shape = (ranks * len(values), *values.shape[1:])
        drawn = generator(self._seed, "latent noise", step).standard_normal(shape, np.float32)
        noise = torch.from_numpy(drawn).chunk(ranks)[rank].to(values.device)
        return latents + self._settings.latent_noise * variance.sqrt().float() * noise

    def _update(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, step: int, clip_norm: float
    ) -> Tensor:
        """Backward and optimizer step on the mean of `loss` over ranks; returns the gradient norm before clipping.

        One all-reduce after the backward pass, not overlapped buckets: the set of weights with gradients changes when
        the discriminator starts, and autoencoders are small.
        """
        for group in optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * lr_factor(step, self._settings)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
        if self._processes.world_size > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= self._processes.world_size
            parts = torch.split(flat, [gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimizer.step()
        return norm

    @torch.no_grad()
    def _update_ema(self) -> None:
        """ema <- decay x ema + (1 - decay) x weight, of weights with gradients: the official code also freezes the EMA
        of a frozen encoder."""
        trained = {name: weight for name, weight in self._network.named_parameters() if weight.grad is not None}
        averages = [self._ema[name] for name in trained]
        torch._foreach_lerp_(averages, list(trained.values()), 1 - self._settings.ema_decay)


def lr_factor(step: int, settings: TrainSection) -> float:
    """Learning rate at `step` (from 0) relative to its peak."""
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    if settings.schedule == "constant":
        return warmup
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return warmup * (_FINAL_LR_FACTOR + (1 - _FINAL_LR_FACTOR) * cosine)
