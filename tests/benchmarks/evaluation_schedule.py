"""How long `MTEB(eng, v1)` takes on N workers, by the texts that mteb's own statistics count: simulated, not run."""

from __future__ import annotations

import heapq
from collections import deque

from figures import Figure

from gist_ray.evaluation.hub_tasks import benchmark_tasks
from gist_ray.evaluation.mteb_encoder import _SLICE_DOCUMENTS
from gist_ray.evaluation.pool import _FORWARDS_PER_CHUNK
from gist_ray.evaluation.schedule import MORE_THAN_ACTORS, largest_first

CHUNK_CHARACTERS = _FORWARDS_PER_CHUNK * 32_768 * 4
"""Of a GPU's forwards, at four characters a token."""
MEAN_CHARACTERS = 400
"""Of a document: how many a slice of a corpus holds."""
WORKERS = (1, 2, 4, 8, 16, 32, 64)


def seconds_by_tasks(costs: list[float], workers: int) -> float:
    """One task a worker, the dearest first: what running tasks in parallel gives."""
    ends = [0.0] * workers
    for cost in sorted(costs, reverse=True):
        heapq.heappush(ends, heapq.heappop(ends) + cost)
    return max(ends)


def seconds_by_chunks(costs: list[float], workers: int) -> float:
    """Chunks of several tasks at once, as the pool and the schedule do it.

    A task hands out its chunks slice by slice, the next slice when the last chunk of the one before has ended; the
    workers take a chunk of the task that has fewest at work. `workers + 2` tasks are at work at a time.
    """
    waiting, active, running = deque(costs), [], []
    now, free, number = 0.0, workers, 0
    while waiting or active:
        while waiting and len(active) < workers + MORE_THAN_ACTORS:
            active.append(Task(waiting.popleft()))
        while free and (ready := [task for task in active if task.chunks]):
            task = min(ready, key=lambda one: one.at_work)
            task.at_work, free, number = task.at_work + 1, free - 1, number + 1
            heapq.heappush(running, (now + task.chunks.pop(), number, task))
        now, _, task = heapq.heappop(running)
        task.at_work, free = task.at_work - 1, free + 1
        if not task.at_work and not task.chunks and not task.next_slice():
            active.remove(task)
    return now


class Task:
    """A task's chunks that are not handed out yet, of the slice it is at."""

    def __init__(self, cost: float) -> None:
        self._left, self.chunks, self.at_work = cost, [], 0
        self.next_slice()

    def next_slice(self) -> bool:
        """Whether there is one."""
        size = min(self._left, _SLICE_DOCUMENTS * MEAN_CHARACTERS)
        self._left -= size
        whole, rest = divmod(size, CHUNK_CHARACTERS)
        self.chunks = [CHUNK_CHARACTERS] * int(whole) + ([rest] if rest else [])
        return bool(self.chunks)


def schedule_figures(quick: bool) -> list[Figure]:
    """Efficiency on N workers: time of one / (N times the time of N)."""
    tasks, _ = benchmark_tasks("MTEB(eng, v1)")
    costs = [task.cost for task in largest_first(tasks, {})]
    total, figures = sum(costs), []
    print(f"  MTEB(eng, v1): {len(costs)} units, {total / 1e9:.2f} G characters of distinct texts")
    print("  workers   tasks in parallel   chunks of tasks")
    for workers in WORKERS:
        apart, together = seconds_by_tasks(costs, workers), seconds_by_chunks(costs, workers)
        rows = [total / (workers * seconds) for seconds in (apart, together)]
        print(f"  {workers:>7}   {total / apart:>6.2f}x  {rows[0]:>6.2f}    {total / together:>6.2f}x  {rows[1]:>6.2f}")
        goal = ">= 0.85" if workers == 32 else None
        figures.append(Figure(f"MTEB(eng, v1), simulated, {workers} workers: efficiency", rows[1], "", goal))
        figures.append(Figure(f"MTEB(eng, v1), simulated, {workers} workers: tasks in parallel", rows[0]))
    return figures
