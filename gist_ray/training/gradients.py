"""Gradients in one buffer: what ZeRO 0 reduces over the workers, at the cost of the sum alone."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class FlatGradients:
    """The gradients of a model's trainable parameters, as views of one tensor `[parameters]`.

    Chunks add to the views, and one all-reduce sums them. DeepSpeed's own reduction copies every gradient into a new
    buffer and back: of a step of all-MiniLM-L6-v2 on two CPU workers it was 0.43 s, waiting for the other included, and
    this is 0.08 to 0.2 s. The all-reduce alone takes 0.05 s.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        whole = sum(parameter.numel() for parameter in self._parameters)
        kinds = {(parameter.dtype, parameter.device) for parameter in self._parameters}
        assert len(kinds) == 1, kinds  # a student is loaded in one precision, in one place
        ((dtype, device),) = kinds
        self._buffer = torch.zeros(whole, dtype=dtype, device=device)
        self._views: list[Tensor] = []
        start = 0
        for parameter in self._parameters:
            self._views.append(self._buffer[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()

    def attach(self) -> None:
        """Begin a step: every gradient is 0, and a view."""
        self._buffer.zero_()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def average(self) -> None:
        """Make them the mean over all workers."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._buffer)
            self._buffer /= dist.get_world_size()
