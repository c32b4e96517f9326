"""Labels: those of a classification task as plain lists, which mteb and scikit-learn read many times."""

from __future__ import annotations

from typing import Any

from datasets import Dataset


class _Labelled(Dataset):  # type: ignore[misc]  # datasets has no types
    """A data set with one column that is a list.

    `datasets` 4 reads a column row by row each time that it is turned into an array or indexed, and mteb's
    classification tasks do that some thirty times an experiment: nearly all of the time that their scoring took.
    """

    _name: str
    _labels: list[Any]

    def __getitem__(self, key: Any) -> Any:
        return self._labels if key == self._name else super().__getitem__(key)


def list_labels(task: Any) -> None:
    """Make the label columns of a loaded mteb task lists; of a task without labels, do nothing."""
    name = getattr(task, "label_column_name", None)
    if isinstance(name, str):
        task.dataset = _listed(task.dataset, name)


def _listed(data: Any, name: str) -> Any:
    """`data`, any nesting of dictionaries, with each data set that has the column replaced."""
    if isinstance(data, dict):
        return type(data)({key: _listed(value, name) for key, value in data.items()})
    if type(data) is not Dataset or name not in data.column_names:
        return data
    labelled = _Labelled(data.data, data.info, data.split, data._indices, data._fingerprint)
    labelled._name, labelled._labels = name, data[name][:]
    return labelled
