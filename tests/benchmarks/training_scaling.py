"""Two workers against one, and what they say to each other: real gloo processes over loopback."""

from __future__ import annotations

import functools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from figures import Figure, interleaved, median_figure
from training_processes import Group
from training_shards import SHORT, embedder, minilm, random_bert, real_rows, recipe_for, write_shards
from training_students import Training, show, slowest

from gist_ray.config import Recipe

# Collectives that reduce, with the place of the tensor that goes in.
_REDUCING = {
    "all_reduce": 0,
    "all_reduce_coalesced": 0,
    "reduce": 0,
    "reduce_scatter": 1,
    "reduce_scatter_tensor": 1,
    "_reduce_scatter_base": 1,
}


def with_train(recipe: Recipe, **train: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


def scaling_figures(quick: bool) -> list[Figure]:
    """Seconds of the same steps on one worker of one thread and on two, in turn.

    Beside them two single workers that know nothing of each other, at the same time: what the machine's cores take
    from each other (caches, memory, clock), which no way of dealing out the work could give back.
    """
    batch_size, batches, repeats = (16, 1, 1) if quick else (256, 2, 7)
    rows = real_rows(SHORT, batch_size * batches)
    recipe = recipe_for("scaling", str(minilm()), train={"batch_size": batch_size})
    write_shards(recipe, rows, embedder(str(minilm())))
    figures = []
    with Group(Training, recipe, threads=1) as alone, Group(Training, recipe, threads=1) as other:
        alone.turn("warm")
        other.turn("warm")
        for stage in (0,) if quick else (0, 1, 2):
            with Group(Training, with_train(recipe, zero_stage=stage), size=2, threads=1) as both:
                both.turn("warm")
                runs = interleaved(
                    repeats if stage == 0 else 1,
                    one=lambda: epoch_seconds("1 worker", alone),
                    two=lambda group=both, name=stage: epoch_seconds(f"2 workers, ZeRO {name}", group),
                    beside=lambda: beside_each_other(alone, other),
                )
            efficiency = [one / (2 * two) for one, two in zip(runs["one"], runs["two"], strict=True)]
            machine = [one / beside for one, beside in zip(runs["one"], runs["beside"], strict=True)]
            what = f"2 workers / 1 worker, 1 thread each, batch {batch_size}, e-SNLI, ZeRO {stage}"
            figures += [
                median_figure(f"{what}: seconds per row, 1 worker", runs["one"], "s"),
                median_figure(f"{what}: seconds per row, 2 workers", runs["two"], "s"),
                median_figure(f"{what}: efficiency", efficiency, "", ">= 0.9" if stage == 0 else None),
                median_figure(f"{what}: two single workers beside each other / 1 worker", machine, ""),
            ]
    return figures


def beside_each_other(one: Group, other: Group) -> float:
    """Seconds per row of an epoch, of the slower of two single workers at the same time."""
    with ThreadPoolExecutor(2) as threads:
        return max(threads.map(functools.partial(epoch_seconds, "1 worker beside another"), (one, other)))


def epoch_seconds(name: str, group: Group) -> float:
    """Seconds per row of an epoch, of the slowest worker."""
    turn = slowest(group.turn("epoch"))
    show(name, turn)
    return turn.seconds / turn.rows


# Reductions ----------------------------------------------------------------------------------------------------------


class CountedSteps:
    """Steps of one recipe after another, with every collective counted."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._sent: list[tuple[str, int]] = []
        for name, place in _REDUCING.items():
            if hasattr(dist, name):
                setattr(dist, name, self._counted(name, getattr(dist, name), place))

    def __call__(self, recipe: Recipe) -> tuple[list[tuple[str, int]], int, float]:
        """What a step's collectives reduced, (name, numbers) each; trainable numbers; share of tokens recomputed."""
        training = Training(self._rank, self._world_size, recipe)
        trained = [p for p in training.engine.module.parameters() if p.requires_grad]
        numbers = sum(getattr(p, "ds_numel", p.numel()) for p in trained)
        training("step")
        self._sent.clear()
        turn = training("step")
        return list(self._sent), numbers, turn.recomputed_share

    def _counted(self, name: str, collective: Any, place: int) -> Any:
        def counted(*arguments: Any, **named: Any) -> Any:
            tensors = arguments[place] if len(arguments) > place else next(iter(named.values()))
            tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
            self._sent.append((name, sum(tensor.numel() for tensor in tensors)))
            return collective(*arguments, **named)

        return counted


def reduction_figures(quick: bool) -> list[Figure]:
    """How often a step of two workers reduces its gradients: numbers reduced / trainable numbers."""
    rows = real_rows(SHORT, 64)
    student = random_bert("tiny", 2, 32, 2)
    recipe = recipe_for("reductions", student, student={"path": student}, train={"batch_size": 16, "chunk_tokens": 256})
    write_shards(recipe, rows, embedder(student))
    figures = []
    with Group(CountedSteps, size=2, threads=1) as workers:
        for stage in (0, 1, 2, 3):
            for memory, how in ((None, "activations kept"), (0, "GradCache")):
                sent, numbers, recomputed = workers.turn(with_train(recipe, zero_stage=stage, activation_mb=memory))[0]
                assert (recomputed > 0) == (memory == 0), "GradCache is not what it should be"
                large = Counter(name for name, count in sent if count >= numbers / 100)
                print(f"  ZeRO {stage}, {how}: {dict(large)} of {len(sent)} reducing collectives, {numbers:,} numbers")
                name = f"gradient reductions per step, 2 workers, ZeRO {stage}, {how}"
                # Norms and the vectors' gradients are small; ZeRO pads what it scatters, by less than a hundredth.
                reduced = sum(count for _, count in sent if count >= numbers / 100) / numbers
                figures.append(Figure(name, np.round(reduced, 2), "x", "== 1"))
    return figures
