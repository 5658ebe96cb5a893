"""The FAR model: `FAR(FARConfig(...))(latents, timesteps, actions=..., labels=...)` gives the velocity."""

from far_scale.model.far import FAR, FARConfig

__all__ = ["FAR", "FARConfig"]
