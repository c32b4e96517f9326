"""Real process groups for tests: run a function on N gloo workers and collect what each returns."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_workers(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, world_size, *arguments)` on each of `world_size` processes, in rank order.

    The function must be importable, and what it returns picklable.
    """
    # One process imports what takes seconds, and the workers of all tests are forked from it.
    multiprocessing.set_forkserver_preload(["deepspeed", "gist_ray.training.student", "gist_ray.training.step"])
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _run, (world_size, folder, function, arguments), nprocs=world_size, start_method="forkserver"
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}  # DeepSpeed reads them
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(function(rank, world_size, *arguments), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
