"""Batch norms that see the global batch, so that the number of ranks changes nothing.

DC-AE's decoder and the patch discriminator have batch norms; the official code makes them `SyncBatchNorm`, which has
no kernels for CPUs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from far_scale.distributed.process_group import Processes


def share_batch_norms(network: nn.Module, processes: Processes) -> None:
    """Let the batch norms within `network` take their statistics over all ranks; names of weights stay."""
    if processes.world_size == 1:
        return
    if processes.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # in place, since the network itself is none
        return
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(network, name, _CPUSyncBatchNorm(child))
        else:
            share_batch_norms(child, processes)


class _CPUSyncBatchNorm(nn.BatchNorm2d):
    """What `SyncBatchNorm` computes, for ranks whose shares of the batch are equal."""

    def __init__(self, own: nn.BatchNorm2d) -> None:
        super().__init__(own.num_features, own.eps, own.momentum)
        self.load_state_dict(own.state_dict())

    def forward(self, features: Tensor) -> Tensor:
        """[N, C, H, W] in and out."""
        if not self.training:
            return super().forward(features)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        ranks = dist.get_world_size()
        values = features.float()
        mean = _sum(values.mean((0, 2, 3))) / ranks
        centred = values - mean[:, None, None]
        variance = _sum(centred.square().mean((0, 2, 3))) / ranks
        with torch.no_grad():
            count = ranks * values.numel() / len(mean)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(features.dtype)


class _AllReduce(torch.autograd.Function):
    """The sum over the ranks; every rank's loss depends on it, so their gradients are summed, too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].clone()
        dist.all_reduce(summed)
        return summed


def _sum(values: Tensor) -> Tensor:
    summed: Tensor = _AllReduce.apply(values)  # type: ignore[no-untyped-call]
    return summed
