"""Memory: how many chunks of a step can keep their activations until the backward pass."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from gist_ray.config import TrainConfig
from gist_ray.encoder import Encoder

_PROBES = ((2, 8), (8, 8), (4, 32), (2, 64))  # rows, tokens
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (("", "memory.max", "memory.current"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"))
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes there are for activations, and bytes a chunk takes. The same on every worker."""

    budget: float
    per_chunk: float
    """Bytes of any chunk, for instance the weights that autocast has narrowed for it."""
    per_token: float
    """Bytes of each padded token."""
    per_token_pair: float
    """Bytes of each pair of tokens in a row: attention."""
    given: bool = False
    """Whether the budget is the user's, to be used up, and not a guess."""

    def needed(self, rows: int, tokens: int) -> float:
        """Bytes that the activations of a chunk take."""
        return self.per_chunk + rows * tokens * (self.per_token + tokens * self.per_token_pair)

    def kept(self, shapes: Sequence[tuple[int, int]]) -> list[bool]:
        """Which chunks keep their activations: some of the last ones. The others are computed again.

        All of them, if they fit in the budget. Of more, only `(budget / all) ** 1.5` of a budget that was not given is
        used: the larger the batch, the smaller the share of a step that a kept byte saves, and memory that saves little
        is left to others. So the need falls where batches outgrow the machine, instead of staying at the brim. (On 24
        GB, batches of 8192 short rows keep 1 % and peak at 0.77 times the memory of 256; with `budget / all` alone they
        kept 5 %, and peaked at 1.41 times.)
        """
        needs = [self.needed(*shape) for shape in shapes]
        share = 1.0 if self.given else min(1.0, self.budget / max(sum(needs), 1.0))
        left, kept = self.budget * share**1.5, [False] * len(shapes)
        for place in reversed(range(len(shapes))):
            left -= needs[place]
            if left < 0:
                break
            kept[place] = True
        return kept


def probe(encoder: Encoder, train: TrainConfig) -> ActivationMemory:
    """Measure what a student's activations take, by the tensors that autograd saves in a few small forwards.

    Every worker must call it; they agree on the largest need and the smallest budget.
    """
    shapes = [(rows, min(tokens, encoder.max_tokens)) for rows, tokens in _PROBES]
    measured = [_saved_bytes(encoder, rows, tokens, train.precision) for rows, tokens in shapes]
    terms = np.array([[1, rows * tokens, rows * tokens**2] for rows, tokens in shapes], dtype=np.float64)
    needs = np.linalg.lstsq(terms, np.array(measured, dtype=np.float64), rcond=None)[0].clip(min=0)
    budget = free_bytes(encoder.device) / 2 if train.activation_mb is None else train.activation_mb * 1e6
    values = torch.tensor([-budget, *needs.tolist()], dtype=torch.float64)
    if dist.is_initialized() and dist.get_world_size() > 1:
        values = values.to(encoder.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    budget, per_chunk, per_token, per_token_pair = values.tolist()
    return ActivationMemory(-budget, per_chunk, per_token, per_token_pair, given=train.activation_mb is not None)


def free_bytes(device: torch.device) -> float:
    """Memory that this worker may count as its own: of a GPU, or of the machine or container for each worker there."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = float(min([psutil.virtual_memory().available, *_container_bytes(_CGROUP)]))
    return max(0.0, free) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _container_bytes(cgroup: Path) -> list[float]:
    """Bytes left of a container's memory limit, in either version of control groups; nothing without a limit.

    Files that were read and could be read again count as used, and are given up when memory is needed.
    """
    for place, limit, usage in _CGROUP_FILES:
        folder = cgroup / place
        with suppress(OSError, ValueError):  # not there, or "max"
            left = float((folder / limit).read_text()) - float((folder / usage).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return [left + float(statistics["inactive_file"])]
    return []


def keep_freed_memory() -> None:
    """Let malloc keep what a step frees, for the next step.

    glibc gives large blocks back to the kernel, which hands them out again page by page, zeroed. The cost: a process
    does not shrink below its largest step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # the largest that glibc takes
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _saved_bytes(encoder: Encoder, rows: int, tokens: int, precision: str) -> int:
    """Bytes of the distinct tensors that autograd saves for a forward, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in encoder.model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros((rows, tokens), dtype=torch.int64, device=encoder.device)
    autocast = torch.autocast(encoder.device.type, torch.bfloat16, enabled=precision == "bf16")
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.compiler.set_stance("force_eager"), autocast, hooks:
        vectors = encoder.forward(ids, torch.ones_like(ids))
    del vectors
    return sum(saved.values())
