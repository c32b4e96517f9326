"""EvalTask: one task that models are scored on, as a description that other processes can make the task from."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb

from gist_ray.errors import InputError
from gist_ray.evaluation.labels import list_labels


@dataclass(frozen=True)
class EvalTask:
    """One task that a model can be scored on. Can be sent to other processes."""

    name: str
    type: str
    main_metric: str
    revision: str
    """Of the data: content hash of local files, commit of a Hub dataset."""
    make: Callable[[], Any]
    """A fresh mteb task. mteb tasks hold random generators with state: one object is good for one run."""
    cost: float
    """About how many characters there are to embed; for the order of tasks alone."""
    folder: Path | None = None
    """Of a local task."""

    def loaded(self) -> tuple[Any, tuple[str, ...]]:
        """The mteb task with its data, and what a reader of the score must know about that.

        Raises:
            InputError: a bad row in a local file, or data that cannot be had from the Hub.
        """
        task = self.make()
        try:
            task.load_data()
        except InputError:
            raise
        except Exception as error:  # the hub client raises dozens of types; each means "not to be had"
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"the data of task {self.name} cannot be had from the Hub ({reason}); "
                "check the network, or put the task's files in a folder and give that as data"
            ) from error
        list_labels(task)
        return task, tuple(getattr(task, "notes", ()))


def mteb_class(name: str) -> Any:
    """The class of an MTEB task, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # renamed and superseded tasks warn; the name was chosen on purpose
        try:
            return type(mteb.get_task(name))
        except KeyError:
            return None
