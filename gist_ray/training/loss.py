"""The guided in-batch contrastive loss of GISTEmbed. Pure: tensors in, tensors out; no model, no process group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gist_ray.config import LossConfig
from gist_ray.encoder import widened
from gist_ray.errors import InputError
from gist_ray.training.tiles import TILE, Constants, TiledContrast


@dataclass(frozen=True)
class Candidates:
    """Texts that stand in one role of the global batch."""

    student: Tensor
    """`[n, dim]`, unit norm, with gradient."""
    guide: Tensor
    """`[n, guide_dim]`, unit norm, fp32. Not read without a frozen guide: `[n, 0]` will do."""
    ids: Tensor
    """`[n]` text ids: equal ids mean equal texts."""
    labels: Tensor | None = None
    """`[n]` numbers of labels, below 0 where none is known; None where none is known at all."""
    owners: Tensor | None = None
    """`[n]` row of the global batch that each hard negative stands in; None: nobody asks."""

    def rows(self, index: Tensor) -> Candidates:
        """The texts at `index [m]`."""
        labels = None if self.labels is None else self.labels[index]
        return Candidates(self.student[index], self.guide[index], self.ids[index], labels)


@dataclass(frozen=True)
class RowLosses:
    """What the loss says of each row, and of its mask."""

    loss: Tensor
    """`[rows]`."""
    hidden: Tensor
    """Candidates that the guide hid, over all rows. Scalar."""
    candidates: Tensor
    """Candidates in all, but for identical texts and the query's own label. Scalar."""


def guided_contrastive_loss(
    query: Candidates,
    positive: Candidates,
    negative: Candidates,
    own_rows: Tensor,
    config: LossConfig,
    *,
    tile: int | None = None,
) -> RowLosses:
    """Losses of some rows of a global batch against all of its texts (arXiv 2402.16829; defects fixed).

    `query` and `positive` hold the B rows of the global batch, `negative` any number of hard negatives; `own_rows
    [b]` are the distinct rows to compute. The mean of all B losses is the loss of the batch, whoever computes which
    rows: there is no world-size factor here.

    Row i contrasts s(q_i, p_i) with four blocks in one softmax: q_i against every positive, every negative and every
    query, and p_i against every positive. A candidate is hidden when the guide scores it strictly above
    g(q_i, p_i) - margin. Unlike the paper's code and sentence-transformers':

    - a candidate whose *text* is q_i or p_i is hidden always, by id. This takes in the self-diagonals, which the others
      leave to rounding, and repeated texts, which a strict `>` can never hide;
    - so is a candidate that bears q_i's label, where labels are known (supervised contrast, arXiv 2004.11362): the
      guide knows what is similar, not what the labels tell apart;
    - with `show_other_labels` the guide has no say in a candidate that is known to bear another label, and with
      `show_own_negatives` in none of the row's own hard negatives (which need their `owners`): it cannot hide them,
      and its soft labels give them no share;
    - the pair (q_i, p_i) itself stands apart from the candidates, so no margin can hide it;
    - a tie is no `>`, to rounding: texts with equal guide vectors fare alike on any number of workers;
    - logits and thresholds are fp32 or wider, whatever the model computes in.

    A row with every candidate hidden has loss 0.

    Soft labels of weight w make a row's loss (1 - w) * cross-entropy + w * KL(guide || student), both distributions
    over the target and the candidates that are not hidden, the guide's with its own temperature. With Matryoshka
    dimensions (arXiv 2205.13147) a row's loss is the mean over the full vectors and those cut to each dimension and
    renormalised. What is hidden depends on no dimension: `guide: student` looks at full vectors.

    Rows and candidates are walked in tiles of `tile` x `tile` (None: what suits the device), forward and again
    backward, so memory grows with B, not B². The result depends on it to rounding. There is no second derivative:
    a backward pass with `create_graph=True` raises RuntimeError.

    Raises:
        InputError: a Matryoshka dimension that is not below the student's.
    """
    check_dims(config, query.student.shape[1])
    roles = (query, positive, negative)
    students = [widened(texts.student) for texts in roles]
    dims = [students, *_cut(students, config.matryoshka_dims)]
    hiding = [student.detach() for student in students] if config.guide == "student" else [t.guide for t in roles]
    constants = Constants(
        config=config,
        tile=tile or TILE.get(query.student.device.type, TILE["cuda"]),
        own_rows=own_rows,
        guides=tuple(widened(vectors) for vectors in hiding),
        ids=tuple(texts.ids for texts in roles),
        labels=tuple(texts.labels for texts in roles),
        owners=negative.owners if config.show_own_negatives else None,
    )
    loss, hidden, candidates = TiledContrast.apply(  # type: ignore[no-untyped-call]  # torch's own
        constants, *(vectors for dim in dims for vectors in dim)
    )
    return RowLosses(loss, hidden, candidates)


def check_dims(config: LossConfig, dim: int) -> None:
    """Check the Matryoshka dimensions against the student's.

    Raises:
        InputError: one is not below it.
    """
    too_long = [wanted for wanted in config.matryoshka_dims if wanted >= dim]
    if too_long:
        raise InputError(
            f"loss.matryoshka_dims {too_long} must be below the {dim} dimensions of the student, whose full vectors "
            "are trained anyway; remove them"
        )


def _cut(students: list[Tensor], dims: tuple[int, ...]) -> list[list[Tensor]]:
    """The vectors of each role at each of `dims`, of unit norm."""
    return [[torch.nn.functional.normalize(student[:, :dim], dim=1) for student in students] for dim in dims]
