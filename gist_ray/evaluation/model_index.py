"""Model index: scores as the metadata of a model card, which the Hub reads from the head of a README."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

from gist_ray.evaluation.eval_task import EvalTask, mteb_class
from gist_ray.manifest import write_whole

if TYPE_CHECKING:
    from gist_ray.evaluation.store import Store

MODEL_INDEX = "model-index.yml"


def write_model_index(store: Store, tasks: list[EvalTask]) -> None:
    """Write `model-index.yml`, to be pasted between the `---` lines of a README; none where MTEB knows no task.

    Entries are mteb's own, of its result files, with scores from 0 to 1. Of local data, which may not be the Hub's, the
    data set is `local/<task>` at the content hash of the files.
    """
    from huggingface_hub import ModelCardData

    found = [entry for task in tasks for entry in _entries(store, task)]
    file = store.output / MODEL_INDEX
    if not found:
        file.unlink(missing_ok=True)  # of an earlier run
        return
    card = ModelCardData(model_name=store.model.name, eval_results=found, tags=["mteb"])
    write_whole(file, f"{card.to_yaml()}\n".encode())


def _entries(store: Store, task: EvalTask) -> list[Any]:
    """Of each split and subset of a scored task, an `EvalResult` of huggingface_hub."""
    result = store.result(task)
    if result is None or mteb_class(task.name) is None:  # mteb describes only tasks that it knows
        return []
    with warnings.catch_warnings():
        # Deprecated for a form that the Hub shows only with data sets that list the task in an eval.yaml.
        warnings.simplefilter("ignore", DeprecationWarning)
        entries = result.get_hf_eval_results()
    if task.folder is None:
        return list(entries)
    data = {"dataset_type": f"local/{task.name}", "dataset_revision": task.revision}
    return [dataclasses.replace(entry, **data) for entry in entries]
