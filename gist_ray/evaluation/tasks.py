"""Local tasks: folders of files, turned into mteb task objects.

A task is a folder of JSONL files (`.jsonl` or `.jsonl.gz`, one object a line). Its kind:

| files | columns | kind |
|---|---|---|
| test | sentence1, sentence2, score | STS |
| test | sentence1, sentence2, label (0 or 1) | pair classification |
| test | query, positive (list), negative (list) | reranking |
| train, test | text, label | classification |
| test | text, label | clustering |
| corpus, queries, qrels | (_id, title, text), (_id, text), (query-id, corpus-id, score) | retrieval |
"""

from __future__ import annotations

import functools
import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from mteb import abstasks
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata

from gist_ray.errors import InputError
from gist_ray.evaluation.eval_task import EvalTask, mteb_class
from gist_ray.manifest import digest_files, digest_of

Files = dict[str, Path]
Row = dict[str, Any]
_RETRIEVAL_FILES = ("corpus", "queries", "qrels")
_SPLITS = ("test", "validation", "dev", "train")


@dataclass(frozen=True)
class _Kind:
    base: type | tuple[type, ...]
    """mteb class; with several, the first is the one of a task MTEB does not know."""
    main_score: str
    columns: dict[str, str]


_PAIR = {"sentence1": "a string", "sentence2": "a string"}
_LABELLED = {"text": "a string", "label": "a whole number or a string"}
_CANDIDATES = {"query": "a string", "positive": "a list of strings", "negative": "a list of strings"}
_KINDS = {
    "STS": _Kind(abstasks.AbsTaskSTS, "cosine_spearman", {**_PAIR, "score": "a finite number"}),
    "PairClassification": _Kind(abstasks.AbsTaskPairClassification, "max_ap", {**_PAIR, "label": "0 or 1"}),
    "Reranking": _Kind(abstasks.AbsTaskRetrieval, "map_at_1000", _CANDIDATES),
    "Classification": _Kind(abstasks.AbsTaskClassification, "accuracy", _LABELLED),
    "Clustering": _Kind((abstasks.AbsTaskClustering, abstasks.AbsTaskClusteringLegacy), "v_measure", _LABELLED),
    "Retrieval": _Kind(abstasks.AbsTaskRetrieval, "ndcg_at_10", {}),
}
_DOCUMENT = {"_id": "a string", "text": "a string"}  # of corpus and queries
_JUDGEMENT = {"query-id": "a string", "corpus-id": "a string", "score": "a whole number"}

_IS: dict[str, Callable[[Any], bool]] = {
    "a string": lambda value: isinstance(value, str),
    "a list of strings": lambda value: isinstance(value, list) and all(type(item) is str for item in value),
    "a finite number": lambda value: type(value) in (int, float) and math.isfinite(value),
    "a whole number": lambda value: type(value) is int,
    "a whole number or a string": lambda value: type(value) in (int, str),
    "0 or 1": lambda value: type(value) is int and value in (0, 1),
}


def local_tasks(data: Path) -> list[EvalTask]:
    """The tasks of a folder of task folders (or of one task folder), sorted by name.

    A folder named like a task of MTEB becomes that very task (samples per label, experiments, main score) on
    the local data; any other name becomes a task of its kind with that name.

    Raises:
        InputError: no such folder, nothing in it, or files that are no task.
    """
    if not data.is_dir():
        raise InputError(f"data folder {data} does not exist; give a folder that holds one folder per task")
    if _files(data):
        return [_local_task(data)]
    folders = sorted(item for item in data.iterdir() if item.is_dir() and item.name[0] not in "._")
    if not folders:
        raise InputError(f"data folder {data} holds no tasks; expected one folder per task with JSONL files")
    return [_local_task(folder) for folder in folders]


def retrieval_qrels(folder: Path) -> dict[str, dict[str, int]]:
    """Relevance of documents by query id, `{query: {document: grade}}`, of a local retrieval task.

    Raises:
        InputError: no qrels file, or a bad row in it.
    """
    files = _files(folder)
    if "qrels" not in files:
        raise InputError(f"{folder} is no local retrieval task: it has no qrels.jsonl or qrels.jsonl.gz")
    qrels: dict[str, dict[str, int]] = {}
    for row in _rows(files["qrels"], _JUDGEMENT):
        qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = row["score"]
    return qrels


def _local_task(folder: Path) -> EvalTask:
    made = _local_class(folder)
    metadata = made.metadata
    revision = metadata.dataset["revision"]
    make = functools.partial(_made, folder)
    size = sum(file.stat().st_size for file in _files(folder).values())
    return EvalTask(folder.name, metadata.type, metadata.main_score, revision, make, float(size), folder=folder)


def _made(folder: Path) -> Any:
    """A fresh mteb task of a folder; a function that other processes can be told to call."""
    return _local_class(folder)()


def _local_class(folder: Path) -> Any:
    """A subclass of the mteb class that the folder's files are data of."""
    files = _files(folder)
    known = mteb_class(folder.name)
    kind = _kind(folder, files, known)
    revision = digest_of({name: digest_files([file]) for name, file in sorted(files.items())})
    metadata = _metadata(folder, kind, files, known, revision)
    bases = _KINDS[kind].base
    base = known or (bases[0] if isinstance(bases, tuple) else bases)
    load = {"Retrieval": _load_retrieval, "Reranking": _load_reranking}.get(kind, _load_tables)

    def load_data(self: Any, num_proc: int | None = None, **kwargs: Any) -> None:
        if not self.data_loaded:
            [subset] = metadata.hf_subsets
            self.dataset, items, notes = load(self, files)
            self.dataset, self.data_loaded = {subset: self.dataset}, True
            self.notes = [*notes, *_size_notes(known, subset, metadata.eval_splits[0], items)]

    # A subclass, not changes to an object: mteb drops an object's own metadata when it unloads its data.
    attributes: dict[str, Any] = {"metadata": metadata, "load_data": load_data, "__module__": __name__}
    if known is None and kind == "Clustering":
        attributes["max_fraction_of_documents_to_embed"] = None  # mteb's 4 % is meant for huge sets
    return type(base.__name__, (base,), attributes)


def _files(folder: Path) -> Files:
    """Data files by what they are; `.jsonl` wins over `.jsonl.gz`."""
    names, suffixes = (*_RETRIEVAL_FILES, *_SPLITS), (".jsonl.gz", ".jsonl")
    places = {(name, suffix): folder / f"{name}{suffix}" for name in names for suffix in suffixes}
    return {name: file for (name, _), file in places.items() if file.is_file()}


def _kind(folder: Path, files: Files, known: Any) -> str:
    """What the files are, checked against what MTEB's task of that name is."""
    kind = _kind_of_files(folder, files)
    if known is None:
        return kind
    wanted = str(known.metadata.type)
    if {kind, wanted} == {"Classification", "Clustering"}:
        kind = wanted  # the same columns
    if kind != wanted or not issubclass(known, _KINDS[kind].base):
        raise InputError(f"{folder} has the name of an MTEB {wanted} task but holds {kind} data; rename it")
    return kind


def _kind_of_files(folder: Path, files: Files) -> str:
    retrieval = [name for name in _RETRIEVAL_FILES if name in files]
    if len(retrieval) == len(_RETRIEVAL_FILES):
        return "Retrieval"
    if retrieval:
        missing = [f"{name}.jsonl" for name in _RETRIEVAL_FILES if name not in files]
        raise InputError(f"{folder} looks like a retrieval task, but {', '.join(missing)} is missing")
    split = next((name for name in _SPLITS if name in files), "train")
    if split == "train":
        raise InputError(f"{folder} is no task: it needs test.jsonl, or corpus, queries and qrels (or .gz)")
    columns = set(next(_rows(files[split], {})))
    tables = {kind: spec.columns for kind, spec in _KINDS.items() if spec.columns}
    fitting = [kind for kind, expected in tables.items() if expected.keys() <= columns]
    if not fitting:
        wanted = "; ".join(f"{', '.join(expected)} ({kind})" for kind, expected in tables.items())
        have = ", ".join(sorted(columns))
        raise InputError(f"{files[split]}: columns {have} fit no kind of task; expected {wanted}")
    return "Clustering" if fitting[0] == "Classification" and "train" not in files else fitting[0]


def _metadata(folder: Path, kind: str, files: Files, known: Any, revision: str) -> TaskMetadata:
    """MTEB's description of the task, or a plain one; either way for one split of one language."""
    splits = list(known.metadata.eval_splits) if known else ["test", "validation", "dev"]
    present = [name for name in splits if name in files or kind == "Retrieval"]
    if not present:
        raise InputError(f"{folder} has no file of the splits that MTEB evaluates: {', '.join(splits)}")
    changes: dict[str, Any] = {"dataset": {"path": f"local/{folder.name}", "revision": revision}}
    changes["eval_splits"] = ["test" if "test" in present else present[0]]
    if known is None:
        to = "t2c" if kind in ("Classification", "Clustering") else "t2t"
        changes |= {"name": folder.name, "description": "local files", "type": kind, "category": to}
        return TaskMetadata(**changes, eval_langs=["und-Latn"], main_score=_KINDS[kind].main_score)
    languages = known.metadata.eval_langs
    if isinstance(languages, dict):  # a local folder holds one language, by agreement English
        english = [subset for subset, codes in languages.items() if set(codes) == {"eng-Latn"}]
        if not english:
            raise InputError(f"{folder}: MTEB's task has no English part; give the folder a name of its own")
        subset = min(english, key=len)  # "en", not "en-ext"
        changes["eval_langs"] = {subset: languages[subset]}
    return known.metadata.model_copy(update=changes)


def _size_notes(known: Any, subset: str, split: str, items: int) -> list[str]:
    """Whether the local data is the whole of MTEB's."""
    statistics = (known.metadata.descriptive_stats or {}).get(split) if known else None
    if not statistics:
        return []
    published = (statistics.get("hf_subset_descriptive_stats") or {}).get(subset, statistics)["num_samples"]
    note = f"{items:,} items, MTEB's has {published:,}: not comparable with published scores"
    return [note] if items != published else []


Loaded = tuple[Any, int, list[str]]  # data of the one subset by split, number of items, notes


def _load_tables(task: Any, files: Files) -> Loaded:
    """STS, pairs, classification, clustering: a table a split, with the task's own names for the columns."""
    names, splits, tables = _column_names(task), list(task.metadata.eval_splits), DatasetDict()
    if isinstance(task, abstasks.AbsTaskClassification):
        splits.append(task.train_split)
    for split in splits:
        if split not in files:
            raise InputError(f"{task.metadata.name}: {split}.jsonl[.gz] is missing")
        rows = list(_rows(files[split], _KINDS[task.metadata.type].columns))
        tables[split] = Dataset.from_dict({name: [row[key] for row in rows] for key, name in names.items()})
    items = len(tables[splits[0]])
    if isinstance(task, abstasks.AbsTaskClustering):
        # Each of its experiments draws this many with replacement: more than there are would only cost time.
        task.max_documents_per_cluster = min(task.max_documents_per_cluster, items)
    if isinstance(task, abstasks.AbsTaskClusteringLegacy):  # here one row is a whole set to cluster
        sets = {name: [list(tables[splits[0]][name])] for name in names.values()}
        tables[splits[0]] = Dataset.from_dict(sets)
    return tables, items, []


def _column_names(task: Any) -> dict[str, str]:
    """Columns in our files to columns of the mteb task."""
    if isinstance(task, abstasks.AbsTaskSTS):
        return {**dict(zip(_PAIR, task.column_names, strict=True)), "score": "score"}
    if isinstance(task, abstasks.AbsTaskPairClassification):
        columns = (task.input1_column_name, task.input2_column_name)
        return {**dict(zip(_PAIR, columns, strict=True)), "label": task.label_column_name}
    return {"text": task.input_column_name, "label": task.label_column_name}


def _load_retrieval(task: Any, files: Files) -> Loaded:
    corpus, queries = _by_id(files["corpus"]), _by_id(files["queries"])
    qrels = retrieval_qrels(files["qrels"].parent)
    for query, grades in qrels.items():
        lost = [f"corpus-id {document}" for document in grades if document not in corpus]
        lost += [f"query-id {query}"] if query not in queries else []
        if lost:
            raise InputError(f"{files['qrels']}: {lost[0]} is in no other file; remove the row or add its text")
    judged = {query: row["text"] for query, row in queries.items() if query in qrels}
    left_out = len(queries) - len(judged)
    notes = [f"{left_out:,} queries without a judgement are left out"] if left_out else []
    documents = {key: (row.get("title") or "", row["text"]) for key, row in corpus.items()}
    return _search_data(task, documents, judged, qrels, None), len(corpus) + len(judged), notes


def _load_reranking(task: Any, files: Files) -> Loaded:
    rows = list(_rows(files[task.metadata.eval_splits[0]], _KINDS["Reranking"].columns))
    kept = {f"q{i}": row for i, row in enumerate(rows) if row["positive"] and row["negative"]}
    documents: dict[str, tuple[str, str]] = {}
    qrels: dict[str, dict[str, int]] = {}
    for query, row in kept.items():
        # Of equal scores the greater id ranks first: "n" after "a" keeps ties pessimistic, as in MTEB's sets.
        right = {f"{query}-a{i}": ("", text) for i, text in enumerate(row["positive"])}
        wrong = {f"{query}-n{i}": ("", text) for i, text in enumerate(row["negative"])}
        documents |= right | wrong
        qrels[query] = {**dict.fromkeys(right, 1), **dict.fromkeys(wrong, 0)}
    candidates = {query: list(grades) for query, grades in qrels.items()}
    left_out = len(rows) - len(kept)
    notes = [f"{left_out:,} queries without a right or a wrong candidate are left out"] if left_out else []
    queries = {query: row["query"] for query, row in kept.items()}
    return _search_data(task, documents, queries, qrels, candidates), len(documents) + len(kept), notes


def _search_data(
    task: Any,
    documents: dict[str, tuple[str, str]],
    queries: dict[str, str],
    qrels: dict[str, dict[str, int]],
    candidates: dict[str, list[str]] | None,
) -> dict[str, RetrievalSplitData]:
    """Title and text by document id, text by query id and judgements, as mteb's data of the one split."""
    titles, texts = [title for title, _ in documents.values()], [text for _, text in documents.values()]
    data = RetrievalSplitData(
        corpus=Dataset.from_dict({"id": list(documents), "title": titles, "text": texts}),
        queries=Dataset.from_dict({"id": list(queries), "text": list(queries.values())}),
        relevant_docs=qrels,
        top_ranked=candidates,
    )
    return {task.metadata.eval_splits[0]: data}


def _by_id(file: Path) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for row in _rows(file, _DOCUMENT):
        if row["_id"] in found:
            raise InputError(f"{file}: _id {row['_id']} occurs twice; ids must be unique")
        found[row["_id"]] = row
    return found


def _rows(file: Path, columns: dict[str, str]) -> Iterator[Row]:
    """Rows of a JSONL file, each with these columns of these types.

    Raises:
        InputError: unreadable or empty file, malformed line, missing column or wrong type, with the line.
    """
    number, empty = 0, True
    open_text = gzip.open if file.suffix == ".gz" else open
    try:
        with open_text(file, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    empty = False
                    yield _row(f"{file}, line {number}", line, columns)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        place = f"{file}, after line {number}"
        raise InputError(f"{place}: cannot be read ({error}); expected UTF-8 JSONL") from error
    if empty:
        raise InputError(f"{file} is empty; expected one JSON object a line")


def _row(place: str, line: str, columns: dict[str, str]) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: not valid JSON ({error}); expected one JSON object a line") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: a JSON {type(row).__name__}, expected one JSON object a line")
    for column, kind in columns.items():
        if column not in row:
            raise InputError(f"{place}: column {column} is missing; the columns are {', '.join(sorted(row))}")
        if not _IS[kind](row[column]):
            raise InputError(f"{place}: {column} is {json.dumps(row[column])[:60]}, expected {kind}")
    return row
