"""Rows: a raw row becomes a triplet, a labelled text, or a reject with its reason."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

from gist_ray.config import DataConfig, SourceConfig
from gist_ray.data.formats import Reject

ROLES = ("query", "pos", "neg")
TASK_KEYS = ("task_name", "task_type", "task_id")
"""The second is the model card's name of the first, the third raw MEDI's."""
LABEL_KEYS = ("label_text", "label")


@dataclass(frozen=True)
class Triplet:
    """One valid row. `negatives` may be empty."""

    query: str
    positive: str
    negatives: tuple[str, ...]
    task: str
    label: str | None = None
    """What query and positive are both known to be: other texts of that label in the same task are no negatives."""


@dataclass(frozen=True)
class Labelled:
    """One labelled text, to mine from."""

    text: str
    label: str
    task: str


def their_columns(source: SourceConfig, ours: str) -> tuple[str, ...]:
    """The source's columns that are our column `ours`."""
    named = source.columns.get(ours, ours)
    return (named,) if isinstance(named, str) else named


@dataclass(frozen=True)
class TextRow:
    """One text to embed, and the raw row that it stood in."""

    text: str
    row: dict[str, Any]


def text_row(row: Any, column: str) -> TextRow | Reject:
    """The text of a raw row's `column`, or a reject. Any text will do that has more than white space."""
    if isinstance(row, Reject):
        return row
    if not isinstance(row, dict):
        return Reject(f"row is a {type(row).__name__}, not an object", row)
    text = row.get(column)
    if not isinstance(text, str):
        return Reject(
            f"{column} is missing" if text is None else f"{column} is not a string ({type(text).__name__})", row
        )
    problem = text_problem(text)
    return Reject(f"{column} {problem}", row) if problem else TextRow(text, row)


def text_problem(text: str) -> str | None:
    """What is wrong with a text to embed, None if nothing is."""
    if not text or text.isspace():
        return "is empty"
    return None if is_unicode(text) else "is not valid Unicode"


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: bad bytes have become lone surrogates, which cannot."""
    if text.isascii():  # only looks at a flag, encode at each character
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class _Parser(ABC):
    """What both kinds of rows have in common: their shape, and the task."""

    def __init__(self, source: SourceConfig, max_chars: int) -> None:
        self._override, self._max_chars = source.task_name, max_chars
        self._task_keys = their_columns(source, "task_name") if "task_name" in source.columns else TASK_KEYS
        self._selected = re.compile(source.tasks).search if source.tasks else None
        self._sound_task: str | None = None

    def __call__(self, row: Any) -> Any:
        """The parsed row, a `Reject`, or None where the row is of a task that is not selected."""
        problem = None
        if isinstance(row, dict):
            task, problem = self._task(row)
        else:
            task = self._override
        if self._selected and task is not None and not self._selected(task):
            return None
        if isinstance(row, Reject):
            return replace(row, task=task)
        if not isinstance(row, dict):
            return Reject(f"row is a {type(row).__name__}, not an object", row, task)
        parsed = problem or self._parse(row, task or "")
        return Reject(parsed, row, task) if isinstance(parsed, str) else parsed

    @abstractmethod
    def _parse(self, row: dict[str, Any], task: str) -> Any:
        """The parsed row, or the reason against it."""

    def _task(self, row: dict[str, Any]) -> tuple[str | None, str | None]:
        """The task of a row and None, or None and the reason why there is none."""
        if self._override:
            return self._override, None
        for key in self._task_keys:
            found = row.get(key)
            if found is None or found == "":
                continue
            task = _as_name(found)
            if task is None:
                return None, f"{key} is not a string ({type(found).__name__})"
            if task != self._sound_task:  # rows of a task mostly lie together
                if problem := self._problem(task, key):
                    return None, problem
                self._sound_task = task
            return task, None
        return "default", None

    def _problem(self, text: str, role: str) -> str | None:
        """What is wrong with a text."""
        if not text or text.isspace():
            return f"{role} is empty"
        if len(text) > self._max_chars:
            return f"{role} has more than {self._max_chars} characters"
        if "\0" in text:
            return f"{role} contains a NUL character"
        return None if is_unicode(text) else f"{role} is not valid Unicode"


class TripletParser(_Parser):
    """Rows in the seven-column schema, or raw MEDI (`[instruction, text]` in each role)."""

    def __init__(self, source: SourceConfig, data: DataConfig) -> None:
        super().__init__(source, data.max_chars)
        self._columns = {role: their_columns(source, role) for role in ROLES}
        self._instruct = {role: their_columns(source, f"{role}_instruct")[0] for role in data.instructions}
        self._query, self._pos = self._columns["query"][0], self._columns["pos"][0]
        self._label = their_columns(source, "query_label")[0]
        self._plain_neg = None if len(self._columns["neg"]) > 1 or self._instruct else self._columns["neg"][0]

    def _parse(self, row: dict[str, Any], task: str) -> Triplet | str:
        found, label = self._unlabelled(row, task), row.get(self._label)
        if isinstance(found, str) or _is_missing(label):
            return found
        name = _as_name(label)
        if name is None:
            return f"query_label is neither a string nor a whole number ({type(label).__name__})"
        return self._problem(name, "query_label") or replace(found, label=name)

    def _unlabelled(self, row: dict[str, Any], task: str) -> Triplet | str:
        query, positive = row.get(self._query), row.get(self._pos)
        if self._plain_neg and type(query) is str and type(positive) is str:
            neg = row.get(self._plain_neg)
            if neg is None or type(neg) is str:  # by far the most rows
                negatives = (neg,) if neg else ()
                problem = self._problem(query, "query") or self._problem(positive, "pos")
                problem = problem or (self._problem(neg, "neg") if neg else None)
                return problem or _triplet(query, positive, negatives, task)
        texts: dict[str, list[str]] = {}
        medi = isinstance(query, list)
        for role in ROLES:
            found = self._texts(row, role, medi)
            if isinstance(found, str):
                return found
            texts[role] = found
        return _triplet(texts["query"][0], texts["pos"][0], tuple(dict.fromkeys(texts["neg"])), task)

    def _texts(self, row: dict[str, Any], role: str, medi: bool) -> list[str] | str:
        """The texts of a role, instructions in front where they are wanted, or the reason why there are none."""
        cells = _cells([row.get(name) for name in self._columns[role]], role, medi)
        if isinstance(cells, str):
            return cells
        if problem := next(filter(None, (self._problem(text, role) for _, text in cells)), None):
            return problem
        if role not in self._instruct:
            return [text for _, text in cells]
        instruct = row.get(self._instruct[role]) or ""
        if not isinstance(instruct, str):
            return f"{role}_instruct is not a string ({type(instruct).__name__})"
        whole = [f"{own or instruct} {text}" if own or instruct else text for own, text in cells]
        return next(filter(None, (self._problem(text, role) for text in whole)), None) or whole


class LabelledParser(_Parser):
    """Rows of `text` and `label_text` or `label`."""

    def __init__(self, source: SourceConfig, max_chars: int) -> None:
        super().__init__(source, max_chars)
        self._text = their_columns(source, "text")[0]
        self._labels = their_columns(source, "label") if "label" in source.columns else LABEL_KEYS

    def _parse(self, row: dict[str, Any], task: str) -> Labelled | str:
        text = row.get(self._text)
        if not isinstance(text, str):
            return "text is missing" if text is None else f"text is not a string ({type(text).__name__})"
        found = next((v for key in self._labels if not _is_missing(v := row.get(key))), None)
        if found is None:
            return "label is missing"
        label = _as_name(found)
        if label is None:
            return f"label is neither a string nor a whole number ({type(found).__name__})"
        return self._problem(text, "text") or self._problem(label, "label") or Labelled(text, label, task)


def _triplet(query: str, positive: str, negatives: tuple[str, ...], task: str) -> Triplet | str:
    if query == positive:
        return "pos equals query"
    if query in negatives or positive in negatives:
        return f"neg equals {'query' if query in negatives else 'pos'}"
    return Triplet(query, positive, negatives, task)


def _cells(values: list[Any], role: str, medi: bool) -> list[tuple[str, str]] | str:
    """(instruction, text) pairs of a role, or the reason why there are none. `medi`: each text is such a pair."""
    if role == "neg":
        values = _negatives(values, medi)
    elif values[0] is None:
        return f"{role} is missing"
    cells: list[tuple[str, str]] = []
    for part in values:
        if medi and isinstance(part, list) and len(part) == 2 and all(isinstance(text, str) for text in part):
            cells.append((part[0].strip(), part[1].strip()))
        elif isinstance(part, str) and not medi:
            cells.append(("", part))
        else:
            return f"{role} is not a string ({type(part).__name__})"
    return cells


def _negatives(values: list[Any], medi: bool) -> list[Any]:
    """Columns of negatives, each a text or a list of texts, as one list. Empty ones among several are left out."""
    if len(values) > 1:
        values = [value for value in values if not _is_missing(value)]
    flat: list[Any] = []
    for value in values:
        if isinstance(value, list) and (not medi or not value or isinstance(value[0], list)):
            flat += value
        elif value is not None and value != "":
            flat.append(value)
    return flat


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _as_name(value: Any) -> str | None:
    """A task or label as text. Whole numbers are names too, also where a table holds them as floats."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return str(value)
    return str(int(value)) if isinstance(value, float) and value.is_integer() else None
