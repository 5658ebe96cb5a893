"""Batch norms over the global batch, so that the number of ranks changes nothing.

DC-AE's decoder and the patch discriminator have batch norms; the official code makes them `SyncBatchNorm`, which has
no CPU kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from far_scale.distributed.process_group import Processes


def sync_batch_norms(network: nn.Module, processes: Processes) -> None:
    """Replace the batch norms in `network`, in place, by ones over all ranks; names of weights stay."""
    if processes.world_size == 1:
        return
    if processes.device.type == "cuda":
        convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
        convert(network)  # in place, as the network itself is no batch norm
        return
    for name, child in network.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(network, name, _CPUSyncBatchNorm(child))
        else:
            sync_batch_norms(child, processes)


class _CPUSyncBatchNorm(nn.BatchNorm2d):
    """`SyncBatchNorm` for CPUs; every rank must have an equal part of the batch."""

    def __init__(self, batch_norm: nn.BatchNorm2d) -> None:
        super().__init__(batch_norm.num_features, batch_norm.eps, batch_norm.momentum)
        self.load_state_dict(batch_norm.state_dict())

    def forward(self, features: Tensor) -> Tensor:
        """[N, C, H, W] in and out."""
        if not self.training:
            return super().forward(features)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        ranks = dist.get_world_size()
        values = features.float()
        mean = _sum_over_ranks(values.mean((0, 2, 3))) / ranks
        centred = values - mean[:, None, None]
        variance = _sum_over_ranks(centred.square().mean((0, 2, 3))) / ranks
        with torch.no_grad():
            count = ranks * values.numel() / len(mean)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(features.dtype)


class _AllReduce(torch.autograd.Function):
    """The sum over ranks; as every rank's loss depends on it, the gradients are summed, too."""

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


def _sum_over_ranks(values: Tensor) -> Tensor:
    summed: Tensor = _AllReduce.apply(values)  # type: ignore[no-untyped-call]
    return summed
