"""How latents are brought to the scale that the model is trained at."""

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
        """The scaling of a shard set, or the one scaling of all sets of a mixture.

        "factor": the autoencoder's one factor for all channels, as officially. "channel": to mean 0 and deviation 1
        in every channel (of a mixture by the statistics of its sets, merged by their shares); a channel that never
        changes is only shifted.
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
        """In words what this and the other do, where that is not the same but for rounding; None where it is."""
        pairs = [zip(self.shift, other.shift, strict=False), zip(self.scale, other.scale, strict=False)]
        if len(self.scale) == len(other.scale):
            near = [[math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in pair] for pair in pairs]
            channel = next((c for c, same in enumerate(zip(*near, strict=True)) if not all(same)), None)
            if channel is None:
                return None
        else:
            channel = 0
        return self._words(channel), other._words(channel)

    @property
    def kind(self) -> Literal["factor", "channel"]:
        """How it looks: one factor for all channels, or numbers of each channel."""
        return "factor" if not any(self.shift) and len(set(self.scale)) == 1 else "channel"

    def _words(self, channel: int) -> str:
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
