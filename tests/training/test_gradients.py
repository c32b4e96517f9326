from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from gist_ray.training.gradients import FlatGradients
from tests.training.workers import on_workers


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(2, 2))
    made[2].requires_grad_(False)
    return made


def averaged(rank: int, world_size: int) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    """Mean gradients after two backward passes in each of two steps; the same by hand; all-reduces of a step."""
    network, calls = model(), 0
    gradients = FlatGradients(network)
    original = dist.all_reduce

    def counted(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        return original(*arguments, **options)

    dist.all_reduce = counted
    for step in range(2):
        network.zero_grad()
        gradients.attach()
        for part in range(2):
            network(torch.full((4, 3), 1.0 + rank + 10 * part + 100 * step)).square().sum().backward()
        before = calls
        gradients.average()
    found = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    assert all(p.grad is None for p in network[2].parameters())
    plain = model()
    for worker in range(world_size):
        for part in range(2):
            plain(torch.full((4, 3), 1.0 + worker + 10 * part + 100)).square().sum().backward()
    return found, [p.grad / world_size for p in plain.parameters() if p.grad is not None], calls - before


def test_gradients_of_all_passes_and_workers_are_averaged_by_one_sum():
    for world_size in (1, 2):
        for found, expected, calls in on_workers(world_size, averaged):
            assert calls == (1 if world_size > 1 else 0)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)
