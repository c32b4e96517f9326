"""Dropout on the CPU: the random numbers of torch's own take a twelfth of a training step of all-MiniLM-L6-v2."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LEVELS = 1 << 16
"""Of 16 random bits an element: a share is a number of these."""


class CpuDropout(nn.Dropout):
    """`nn.Dropout` with 16 random bits an element, drawn 64 at a time; `p` is rounded to a 65,536th.

    torch's generator gives a number at a time, on one thread: 1024 x 384 elements take 2.5 ms, here 0.5 ms. The bits
    follow from torch's seed, so what repeats torch's random numbers repeats these: a chunk's second forward, a
    checkpointed block. Expectation and scale are exact: what is kept is divided by the share that is. Not in place.
    """

    def forward(self, input: Tensor) -> Tensor:
        """The same shape; elements are 0 with probability `p`, else divided by `1 - p`. Identity in eval mode."""
        dropped = round(self.p * LEVELS)
        if not self.training or dropped == 0:
            return input
        if dropped == LEVELS or input.device.type != "cpu":
            return super().forward(input)
        return input * dropout_noise(input, dropped, drawn_seed())


def cheapen_dropout(model: nn.Module) -> None:
    """Turn every `nn.Dropout` of a model into a `CpuDropout`, in place. Attention may keep its own."""
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = CpuDropout


def drawn_seed() -> int:
    """A seed for `dropout_noise`, from torch's generator."""
    return int(torch.randint(torch.iinfo(torch.int64).max, ()))


def dropout_noise(like: Tensor, dropped: int, seed: int) -> Tensor:
    """0 for `dropped` of `LEVELS` elements, else what makes up for them; of the shape and type of `like`."""
    raw: Any = np.random.SFC64(seed).random_raw(-(-like.numel() // 4))
    bits = torch.from_numpy(raw.view(np.int16)[: like.numel()]).view(like.shape)
    return (bits >= dropped - LEVELS // 2).to(like.dtype).mul_(LEVELS / (LEVELS - dropped))
