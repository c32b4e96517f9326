"""Unit: one task scored by one model, in a worker process of its own."""

from __future__ import annotations

import json
import logging
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gist_ray.evaluation.any_pool import AnyPool
from gist_ray.evaluation.cost import Cost
from gist_ray.evaluation.eval_task import EvalTask
from gist_ray.evaluation.items import Items
from gist_ray.evaluation.training_texts import Seen, TrainingTexts


@dataclass(frozen=True)
class ModelName:
    """Under which results are kept."""

    name: str
    """`org/model`."""
    revision: str
    """Content hash."""


@dataclass(frozen=True)
class UnitResult:
    """What a unit found, as the one writer of results takes it."""

    result: str
    """MTEB's result file."""
    predictions: bytes
    """MTEB's file of predictions."""
    items: Items | None
    notes: tuple[str, ...]
    """What a reader of the score must know."""
    meta: dict[str, Any]
    """MTEB's description of the model."""
    score: float
    seconds: float
    """From start to end of mteb's evaluation, encoders that other tasks keep busy included."""
    cost: Cost
    seen: Seen | None
    """What of the task's texts the model was trained on; None: its training texts are not known."""


def ready() -> None:
    """Import what `scored` needs, which takes as long as a small task."""
    import sentence_transformers  # noqa: F401  # mteb does, at its first evaluation

    import gist_ray.evaluation.items
    import gist_ray.evaluation.mteb_encoder  # noqa: F401


def scored(task: EvalTask, pool: AnyPool, model: ModelName, trained_on: TrainingTexts | None = None) -> UnitResult:
    """Score a task. A task starts from its own random state, so it is as good the second time as the first.

    Raises:
        InputError: data that cannot be used or had.
    """
    import datasets
    import mteb

    from gist_ray.evaluation.items import items_of
    from gist_ray.evaluation.mteb_encoder import RayEncoder

    datasets.disable_progress_bars()
    logging.getLogger("mteb").setLevel(logging.ERROR)
    encoder = RayEncoder(pool, model.name, model.revision, trained_on)
    before, cpu_s = pool.spent.copy(), time.process_time()
    made, notes = task.loaded()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*superseded")
        outcome = mteb.evaluate(
            encoder,
            [made],
            cache=None,
            co2_tracker=False,
            encode_kwargs={"batch_size": 1024, "show_progress_bar": False},
            prediction_folder=Path(folder),
            show_progress_bar=False,
        )
        [result] = outcome.task_results
        file = Path(folder) / f"{task.name}_predictions.json"
        predictions = file.read_bytes() if file.is_file() else b"{}"
        result.to_disk(Path(folder) / "result.json")
        text = (Path(folder) / "result.json").read_text(encoding="utf-8")
    cost = pool.spent.since(before)
    cost.score_s = time.process_time() - cpu_s
    return UnitResult(
        result=text,
        predictions=predictions,
        items=items_of(made, result.scores, json.loads(predictions)),
        notes=notes,
        meta=json.loads(json.dumps(encoder.mteb_model_meta.to_dict(), default=str)),
        score=float(result.get_score()),
        seconds=float(result.evaluation_time or 0.0),
        cost=cost,
        seen=encoder.seen if trained_on is not None else None,
    )
