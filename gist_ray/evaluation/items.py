"""Items: what a model's score on a task is made of, one number or two an item, so that models can be compared in pairs.

| task | statistic | values | truth |
|---|---|---|---|
| retrieval, reranking | mean | main metric of each query | |
| classification | mean | share of the experiments that label a text right, for each text | |
| clustering | mean | v-measure of each experiment or set | |
| STS | spearman | cosine of each pair | its gold score |
| pair classification | average precision | cosine of each pair | its label |
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from mteb import abstasks

from gist_ray.manifest import write_json

Numbers = npt.NDArray[np.float64]
Statistic = Literal["mean", "spearman", "average_precision"]

# mteb's names of main metrics, and trec_eval's.
_CUT_METRICS = ("ndcg", "map", "recall", "precision")
_TREC_NAMES = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}


@dataclass(frozen=True)
class Group:
    """Items of one subset and split of a task."""

    name: str
    values: Numbers
    """`[items]`."""
    truth: Numbers | None = None
    """`[items]`, where the statistic needs it."""


@dataclass(frozen=True)
class Items:
    """All items of a task. Its statistic is the mean of the groups' statistics."""

    statistic: Statistic
    groups: tuple[Group, ...]

    def write(self, file: Path) -> None:
        """As JSON, whole or not at all."""
        groups = [
            {"name": group.name, "values": group.values.tolist()}
            | ({} if group.truth is None else {"truth": group.truth.tolist()})
            for group in self.groups
        ]
        write_json(file, {"statistic": self.statistic, "groups": groups})


def read_items(file: Path) -> Items:
    """What `Items.write` wrote."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    groups = tuple(
        Group(group["name"], np.array(group["values"]), np.array(group["truth"]) if "truth" in group else None)
        for group in stored["groups"]
    )
    return Items(stored["statistic"], groups)


def items_of(task: Any, scores: Mapping[str, Any], predictions: Mapping[str, Any]) -> Items | None:
    """Items of a task that was scored and still has its data; None for kinds that have none.

    `scores` are mteb's by split, `predictions` what mteb stored of them, by subset and split.
    """
    extract = next((function for base, function in _EXTRACTORS if isinstance(task, base)), None)
    if extract is None:
        return None
    statistic, function = extract
    groups = []
    for split, subsets in scores.items():
        for entry in subsets:
            subset = entry["hf_subset"]
            data = task.dataset[subset] if subset in task.dataset else task.dataset
            found = function(task, data[split], entry, predictions.get(subset, {}).get(split))
            if found is None:
                return None
            values, truth = found
            groups.append(Group(f"{subset}/{split}", np.asarray(values, np.float64), truth))
    return Items(statistic, tuple(groups)) if groups else None


_Found = tuple[Any, Numbers | None] | None


def _of_queries(task: Any, data: Any, entry: Any, ranking: Any) -> _Found:
    """Main metric of each query, in the order of their ids."""
    import pytrec_eval

    kind, _, cut = task.metadata.main_score.rpartition("_at_")
    if kind not in _CUT_METRICS or ranking is None:
        return None
    if task.ignore_identical_ids:  # of tasks whose queries are documents too
        ranking = {query: {key: hits[key] for key in hits if key != query} for query, hits in ranking.items()}
    measure = f"{_TREC_NAMES[kind]}.{cut}"
    qrels = {
        query: {key: int(grade) for key, grade in grades.items()} for query, grades in data["relevant_docs"].items()
    }
    found = pytrec_eval.RelevanceEvaluator(qrels, {measure}).evaluate(ranking)
    return [found[query][measure.replace(".", "_")] for query in sorted(found)], None


def _of_pairs(task: Any, data: Any, entry: Any, scores: Any) -> _Found:
    """Cosine and gold score of each pair."""
    return scores["cosine_scores"], np.asarray(data["score"], np.float64)


def _of_labelled_pairs(task: Any, data: Any, entry: Any, scores: Any) -> _Found:
    """Cosine and label of each pair."""
    labels = np.asarray(data[task.label_column_name], np.float64).ravel()  # older data sets hold one row of lists
    return np.asarray(scores["cosine_scores"]).ravel(), labels


def _of_texts(task: Any, data: Any, entry: Any, experiments: Any) -> _Found:
    """Share of experiments that label each text right; of the main metric is another, that of each experiment."""
    if task.metadata.main_score != "accuracy":
        return [one[task.metadata.main_score] for one in entry["scores_per_experiment"]], None
    labels = np.asarray(data[task.label_column_name])
    return np.mean([np.asarray(one) == labels for one in experiments], axis=0), None


def _of_clusterings(task: Any, data: Any, entry: Any, predictions: Any) -> _Found:
    """V-measure of each experiment, at all levels of labels, or of each set."""
    measures = entry.get("v_measures")
    if task.metadata.main_score != "v_measure" or not measures:
        return None
    return list(itertools.chain.from_iterable(measures.values())) if isinstance(measures, dict) else measures, None


# The first that fits: multilabel classification is a classification, and has no single right label.
_EXTRACTORS: tuple[tuple[Any, Any], ...] = (
    (abstasks.AbsTaskMultilabelClassification, None),
    (abstasks.AbsTaskRetrieval, ("mean", _of_queries)),
    (abstasks.AbsTaskSTS, ("spearman", _of_pairs)),
    (abstasks.AbsTaskPairClassification, ("average_precision", _of_labelled_pairs)),
    (abstasks.AbsTaskClassification, ("mean", _of_texts)),
    (abstasks.AbsTaskClustering, ("mean", _of_clusterings)),
    (abstasks.AbsTaskClusteringLegacy, ("mean", _of_clusterings)),
)
