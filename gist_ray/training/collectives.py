"""Collectives: gather rows from every worker with gradient, and small numbers without."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(local: Tensor, counts: list[int]) -> Tensor:
    """Concatenate `local [counts[rank], dim]` of every worker, in rank order, to `[sum(counts), dim]`.

    Differentiable: the gradient of a row is the sum of the gradients that all workers have for it, sent home. When
    each of W workers backpropagates (W / B) * (sum of its rows' losses), the mean of the parameter gradients over the
    workers is the gradient of one process with the whole batch of B rows. Every worker
    must call this, forward and backward, also one with no rows.
    """
    if len(counts) == 1:
        return local
    gathered: Tensor = _GatherRows.apply(local, counts)  # type: ignore[no-untyped-call]  # torch's own
    return gathered


def gather_numbers(numbers: list[float]) -> Tensor:
    """The same few numbers of every worker, `[workers, len(numbers)]` in float64, in rank order."""
    own = torch.tensor(numbers, dtype=torch.float64)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own[None]
    if dist.get_backend() == "nccl":
        own = own.cuda()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.stack(parts).cpu()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        # gloo and NCCL gather equal shapes only: pad to the largest, at most one chunk more than needed.
        padded = local.new_zeros((max(counts), local.shape[1]))
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded.contiguous())
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        start = sum(ctx.counts[: dist.get_rank()])
        return summed[start : start + ctx.counts[dist.get_rank()]], None
