"""Tiles of the guided contrastive loss: values and gradients, never the matrix of all rows and candidates.

Pure tensor code of `loss.py`, which says what is computed. Per row, every logit is taken relative to the target's:
z = (s(anchor, candidate) - s(q, p)) / temperature. So the target's is 0, and with A the sum of exp(z) over the
candidates that are not hidden, the row's cross-entropy is L = log(1 + A). With soft labels of weight w, u likewise
relative guide logits, and G their sum: loss = L + w * (E_guide[u - z] - log(1 + G)), where the target adds 0 to the
mean E_guide. The derivative by z of a candidate is softmax(z) - w * softmax(u).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gist_ray.config import LossConfig

# Rows, and candidates, of a tile. A CPU's tile stays in its cache; a GPU's is large enough to hide the launches.
TILE = {"cpu": 512, "cuda": 4096}
_QUERY, _POSITIVE, _NEGATIVE = range(3)
_LOWEST = -80.0  # exp(-80) = 1.8e-35
_NEGLIGIBLE = 2e-35


@dataclass(frozen=True)
class Constants:
    """All that a loss has no gradient for: its settings, and the global batch by role."""

    config: LossConfig
    tile: int
    own_rows: Tensor
    """`[b]`."""
    guides: tuple[Tensor, ...]
    """Of queries, positives, negatives, `[n, guide_dim]`. Not read where the configuration has no guide."""
    ids: tuple[Tensor, ...]
    """Likewise, `[n]`."""
    labels: tuple[Tensor | None, ...]
    """Likewise, below 0 where none is known; all None where none is known at all."""
    owners: Tensor | None
    """`[negatives]` row of each hard negative, for which the guide cannot hide it; None: it can."""

    def blocks(self) -> list[tuple[int, int]]:
        """Roles of anchor and candidate of each block."""
        queries = [(_QUERY, _QUERY)] if self.config.contrast_queries else []
        positives = [(_POSITIVE, _POSITIVE)] if self.config.contrast_positives else []
        return [(_QUERY, _POSITIVE), (_QUERY, _NEGATIVE), *queries, *positives]

    def strips(self, vectors: tuple[Tensor, ...]) -> Iterator[tuple[slice, _Strip]]:
        """Own rows in strips as high as a tile, and their places among the own rows."""
        for start in range(0, len(self.own_rows), self.tile):
            place = slice(start, start + self.tile)
            yield place, _Strip(self, self.own_rows[place], vectors)


class TiledContrast(torch.autograd.Function):
    """`apply(constants, *vectors)` to (loss `[b]`, hidden, candidates), of which the first has a gradient.

    `vectors` are those of queries, positives and negatives, `[n, dim]`, once for each dimension that is trained. Saved
    for the backward pass are the inputs and a number for each row and dimension; the tiles are computed again. A
    backward pass with `create_graph=True` raises RuntimeError.
    """

    @staticmethod
    def forward(ctx: Any, constants: Constants, *vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses, and what the strips keep for the backward pass."""
        rows, dims = len(constants.own_rows), len(vectors) // 3
        loss = vectors[0].new_empty(rows)
        log_sums = vectors[0].new_empty(dims + 1, rows, 1)
        counts = torch.zeros(2, dtype=torch.int64, device=loss.device)
        with torch.autocast(loss.device.type, enabled=False):
            for place, strip in constants.strips(vectors):
                loss[place], log_sums[:, place], strip_counts = _forward(strip)
                counts += strip_counts
        hidden, candidates = counts
        ctx.constants = constants
        ctx.save_for_backward(log_sums, *vectors)
        ctx.mark_non_differentiable(hidden, candidates)
        return loss, hidden, candidates

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `vectors`, in closed form."""
        if torch.is_grad_enabled():
            raise RuntimeError("the guided contrastive loss has no second derivative: leave out create_graph=True")
        log_sums, *vectors = ctx.saved_tensors
        totals = [torch.zeros_like(values) for values in vectors]
        with torch.autocast(log_sums.device.type, enabled=False):
            for place, strip in ctx.constants.strips(tuple(vectors)):
                _backward(strip, gradients[0][place, None], log_sums[:, place], totals)
        return None, *totals


class _Strip:
    """Some own rows: their anchors, targets and thresholds, and the tiles of their candidates."""

    def __init__(self, constants: Constants, rows: Tensor, vectors: tuple[Tensor, ...]) -> None:
        config = constants.config
        self.constants, self.rows, self.config = constants, rows, config
        # By dimension, then by role.
        self.vectors = [vectors[i : i + 3] for i in range(0, len(vectors), 3)]
        self.anchors = [(q[rows], p[rows]) for q, p, _ in self.vectors]
        self.targets = [(q * p).sum(1, keepdim=True) / config.temperature for q, p in self.anchors]
        self.own_ids = [constants.ids[role][rows, None] for role in (_QUERY, _POSITIVE)]
        labels = constants.labels[_QUERY]
        if labels is not None:
            label = labels[rows, None]
            self.own_label = torch.where(label < 0, torch.iinfo(label.dtype).min, label)  # unknown: no candidate's
        if config.guide != "none":
            self.guides = [constants.guides[role][rows] for role in (_QUERY, _POSITIVE)]
            self.guide_target = (self.guides[_QUERY] * self.guides[_POSITIVE]).sum(1, keepdim=True)
            self.threshold = _threshold(self.guide_target, config)

    def tiles(self) -> Iterator[_Tile]:
        """Every candidate once, in tiles."""
        for anchor, role in self.constants.blocks():
            ids = self.constants.ids[role]
            for start in range(0, len(ids), self.constants.tile):
                columns = slice(start, start + self.constants.tile)
                masked = ids[columns] == self.own_ids[_QUERY]
                masked |= ids[columns] == self.own_ids[_POSITIVE]
                labels = self.constants.labels[role]
                if labels is not None and self.config.hide_same_label:
                    masked |= labels[columns] == self.own_label
                same, guide, judged = masked, None, None
                if self.config.guide != "none":
                    guide = self.guides[anchor] @ self.constants.guides[role][columns].T
                    masked = guide > self.threshold
                    judged = self._judged(role, columns)
                    if judged is not None:
                        masked &= ~judged
                    masked |= same
                yield _Tile(anchor, role, columns, same, masked, judged, guide)

    def _judged(self, role: int, columns: slice) -> Tensor | None:
        """Whether a candidate is known to be wrong, whatever the guide says: `[rows, columns]`. None: nobody asks."""
        judged, labels, owners = None, self.constants.labels[role], self.constants.owners
        if labels is not None and self.config.show_other_labels:
            others = labels[columns]
            judged = (others >= 0) & (self.own_label >= 0) & (others != self.own_label)
        if role == _NEGATIVE and owners is not None:
            own = owners[columns] == self.rows[:, None]
            judged = own if judged is None else judged | own
        return judged

    def logits(self, tile: _Tile, k: int, shift: Tensor) -> Tensor:
        """Of the k-th dimension, less `shift [rows, 1]`: `[rows, columns]`."""
        others = self.vectors[k][tile.role][tile.columns]
        # The shift rides along in the product: it costs no pass of its own.
        return torch.addmm(-shift, self.anchors[k][tile.anchor], others.T, alpha=1 / self.config.temperature)

    def guide_logits(self, tile: _Tile) -> Tensor:
        """Relative to the target's, `[rows, columns]`. Takes the tile's memory."""
        assert tile.guide is not None
        return tile.guide.sub_(self.guide_target).div_(self.config.soft_label_temperature)


@dataclass(frozen=True)
class _Tile:
    anchor: int
    """Role of the anchors: query or positive."""
    role: int
    """Role of the candidates."""
    columns: slice
    """Their places in the role."""
    same: Tensor
    """Whether the candidate's text is the row's query or positive, or its label the query's."""
    masked: Tensor
    """Whether it is that, or hidden."""
    judged: Tensor | None
    """Whether it is known to be wrong: the guide neither hides it nor gives it a share. None: none is."""
    guide: Tensor | None
    """Guide similarities."""

    def without_share_(self, guide_logits: Tensor) -> Tensor:
        """Guide logits, made -inf where the guide has no say."""
        guide_logits.masked_fill_(self.masked, -torch.inf)
        return guide_logits if self.judged is None else guide_logits.masked_fill_(self.judged, -torch.inf)


class _LogSum:
    """log(1 + sum of exp(logits)) of each row, over tiles; the 1 is the target."""

    def __init__(self, like: Tensor) -> None:
        self.peak = torch.zeros_like(like)
        self.others = torch.zeros_like(like)

    def add_(self, logits: Tensor) -> Tensor:
        """Add a tile, which becomes exp(logits - peak). Returns what earlier sums are to be multiplied by."""
        peak = torch.maximum(self.peak, logits.amax(1, keepdim=True))
        shrink = (self.peak - peak).exp_()
        _exp_(logits.sub_(peak))
        self.others.mul_(shrink).add_(logits.sum(1, keepdim=True))
        self.peak = peak
        return shrink

    def log(self) -> Tensor:
        """`[rows, 1]`; a loss of 1e-9 is not rounded away, and with no candidate it is 0."""
        return self.peak + (self.others + torch.expm1(-self.peak)).log1p_()


def _forward(strip: _Strip) -> tuple[Tensor, Tensor, Tensor]:
    """Losses `[rows]`; log sums of each dimension and of the guide `[dims + 1, rows, 1]`; hidden and candidates."""
    weight = strip.config.soft_label_weight
    sums, guide_sum = [_LogSum(target) for target in strip.targets], _LogSum(strip.targets[0])
    gaps = [torch.zeros_like(target) for target in strip.targets]
    counts = torch.zeros(2, dtype=torch.int64, device=strip.rows.device)
    for tile in strip.tiles():
        same = tile.same.count_nonzero()
        counts += torch.stack([tile.masked.count_nonzero() - same, tile.same.numel() - same])
        if weight:
            guide_logits = strip.guide_logits(tile)
            shares = tile.without_share_(guide_logits.clone())
            shrink = guide_sum.add_(shares)
        for k, (target, total) in enumerate(zip(strip.targets, sums, strict=True)):
            logits = strip.logits(tile, k, target)
            if weight:
                gaps[k].mul_(shrink).add_(((guide_logits - logits) * shares).sum(1, keepdim=True))
            total.add_(logits.masked_fill_(tile.masked, -torch.inf))
    log_sums = torch.stack([total.log() for total in [*sums, guide_sum]])
    losses = log_sums[:-1]
    if weight:
        means = torch.stack(gaps) * (guide_sum.peak - log_sums[-1]).exp_()
        losses = losses + weight * (means - log_sums[-1])
    return losses.mean(0)[:, 0], log_sums, counts


def _backward(strip: _Strip, gradient: Tensor, log_sums: Tensor, totals: list[Tensor]) -> None:
    """Add the gradients of the strip, whose losses have `gradient [rows, 1]`, to `totals`."""
    weight = strip.config.soft_label_weight
    scale = gradient / (strip.config.temperature * len(strip.vectors))
    own = []
    for (query, positive), log_sum in zip(strip.anchors, log_sums[:-1], strict=True):
        # Of the target's logit: its probability less 1, and w times the guide's likewise.
        share = torch.expm1(-log_sum) - weight * torch.expm1(-log_sums[-1])
        own.append((positive * (share * scale), query * (share * scale)))
    for tile in strip.tiles():
        if weight:
            labels = _exp_(tile.without_share_(strip.guide_logits(tile).sub_(log_sums[-1]))).mul_(weight)
        for k, target in enumerate(strip.targets):
            shares = strip.logits(tile, k, target + log_sums[k]).masked_fill_(tile.masked, -torch.inf)
            _exp_(shares)
            if weight:
                shares.sub_(labels)
            shares.mul_(scale)
            own[k][tile.anchor].addmm_(shares, strip.vectors[k][tile.role][tile.columns])
            totals[3 * k + tile.role][tile.columns].addmm_(shares.T, strip.anchors[k][tile.anchor])
    for k, gradients in enumerate(own):
        for role, values in enumerate(gradients):
            totals[3 * k + role].index_add_(0, strip.rows, values)


def _threshold(guide_target: Tensor, config: LossConfig) -> Tensor:
    """Guide similarity above which a candidate of the row is hidden, `[rows, 1]`.

    Two texts may have the same guide vector (they differ in case, say, or beyond what the guide reads). Such a tie is
    not above, but a product rounds it to either side, in other ways in other tiles. The last term, far below what a
    guide can tell apart, makes all tiles and workers decide alike.
    """
    margin = config.margin * guide_target.abs() if config.margin_kind == "relative" else config.margin
    return guide_target - margin + 8 * torch.finfo(guide_target.dtype).eps


def _exp_(logits: Tensor) -> Tensor:
    """Exp in place, 0 below 2e-35. Results that are denormal would take a CPU 35 times as long, -inf 3 times."""
    return torch.threshold_(logits.clamp_(min=_LOWEST).exp_(), _NEGLIGIBLE, 0.0)
