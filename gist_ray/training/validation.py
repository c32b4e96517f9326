"""Validation: rows held out of training, how a student ranks their positives, and the score of each checkpoint.

Ray Train scores checkpoints while training goes on (`ray_validation`), and the best one is the result
(`best_checkpoint`). Development data only: nothing that models are evaluated on is read here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gist_ray.config import Recipe
from gist_ray.data.shards import NO_LABEL, Shards, Triplets
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.metrics import add_validation
from gist_ray.training.checkpoint import trained_student

log = logging.getLogger(__name__)

Ids = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]

SCORE = "score"
UNSCORED = -1.0
"""What a checkpoint is reported with: without any `score` Ray Train logs an error each time that it compares two."""

_CUT = 10  # nDCG@10
# Cosines of fp32 unit vectors that differ by less are rounding, which changes with threads and batches: ties.
_TIE = 1e-6
_TILE_ROWS, _TILE_CANDIDATES = 1024, 4096  # some 50 MB for similarities and masks, however many rows there are


def held_out_rows(triplets: Triplets, rows: int, seed: int) -> Ids:
    """Row numbers to validate on, ascending, `[min(rows, len(triplets))]`. A function of the arguments alone.

    Each task gives rows in proportion to its size, and at least one where there are as many rows as tasks. Within a
    task queries are drawn at random and give all their rows: a query must leave training whole (`training_weights`),
    so rows of few queries cost little more than themselves. Only the last query drawn may be cut.
    """
    quotas = _quotas(np.bincount(triplets.task), rows)
    turn = np.random.default_rng(seed).permutation(_num_texts(triplets))
    order = np.lexsort((turn[triplets.query], triplets.task))
    task = triplets.task[order]
    sizes = np.bincount(task)
    place = np.arange(len(task)) - (np.cumsum(sizes) - sizes)[task]
    return np.sort(order[place < quotas[task]])


def training_weights(triplets: Triplets, held_out: Ids, weights: npt.NDArray[Any] | None = None) -> Weights:
    """How often an epoch shows each row, `[rows]`: `weights` (None: once), but 0 for what must not be trained on.

    That is every row which holds the query of a held-out row as its query or its positive, in any task: the held-out
    pair itself, also turned round, and other positives of that query, which would draw the query to where its held-out
    positive is. What a score then measures is queries that no gradient has pulled anywhere.

    Rows that share only the positive stay. One answer may stand in hundreds of rows, and all of them would be
    lost for one held-out row. Their own queries are drawn to it, and an unseen query that follows them there is what
    training is for. So the score is of new queries, not of new answers. Texts are told apart by their exact bytes:
    near-duplicates of a held-out query can be trained on.

    Raises:
        InputError: more than half of the rows would be lost.
    """
    asked = _asked(triplets, held_out)
    lost = asked[triplets.query] | asked[triplets.positive]
    total = int(lost.sum())
    if 2 * total > len(triplets):
        raise InputError(
            f"validation.rows {len(held_out)} takes {total} of the {len(triplets)} rows from training, more than half; "
            "lower it"
        )
    log.info(
        "validation: %d rows held out; %d more with the same queries are not trained on either",
        len(held_out),
        total - len(held_out),
    )
    kept = np.ones(len(triplets)) if weights is None else np.array(weights, dtype=np.float64)
    kept[lost] = 0
    return kept


@dataclass(frozen=True)
class Score:
    """How a student ranks the positives of held-out rows."""

    ranks: Ids
    """Place of each row's positive among the candidates of its query, from 1, `[rows]`."""
    candidates: Ids
    """Candidates that each positive is ranked among, itself not counted, `[rows]`."""
    task: Ids
    """`[rows]`."""

    @property
    def ndcg_at_10(self) -> float:
        """Mean nDCG@10 over the rows, each with one relevant text."""
        return float(_gains(self.ranks).mean())

    def metrics(self, tasks: Sequence[str]) -> dict[str, float]:
        """What is attached to a checkpoint. Finite numbers, as Ray's snapshot of a run cannot hold others.

        `score` chooses the best checkpoint. `score/<task>` stand beside it where there are several tasks.
        """
        found = {
            SCORE: self.ndcg_at_10,
            "mrr": float((1 / self.ranks).mean()),
            "accuracy_at_1": float((self.ranks == 1).mean()),
            "validation_rows": float(len(self.ranks)),
            "validation_candidates": float(self.candidates.mean()),
        }
        if len(tasks) > 1:
            gains = _gains(self.ranks)
            found |= {f"{SCORE}/{tasks[i]}": float(gains[self.task == i].mean()) for i in np.unique(self.task).tolist()}
        return found


def score(encoder: Encoder, shards: Shards, rows: Ids, batch_tokens: int | None = None) -> Score:
    """Rank the positive of each of `rows` among all positives and negatives of these rows.

    A candidate of row (q, p) does not count, as in the loss, when the guide scores it strictly above guide(q, p), and
    when it is known to be right: q itself, any text that stands with q as a pair in some row, held out or not, and any
    that bears q's label.
    What is left and not below p counts as above it, not-a-numbers included: a student that gives all texts one vector
    is last everywhere.

    `batch_tokens`: padded tokens per forward, None: what suits the device. Each distinct text is embedded once; memory
    grows with the texts, never with their pairs.
    """
    triplets = shards.triplets
    held = triplets.chosen(rows)
    candidates = np.unique(np.concatenate([held.positive, held.negatives]))
    texts = np.unique(np.concatenate([held.query, candidates]))
    with torch.inference_mode():
        student = encoder.embed(shards.texts.tokens(texts), batch_tokens=batch_tokens).float().cpu()
        guide = torch.from_numpy(shards.texts.guide(texts))
        query, positive, places = (np.searchsorted(texts, ids) for ids in (held.query, held.positive, candidates))
        right = [np.searchsorted(texts, ids) for ids in _known_pairs(triplets, rows, texts)]
        labels = None if shards.labels is None else shards.labels[texts]
        ranks, left = ranked(student, guide, query, positive, places, (right[0], right[1]), labels)
    return Score(ranks, left, held.task)


def ranked(
    student: Tensor,
    guide: Tensor,
    query: Ids,
    positive: Ids,
    candidates: Ids,
    known: tuple[Ids, Ids],
    labels: Ids | None = None,
) -> tuple[Ids, Ids]:
    """Rank of each row's positive, and the candidates it is ranked among, both `[rows]`.

    `student [texts, dim]` and `guide [texts, guide_dim]` have rows of unit norm, which all else points to: `query` and
    `positive [rows]`, distinct ascending `candidates [n]`, and `known`, the pairs (query, right text) that never count,
    ordered by query. Nor do candidates count that bear the query's of the `labels [texts]`.
    """
    ranks, left = np.ones(len(query), dtype=np.int64), np.zeros(len(query), dtype=np.int64)
    for start in range(0, len(query), _TILE_ROWS):
        tile = slice(start, start + _TILE_ROWS)
        q, p = query[tile], positive[tile]
        row, right = _right_texts(q, p, known)
        floor = (student[q] * student[p]).sum(-1, keepdim=True) - _TIE
        ceiling = (guide[q] * guide[p]).sum(-1, keepdim=True) + _TIE
        for first in range(0, len(candidates), _TILE_CANDIDATES):
            part = candidates[first : first + _TILE_CANDIDATES]
            counts = guide[q] @ guide[part].T <= ceiling
            column = np.minimum(np.searchsorted(part, right), len(part) - 1)
            here = part[column] == right
            counts[row[here], column[here]] = False
            if labels is not None:
                own = np.where(labels[q] == NO_LABEL, NO_LABEL - 1, labels[q])
                counts &= torch.from_numpy(own[:, None] != labels[part])
            left[tile] += counts.sum(1).numpy()
            counts &= ~(student[q] @ student[part].T < floor)  # not `>=`: it would rank a student of NaNs first
            ranks[tile] += counts.sum(1).numpy()
    return ranks, left


def ray_validation(recipe: Recipe, shards_dir: Path) -> Any:
    """Ray Train's `validation_config` for a recipe.

    The loop asks for each validation by `report(..., validation=ValidationTaskConfig(fn_kwargs={"step": step}))`. A
    resumed run makes up for those that its driver did not live to see.
    """
    import ray.train

    kwargs = {"recipe": recipe.model_dump(mode="json"), "shards": str(shards_dir)}
    # The task only waits for one of its own, so it needs no CPU. Ray Train 2.60 ends the whole run when a validation
    # dies otherwise than by a Python error: let Ray start it again however often its node is lost.
    return ray.train.ValidationConfig(
        fn=validate_checkpoint,
        task_config=ray.train.ValidationTaskConfig(fn_kwargs=kwargs),
        ray_remote_kwargs={"num_cpus": 0, "max_retries": -1},
    )


def validate_checkpoint(checkpoint: Any, *, step: int, recipe: dict[str, Any], shards: str) -> dict[str, float]:
    """Score a `ray.train.Checkpoint` in a process of its own, replaced up to `cluster.max_failures` times.

    Ray Train calls this in a task and merges what it returns into the checkpoint's metrics.

    Raises:
        RuntimeError: the process died each time. Ray Train then goes on, with this checkpoint unscored.
    """
    import ray
    from ray import exceptions

    # A CPU of its own if there is one. Where training workers hold them all it shares theirs: it would wait for the
    # end of training, and Ray keeps every checkpoint that is not scored yet.
    cpus = 1 if ray.available_resources().get("CPU", 0) >= 1 else 0
    task = ray.remote(num_cpus=cpus, max_retries=0)(score_checkpoint)
    attempts = 1 + Recipe.model_validate(recipe).cluster.max_failures
    for attempt in range(attempts):
        try:
            metrics: dict[str, float] = ray.get(task.remote(checkpoint, step, recipe, shards))
            return metrics
        except (exceptions.RayTaskError, exceptions.TaskCancelledError):
            raise
        except exceptions.RayError as error:
            log.warning("validation of %s died, %d of %d: %s", checkpoint.path, attempt + 1, attempts, error)
    raise RuntimeError(f"{attempts} processes died while they scored {checkpoint.path}; out of memory?")


def score_checkpoint(checkpoint: Any, step: int, recipe: dict[str, Any], shards: str) -> dict[str, float]:
    """Score the student in a `ray.train.Checkpoint`, and add the scores to the run's files.

    Those have one writer: Ray Train makes one validation at a time.
    """
    parsed = Recipe.model_validate(recipe)
    torch.set_num_threads(parsed.cluster.data_threads)
    with checkpoint.as_directory() as folder:
        student = trained_student(parsed, Path(folder))
    metrics: dict[str, float] = {}
    if parsed.validation.rows:
        opened = Shards.open(shards)
        rows = held_out_rows(opened.triplets, parsed.validation.rows, parsed.train.seed)
        metrics = score(student, opened, rows, parsed.validation.batch_tokens).metrics(opened.tasks)
    if parsed.validation.data:
        held_out = {"held_out_ndcg_at_10": metrics[SCORE]} if metrics else {}
        metrics |= held_out | task_metrics(student, Path(parsed.validation.data), parsed.validation.batch_tokens)
    add_validation(parsed.run_dir(), step, metrics)
    return metrics


def task_metrics(student: Encoder, data: Path, batch_tokens: int | None = None) -> dict[str, float]:
    """Main score of each local task of a folder, as `evaluate` gives it, and `score`, their mean."""
    from gist_ray.evaluation.pool import LocalPool
    from gist_ray.evaluation.tasks import local_tasks
    from gist_ray.evaluation.unit import ModelName, scored

    pool = LocalPool(student, batch_tokens)
    found = {task.name: scored(task, pool, ModelName("local/student", "0")).score for task in local_tasks(data)}
    return {f"{SCORE}/{name}": value for name, value in found.items()} | {SCORE: float(np.mean([*found.values()]))}


def best_checkpoint(result: Any) -> tuple[Any, dict[str, Any]]:
    """The checkpoint of a `ray.train.Result` with the highest score, the later one of equals, and its metrics.

    Ray's own `get_best_checkpoint` returns the earlier one of equals, which its retention may drop. Where no checkpoint
    was scored it is the last one, and its metrics have no score.
    """
    scored = [pair for pair in result.best_checkpoints or [] if pair[1].get(SCORE, UNSCORED) > UNSCORED]
    if not scored:
        log.warning("validation: no checkpoint was scored; taking the last one")
        return result.checkpoint, {name: value for name, value in (result.metrics or {}).items() if name != SCORE}
    best: tuple[Any, dict[str, Any]] = max(enumerate(scored), key=lambda item: (item[1][1][SCORE], item[0]))[1]
    return best


def _quotas(sizes: Ids, rows: int) -> Ids:
    """Rows of each task, `[tasks]`: largest remainders, after one for each task where there are enough."""
    rows = min(rows, int(sizes.sum()))
    some = (sizes > 0).astype(np.int64)
    quotas = some if rows >= some.sum() else np.zeros_like(some)
    sizes, left = sizes - quotas, rows - int(quotas.sum())
    shares = left * sizes
    total = max(1, int(sizes.sum()))
    quotas = quotas + shares // total
    quotas[np.argsort(-(shares % total), kind="stable")[: rows - int(quotas.sum())]] += 1
    return quotas


def _num_texts(triplets: Triplets) -> int:
    """Bound of the text ids in queries and positives."""
    return 1 + int(max(triplets.query.max(initial=-1), triplets.positive.max(initial=-1)))


def _asked(triplets: Triplets, rows: Ids) -> npt.NDArray[np.bool_]:
    """Which texts are queries of `rows`, `[texts]`."""
    asked = np.zeros(_num_texts(triplets), dtype=bool)
    asked[triplets.query[rows]] = True
    return asked


def _known_pairs(triplets: Triplets, rows: Ids, texts: Ids) -> tuple[Ids, Ids]:
    """Pairs (query of `rows`, text known to be right) of all rows, in either order, and of each query with itself.

    Only texts among `texts` (ascending) are named; ordered by query.
    """
    asked = _asked(triplets, rows)
    ahead, behind = np.flatnonzero(asked[triplets.query]), np.flatnonzero(asked[triplets.positive])
    queries = np.unique(triplets.query[rows])
    query = np.concatenate([triplets.query[ahead], triplets.positive[behind], queries])
    right = np.concatenate([triplets.positive[ahead], triplets.query[behind], queries])
    order = np.argsort(query, kind="stable")
    order = order[np.isin(right[order], texts)]
    return query[order], right[order]


def _right_texts(query: Ids, positive: Ids, known: tuple[Ids, Ids]) -> tuple[Ids, Ids]:
    """Pairs (row, text) that do not count for some rows: what is known of their queries, and their positives."""
    start, stop = (np.searchsorted(known[0], query, side=side) for side in ("left", "right"))
    counts = stop - start
    rows = np.repeat(np.arange(len(query)), counts)
    nth = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return (
        np.concatenate([rows, np.arange(len(query))]),
        np.concatenate([known[1][np.repeat(start, counts) + nth], positive]),
    )


def _gains(ranks: Ids) -> Weights:
    """nDCG@10 of each row, `[rows]`."""
    gains: Weights = np.where(ranks <= _CUT, 1 / np.log2(ranks + 1), 0.0)
    return gains
