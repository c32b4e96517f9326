"""What the quality study is trained and developed on: the shared training files, without any text of an evaluation set.

Everything is drawn with fixed seeds from the shared data, so the files are the same on every machine.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from gist_ray.tour import read_verses

Row = dict[str, Any]

# Rows of each set that are trained on, at most, for nine models to be trained in an hour of two cores. Most are of the
# task that gained least of what it should; a few hundred rows of the others were enough on development data.
LABELLED = {
    "Banking77Classification": 7_500,
    "EmotionClassification": 1_000,
    "AmazonCounterfactualClassification": 250,
    "TweetSentimentExtractionClassification": 800,
    "Clinc150Intent": 750,
}
PAIRED = {"esnli": 1_500, "quora": 750, "medquad": 250, "trivia": 2_500, "wikiqa": 250}
MORE = {"trivia": 8_000}  # of what is left of a paired set, for small students; without a number, all
MAX_WORDS = 90  # of a training text: MedQuAD's answers run to 1,500 characters
# A text in more rows than its task has batches makes batches of a row or two. One of MedQuAD's made fifty.
MAX_ROWS_OF_A_TEXT = 4
DEVELOPMENT_PER_LABEL = {"Banking77Classification": 26}  # of train files of tasks that have no validation file
DEVELOPMENT_ROWS = 2_000
LONG_DOCUMENTS = 1_500
KEPT = tuple(
    f"Dev{name}" for name in ("Verses", "Books", "Trivia", "Questions", "Medicine", "Long", "Entailment", "Graded")
)
"""All development tasks but those whose labels are trained on; of the first two no text is like those trained on."""
_SEED = 13


def normalised(text: str) -> str:
    """As the shared data's README counts texts as equal: lower case, letters and digits alone."""
    return " ".join(re.findall(r"\w+", text.lower()))


def read(file: Path) -> list[Row]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_lines(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file: Path, rows: Iterable[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def texts_of(value: Any) -> Iterator[str]:
    """Every string of a row, in lists too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)


def evaluation_texts(shared: Path) -> set[str]:
    """Every text that an evaluation set scores, normalised; labels and ids among them do no harm."""
    files = [file for file in sorted((shared / "eval").glob("*/*.jsonl.gz")) if not _is_for_training(file)]
    return {normalised(text) for file in files for row in read(file) for text in texts_of(row)}


def _is_for_training(file: Path) -> bool:
    return file.name.split(".")[0] in ("train", "validation")


class Draw:
    """Rows of one set in a fixed random order: each query once, no text in many of them, none of an evaluation set."""

    def __init__(self, name: str, rows: Iterable[Row], columns: tuple[str, ...], forbidden: set[str]) -> None:
        """Clean the rows; `removed` counts those that share a text with an evaluation set."""
        rows = [dict(row) for row in rows]
        order = np.random.default_rng([_SEED, *name.encode()]).permutation(len(rows))
        self.removed = 0
        self._rows: list[Row] = []
        self._columns = columns
        self._held_out: set[str] = set()
        queries: set[str] = set()
        times: Counter[str] = Counter()
        for place in order:
            row = {column: _cut(rows[place].get(column)) for column in columns}
            found = self._normalised(row)
            if any(text in forbidden for text in found):
                self.removed += 1
                continue
            whole = all(found) and len(set(found)) == len(found)
            if whole and found[0] not in queries and max(times[text] for text in found) < MAX_ROWS_OF_A_TEXT:
                queries.add(found[0])
                times.update(found)
                self._rows.append(row)

    def take(self, count: int) -> list[Row]:
        """The next rows, at most `count`; no other call gets them."""
        taken, self._rows = self._rows[:count], self._rows[count:]
        return taken

    def hold_out(self, count: int) -> list[Row]:
        """The next rows, for development; `take_apart` keeps away from their texts."""
        taken = self.take(count)
        self._held_out.update(text for row in taken for text in self._normalised(row))
        return taken

    def take_apart(self, count: int) -> list[Row]:
        """The next rows that share no text with one that was held out; they are still there for other calls."""
        return [row for row in self._rows if self._held_out.isdisjoint(self._normalised(row))][:count]

    def _normalised(self, row: Row) -> list[str]:
        return [normalised(row[column]) for column in self._columns if isinstance(row[column], str)]

    def take_per_label(self, count: int) -> list[Row]:
        """The next `count` rows of each label."""
        had: Counter[Any] = Counter()
        taken, left = [], []
        for row in self._rows:
            had[row["label"]] += 1
            (taken if had[row["label"]] <= count else left).append(row)
        self._rows = left
        return taken


def _cut(value: Any) -> Any:
    return " ".join(value.split()[:MAX_WORDS]) if isinstance(value, str) else value


def write_quality_data(shared: Path, folder: Path) -> dict[str, int]:
    """Write `labelled/`, `paired.jsonl`, `more.jsonl` and the tasks of `development/`.

    Returns how many rows of each set were left out for a text that they share with an evaluation set.
    """
    forbidden = evaluation_texts(shared)
    removed = {}
    for name, rows in LABELLED.items():
        source = Draw(name, read(shared / "eval" / name / "train.jsonl.gz"), ("text", "label"), forbidden)
        removed[name] = source.removed
        _write_development(shared, folder / "development", name, source, forbidden)
        task = [row | {"task_name": name} for row in source.take(rows)]
        write(folder / "labelled" / f"{name}.jsonl", task)
    pairs: list[Row] = []
    more: list[Row] = []
    for name, rows in PAIRED.items():
        table = pq.read_table(shared / "train" / f"{name}.parquet").to_pylist()
        source = Draw(name, table, ("query", "pos", "neg"), forbidden)
        removed[name] = source.removed
        held_out = _PAIRED_DEVELOPMENT.get(name)
        if held_out:
            held_out(folder / "development", source)
        pairs += [row | {"task_name": name} for row in source.take(rows)]
        if name == "medquad":
            _write_long(folder / "development/DevLong", source, table)
        more += [row | {"task_name": name} for row in source.take_apart(MORE.get(name, len(table)))]
    write(folder / "paired.jsonl", pairs)
    write(folder / "more.jsonl", more)
    _write_verses(folder / "development")
    return removed


def _write_verses(folder: Path) -> None:
    """Find a verse's other translation; tell a verse's book."""
    verses = [verse for verse in read_verses() if len(verse.web.split()) <= MAX_WORDS]
    order = np.random.default_rng(_SEED).permutation(len(verses)).tolist()
    found = [verses[i] for i in order[:3_000]]
    write_retrieval(folder / "DevVerses", [v.web for v in found], [(i, v.ylt) for i, v in enumerate(found[:500])])
    books: dict[int, list[str]] = {}
    for i in order[3_000:]:
        books.setdefault(verses[i].book, []).append(verses[i].web)
    for split, part in (("train", slice(0, 20)), ("test", slice(20, 60))):
        some = [
            {"text": text, "label": book} for book, texts in books.items() for text in texts[part] if len(texts) >= 60
        ]
        write(folder / "DevBooks" / f"{split}.jsonl", some)


def _write_long(folder: Path, source: Draw, table: list[Row]) -> None:
    """Find the rest of an answer, uncut, by its first sentence: a statement and the long text that bears it out."""
    uncut = {row["pos"][:200]: row["pos"] for row in table}
    found: list[tuple[str, str]] = []
    while len(found) < LONG_DOCUMENTS and (rows := source.hold_out(1)):
        [row] = rows
        first, _, rest = uncut.get(row["pos"][:200], "").partition(". ")
        if len(first.split()) >= 8 and len(rest.split()) >= MAX_WORDS:
            found.append((first, rest))
    found = list(dict(found).items())
    asked = [(i, first) for i, (first, _) in enumerate(found[:500])]
    write_retrieval(folder, [rest for _, rest in found], asked)


def _write_development(shared: Path, folder: Path, name: str, source: Draw, forbidden: set[str]) -> None:
    """Half of the held-out rows to train the classifier, half to test it. Too few of them: no task."""
    validation = shared / "eval" / name / "validation.jsonl.gz"
    if validation.is_file():
        held_out = Draw(f"dev-{name}", read(validation), ("text", "label"), forbidden).take(DEVELOPMENT_ROWS * 2)
    elif name in DEVELOPMENT_PER_LABEL:
        held_out = source.take_per_label(DEVELOPMENT_PER_LABEL[name])
    else:
        held_out = source.take(DEVELOPMENT_ROWS)
    if len(held_out) < 1_000:  # AmazonCounterfactual's 335
        return
    halves: tuple[list[Row], list[Row]] = ([], [])
    seen: Counter[Any] = Counter()
    for row in held_out:  # each label's rows go to the two halves by turns
        halves[seen[row["label"]] % 2].append(row)
        seen[row["label"]] += 1
    for split, rows in zip(("train", "test"), halves, strict=True):
        write(folder / f"Dev{name}" / f"{split}.jsonl", rows)


def _entailment(folder: Path, source: Draw) -> None:
    """Is the sentence entailed, or contradicted? And graded: entailed, of the same scene, of another."""
    rows = source.hold_out(600)
    pairs, graded = [], []
    for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
        pairs += [_pair(row["query"], row[column], label=label) for column, label in (("pos", 1), ("neg", 0))]
        scenes = ((row["pos"], 3.0), (row["neg"], 1.0), (other["pos"], 0.0))
        graded += [_pair(row["query"], sentence, score=score) for sentence, score in scenes]
    write(folder / "DevEntailment" / "test.jsonl", pairs)
    write(folder / "DevGraded" / "test.jsonl", graded)


def _pair(one: str, other: str, **truth: float) -> Row:
    return {"sentence1": one, "sentence2": other, **truth}


def _retrieval(name: str, documents: int, queries: int) -> Any:
    """Find the positive among those of all the held-out rows."""

    def made(folder: Path, source: Draw) -> None:
        rows = source.hold_out(documents)
        asked = [(i, row["query"]) for i, row in enumerate(rows[:queries])]
        write_retrieval(folder / name, [row["pos"] for row in rows], asked)

    return made


def write_retrieval(folder: Path, documents: list[str], asked: list[tuple[int, str]]) -> None:
    """A task: each query of `asked` has the place of its only document."""
    write(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(documents)])
    write(folder / "queries.jsonl", [{"_id": f"q{i}", "text": text} for i, text in asked])
    write(folder / "qrels.jsonl", [{"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i, _ in asked])


_PAIRED_DEVELOPMENT = {
    "esnli": _entailment,
    "quora": _retrieval("DevQuestions", 2_000, 1_000),
    "medquad": _retrieval("DevMedicine", 1_500, 400),
    "trivia": _retrieval("DevTrivia", 2_000, 500),
}
