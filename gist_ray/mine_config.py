"""The settings of `mine`: one frozen, typed tree, as a recipe is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gist_ray.config import ClusterConfig, GuideConfig, SourceConfig
from gist_ray.section import Section


class MineConfig(Section):
    """How triplets are mined."""

    source: SourceConfig
    guide: GuideConfig
    kind: Literal["auto", "labels", "pairs"] = "auto"
    """labels: rows of `text`, `label`. pairs: rows of `query`, `pos` and maybe `neg`. auto: by the columns."""
    top_k: int = Field(default=100, ge=1)
    """labels: the positive is one of the `top_k` most similar texts of the same label. Hard negatives: candidates kept
    of each query."""
    temperature: float = Field(default=0.05, gt=0)
    """labels: the positive is drawn with probability softmax(similarity / temperature)."""
    negatives: Literal["uniform", "hard"] | None = None
    """labels: uniform over the texts of other labels (the paper; the default), or guided-hard. pairs: always hard."""
    num_negatives: int = Field(default=1, ge=0, le=64)
    margin: float = Field(default=0.05, ge=-1, lt=1)
    """Hard: a candidate is taken only when guide(q, candidate) < guide(q, p) - margin * |guide(q, p)| (NV-Retriever's
    TopK-PercPos at 95 %)."""
    sampling: Literal["random", "top"] = "random"
    """Hard: draw uniformly from the candidates left, or take the most similar."""
    max_chars: int = Field(default=100_000, ge=1)
    seed: int = Field(default=1029, ge=0)
    cluster: ClusterConfig = ClusterConfig()
