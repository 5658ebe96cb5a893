"""Networks of metrics with random weights, under the names that others publish."""

from __future__ import annotations

import torch
from torch import Tensor

from far_scale.autoencoder.lpips_network import Net
from far_scale.evaluation.metric_networks import LPIPS


def random_lpips(net: Net, seed: int = 0) -> dict[str, Tensor]:
    """Under the published names."""
    random, published = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    with torch.device("meta"):
        own = LPIPS(net).state_dict()
    for name, tensor in own.items():
        value = torch.rand(tensor.shape, generator=random)
        if tensor.ndim == 4 and name.startswith("features"):
            value = torch.randn(tensor.shape, generator=random) * (2 / tensor[0].numel()) ** 0.5
        published[f"lin{name[7:]}.model.1.weight" if name.startswith("shares") else name] = value
    return published
