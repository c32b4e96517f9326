"""Store: the one writer of a report's files. Every file appears whole, by rename, a task's result last."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gist_ray.evaluation.eval_task import EvalTask
from gist_ray.evaluation.hub_tasks import Average
from gist_ray.evaluation.items import Items, read_items
from gist_ray.evaluation.unit import ModelName, UnitResult
from gist_ray.manifest import write_json, write_whole


class Store:
    """Files of one model in a report directory.

    `results/<org>__<model>/<revision>/<Task>.json` is MTEB's tree, ready to be submitted; `predictions/` what was
    predicted, as MTEB writes it; `items/` what scores are made of, for comparisons; `notes/` remarks;
    `costs/` what each took; `trained-on/` how many of its texts the model was trained on.
    """

    def __init__(self, output: Path, model: ModelName) -> None:
        self.output, self.model = output, model
        self.folder = output / "results" / model.name.replace("/", "__") / model.revision

    def result(self, task: EvalTask) -> Any:
        """The stored `TaskResult` of a task on this very data and mteb version, or None."""
        stored = self._stored(task.name)
        if stored is None or stored.mteb_version != version("mteb"):
            return None
        return stored if stored.dataset_revision == task.revision else None

    def add(self, task: EvalTask, unit: UnitResult) -> None:
        """Keep what a unit found."""
        _write(self.output / "predictions" / f"{task.name}_predictions.json", unit.predictions)
        items = items_file(self.output, task.name)
        items.parent.mkdir(parents=True, exist_ok=True)
        items.unlink(missing_ok=True)
        if unit.items is not None:
            unit.items.write(items)
        _write(self._notes(task.name), json.dumps(list(unit.notes)).encode())
        _write(self._cost(task.name), json.dumps(unit.cost.to_json()).encode())
        _write(self._seen(task.name), json.dumps(unit.seen).encode())
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "model_meta.json", unit.meta)
        _write(self.folder / f"{task.name}.json", unit.result.encode())

    def add_average(self, average: Average) -> float | None:
        """Keep the result of an average, from those of its parts; None while one is missing."""
        parts = [self._stored(part) for part in average.parts]
        if None in parts:
            return None
        combined = average.task.combine_task_results(parts)
        _write(self.folder / f"{average.name}.json", json.dumps(combined.to_dict(), indent=2, default=str).encode())
        return float(combined.get_score())

    def notes(self, task: EvalTask) -> list[str]:
        """Remarks on a stored result."""
        try:
            notes: list[str] = json.loads(self._notes(task.name).read_text(encoding="utf-8"))
        except OSError:
            return []
        return notes

    def cost(self, task: EvalTask) -> dict[str, Any] | None:
        """What a stored result took (see `Cost.to_json`); None: it was not measured."""
        try:
            cost: dict[str, Any] = json.loads(self._cost(task.name).read_text(encoding="utf-8"))
        except OSError:
            return None
        return cost

    def seen(self, task: EvalTask) -> dict[str, list[int]] | None:
        """Of a stored result: see `training_texts.Seen`. None: the training texts were not known."""
        try:
            seen: dict[str, list[int]] | None = json.loads(self._seen(task.name).read_text(encoding="utf-8"))
        except OSError:
            return None
        return seen

    def _stored(self, name: str) -> Any:
        from mteb.results import TaskResult

        file = self.folder / f"{name}.json"
        return TaskResult.from_disk(file) if file.is_file() else None

    def _notes(self, name: str) -> Path:
        return self.output / "notes" / f"{name}.json"

    def _seen(self, name: str) -> Path:
        return self.output / "trained-on" / f"{name}.json"

    def _cost(self, name: str) -> Path:
        return self.output / "costs" / f"{name}.json"


def items_file(output: Path, task: str) -> Path:
    """Where a report keeps the items of a task."""
    return output / "items" / f"{task}.json"


def stored_items(output: Path, task: str) -> Items | None:
    """Items of a task in a report, or None: not scored, or of a kind without items."""
    file = items_file(output, task)
    return read_items(file) if file.is_file() else None


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, content)
