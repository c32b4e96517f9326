"""Reference: published scores of models, and how near to them a score of the same model must come.

A score that is not near says that something differs: data, pooling, prompt, the longest text, or mteb's version.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from gist_ray.errors import InputError
from gist_ray.evaluation.report import read_report

# In points. Similarities are exact to rounding; neighbours tie; classifiers depend on the version of mteb.
_BY_TYPE = {"STS": 0.1, "Classification": 2.5}
_ELSE = 0.5
# What re-runs of one model differed by from one version of mteb to another.
_BY_TASK = {
    "STS22": 0.5,
    "Banking77Classification": 1.0,
    "AmazonCounterfactualClassification": 1.5,
    "TweetSentimentExtractionClassification": 2.0,
    "AmazonReviewsClassification": 4.5,
    "ToxicConversationsClassification": 5.0,
    "MassiveIntentClassification": 5.5,
    "MassiveScenarioClassification": 5.5,
    "MTOPIntentClassification": 13.5,
    "ArguAna": 1.0,
    "CQADupstackRetrieval": 1.0,
}


@dataclass(frozen=True)
class Check:
    """A score beside the published one, both times 100."""

    task: str
    found: float
    published: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether they agree."""
        return abs(self.found - self.published) <= self.tolerance


def reference_model(name: str) -> str:
    """The full name of a model with published scores; the organisation may be left out.

    Raises:
        InputError: there are none for it.
    """
    known = _published()
    fitting = [model for model in known if model == name or model.rpartition("/")[2] == name.rpartition("/")[2]]
    if not fitting:
        raise InputError(f"there are no published scores for {name}; they are known for {', '.join(known)}")
    return fitting[0]


def checks(tasks: list[dict[str, Any]], model: str) -> list[Check]:
    """The tasks of a report that have a published score of this model, on data that can be compared.

    Raises:
        InputError: as `reference_model`.
    """
    published = _published()[reference_model(model)]
    return [
        Check(
            task["name"],
            100 * task["score"],
            published[task["name"]],
            _BY_TASK.get(task["name"], _BY_TYPE.get(task["type"], _ELSE)),
        )
        for task in tasks
        if task["name"] in published and not any("not comparable" in note for note in task["notes"])
    ]


def check_report(report: Path, model: str) -> list[Check]:
    """`checks` of a report directory.

    Raises:
        InputError: as `read_report` and `checks`; or none of its tasks has a published score on the same data.
    """
    found = checks(read_report(report)["tasks"], model)
    if not found:
        raise InputError(f"none of the tasks of {report} has a published score of {model} on the same data")
    return found


@functools.lru_cache(maxsize=1)
def _published() -> dict[str, dict[str, float]]:
    text = files("gist_ray.evaluation").joinpath("reference_scores.json").read_text(encoding="utf-8")
    scores: dict[str, dict[str, float]] = json.loads(text)["scores"]
    return scores
