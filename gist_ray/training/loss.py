"""The guided in-batch contrastive loss of GISTEmbed. Pure: tensors in, tensors out; no model, no process group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gist_ray.config import LossConfig
from gist_ray.encoder import widened


@dataclass(frozen=True)
class Candidates:
    """Texts that stand in one role of the global batch."""

    student: Tensor
    """`[n, dim]`, unit norm, with gradient."""
    guide: Tensor
    """`[n, guide_dim]`, unit norm, fp32."""
    ids: Tensor
    """`[n]` text ids: equal ids mean equal texts."""

    def rows(self, index: Tensor) -> Candidates:
        """The texts at `index [m]`."""
        return Candidates(self.student[index], self.guide[index], self.ids[index])


@dataclass(frozen=True)
class RowLosses:
    """What the loss says of each row, and of its mask."""

    loss: Tensor
    """`[rows]`."""
    hidden: Tensor
    """Candidates that the guide hid, over all rows. Scalar."""
    candidates: Tensor
    """Candidates in all, identical texts not counted. Scalar."""


def guided_contrastive_loss(
    query: Candidates,
    positive: Candidates,
    negative: Candidates,
    own_rows: Tensor,
    config: LossConfig,
) -> RowLosses:
    """Losses of some rows of a global batch against all of its texts (arXiv 2402.16829; defects fixed).

    `query` and `positive` hold the B rows of the global batch, `negative` any number of hard negatives; `own_rows
    [b]` are the rows to compute. The mean of all B losses is the loss of the batch, whoever computes which rows:
    there is no world-size factor here.

    Row i contrasts s(q_i, p_i) with four blocks in one softmax: q_i against every positive, every negative and every
    query, and p_i against every positive. A candidate is hidden when the guide scores it strictly above
    g(q_i, p_i) - margin. Unlike the paper's code and sentence-transformers':

    - a candidate whose *text* is q_i or p_i is hidden always, by id. This takes in the self-diagonals, which the others
      leave to rounding, and repeated texts, which a strict `>` can never hide;
    - the pair (q_i, p_i) itself stands apart from the candidates, so no margin can hide it;
    - logits and thresholds are fp32 or wider, whatever the model computes in.

    A row with every candidate hidden has loss 0.
    """
    q, p = query.rows(own_rows), positive.rows(own_rows)
    target = (widened(q.student) * widened(p.student)).sum(-1, keepdim=True)
    threshold = (q.guide * p.guide).sum(-1, keepdim=True)
    threshold = threshold - config.margin * (threshold.abs() if config.margin_kind == "relative" else 1.0)

    blocks = [(q, positive), (q, negative)]
    blocks += [(q, query)] if config.contrast_queries else []
    blocks += [(p, positive)] if config.contrast_positives else []

    logits = [target / config.temperature]
    hidden = candidates = torch.zeros((), dtype=torch.int64, device=target.device)
    for anchor, others in blocks:
        similarity = widened(anchor.student) @ widened(others.student).T
        same = (others.ids == q.ids[:, None]) | (others.ids == p.ids[:, None])
        masked = same
        if config.guided:
            above = (anchor.guide @ others.guide.T) > threshold
            masked = same | above
            hidden = hidden + (above & ~same).sum()
        candidates = candidates + (~same).sum()
        logits.append((similarity / config.temperature).masked_fill(masked, -torch.inf))
    scores = torch.cat(logits, dim=1)
    return RowLosses(torch.logsumexp(scores, dim=1) - scores[:, 0], hidden, candidates)
