"""Processes that take turns: each case of a benchmark keeps its memory and settings to itself, and waits in between."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

_END = None


class Group:
    """`size` real workers, joined by gloo over loopback. A `with` block; the processes end with it.

    `build(rank, size, *arguments)` makes what a worker does at each turn; both must be importable. They start at
    once, and the first turn waits for them.
    """

    def __init__(self, build: Callable[..., Callable[..., Any]], *arguments: Any, size: int = 1, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._store = tempfile.TemporaryDirectory(prefix="gist-ray-group-")
        self._pipes, self._workers = [], []
        for rank in range(size):
            here, there = context.Pipe()
            given = (there, rank, size, threads, self._store.name, build, arguments)
            worker = context.Process(target=_work, args=given, daemon=True)
            worker.start()
            there.close()  # so that a worker's death ends the pipe
            self._pipes.append(here)
            self._workers.append(worker)

    def turn(self, *arguments: Any) -> list[Any]:
        """What each worker's case returns for `arguments`, in rank order."""
        for pipe in self._pipes:
            with suppress(BrokenPipeError):  # it failed before its turn; the answer says how
                pipe.send(arguments)
        return [_answer(pipe) for pipe in self._pipes]

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for worker in self._workers:
                worker.kill()  # it may wait for one that failed
        self.close()

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with suppress(BrokenPipeError):
                pipe.send(_END)
        for worker in self._workers:
            worker.join()
        self._store.cleanup()


def in_fresh_process(function: Callable[..., Any], *arguments: Any, threads: int) -> Any:
    """`function(*arguments)` in a process that did nothing before."""
    with Group(_Once, function, *arguments, threads=threads) as group:
        return group.turn()[0]


class PeakMemory:
    """Bytes by which the peak of resident memory rises above what is resident at the start of a `with` block."""

    def __enter__(self) -> PeakMemory:
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)  # else the block would begin with what others freed, at no cost
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here (man 5 proc)
        self._start, self.bytes = resident_bytes("VmRSS"), 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bytes = resident_bytes("VmHWM") - self._start


def resident_bytes(field: str) -> int:
    """`VmRSS`, resident memory now, or `VmHWM`, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


class _Once:
    def __init__(self, rank: int, size: int, function: Callable[..., Any], *arguments: Any) -> None:
        self._function, self._arguments = function, arguments

    def __call__(self) -> Any:
        return self._function(*self._arguments)


def _answer(pipe: Connection) -> Any:
    kind, value = pipe.recv()
    if kind == "error":
        raise RuntimeError(f"a worker of the benchmark failed:\n{value}")
    return value


def _work(
    pipe: Connection,
    rank: int,
    size: int,
    threads: int,
    store: str,
    build: Callable[..., Callable[..., Any]],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    sys.stdout = Path(os.devnull).open("w")  # DeepSpeed's log: an error comes back as an answer
    torch.set_num_threads(threads)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in names.items()})  # DeepSpeed reads them
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=size)
        case = build(rank, size, *arguments)
        while (order := pipe.recv()) is not _END:
            pipe.send(("value", case(*order)))
        dist.destroy_process_group()
    except (EOFError, KeyboardInterrupt):  # the parent is gone
        return
    except Exception:
        pipe.send(("error", traceback.format_exc()))
