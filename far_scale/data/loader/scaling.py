"""Scales latents for the model, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from far_scale.data.loader.mixture import MixtureManifest
from far_scale.data.shards.manifest import Manifest


@dataclass(frozen=True)
class LatentScaling:
    """A shift and a scale per channel: the model sees `(latents - shift) * scale`."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.shift) != len(self.scale):
            raise ValueError(f"{len(self.shift)} shifts but {len(self.scale)} scales")

    @staticmethod
    def of(manifest: Manifest | MixtureManifest, kind: Literal["factor", "channel"]) -> LatentScaling:
        """The scaling of a shard set, or the common one of a mixture.

        Args:
            manifest: with the latents' statistics.
            kind: "factor": the autoencoder's single factor for all channels, as in the official code. "channel": mean
                0 and standard deviation 1 in every channel; a constant channel is only shifted.
        """
        if kind == "factor":
            channels = manifest.latent_shape[0]
            return LatentScaling((0.0,) * channels, (manifest.autoencoder.scaling_factor,) * channels)
        return LatentScaling(manifest.mean, tuple(1.0 / std if std > 0 else 1.0 for std in manifest.std))

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Stored latents `[..., C, H, W]` to the model's scale, float32."""
        shift, scale = self._columns(latents)
        return (latents.float() - shift) * scale

    def restore(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalise`: the model's latents `[..., C, H, W]` to the autoencoder's, float32."""
        shift, scale = self._columns(latents)
        return latents.float() / scale + shift

    def differences(self, other: LatentScaling) -> tuple[str, str] | None:
        """Descriptions of this and the other where they differ beyond rounding; None where they do not."""
        pairs = [zip(self.shift, other.shift, strict=False), zip(self.scale, other.scale, strict=False)]
        if len(self.scale) == len(other.scale):
            close = [[math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in pair] for pair in pairs]
            channel = next((c for c, same in enumerate(zip(*close, strict=True)) if not all(same)), None)
            if channel is None:
                return None
        else:
            channel = 0
        return self._describe(channel), other._describe(channel)

    @property
    def kind(self) -> Literal["factor", "channel"]:
        """One factor for all channels, or a shift and a scale for each channel."""
        return "factor" if not any(self.shift) and len(set(self.scale)) == 1 else "channel"

    def _describe(self, channel: int) -> str:
        if self.kind == "factor":
            return f"one factor {self.scale[0]:.6g}"
        return f"per channel (channel {channel}: shift {self.shift[channel]:.6g}, scale {self.scale[channel]:.6g})"

    def to_dict(self) -> dict[str, list[float]]:
        """Plain lists, for JSON."""
        return {"shift": list(self.shift), "scale": list(self.scale)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> LatentScaling:
        """The inverse of `to_dict`."""
        return LatentScaling(tuple(map(float, values["shift"])), tuple(map(float, values["scale"])))

    def _columns(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if latents.shape[-3] != len(self.shift):
            raise ValueError(f"latents have {latents.shape[-3]} channels, the scaling has {len(self.shift)}")
        shift, scale = (
            torch.tensor(values, dtype=torch.float32, device=latents.device).view(-1, 1, 1)
            for values in (self.shift, self.scale)
        )
        return shift, scale
