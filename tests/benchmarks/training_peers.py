"""The peer: sentence-transformers' two guided losses in a minimal loop, as its trainer would run a step."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from gist_ray.config import Recipe

COLUMNS = ("query", "pos", "neg")
CACHED, PLAIN = "CachedGISTEmbedLoss", "GISTEmbedLoss"
MINI_BATCH = 32


class Peer:
    """A student in train mode, a frozen guide, its data collator, fused AdamW, gradients clipped at 1.

    Rows come in random order, as its default sampler draws them.
    """

    def __init__(self, rank: int, world_size: int, recipe: Recipe, guide: str, rows: list[dict[str, Any]]) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
        from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, GISTEmbedLoss

        student, frozen = (SentenceTransformer(path, device="cpu") for path in (recipe.student.path, guide))
        student.max_seq_length = frozen.max_seq_length = recipe.student.max_tokens
        student.train()
        frozen.eval().requires_grad_(False)
        self._student = student
        self._losses = {
            CACHED: CachedGISTEmbedLoss(student, frozen, mini_batch_size=MINI_BATCH),
            PLAIN: GISTEmbedLoss(student, frozen),
        }
        self._collator = SentenceTransformerDataCollator(preprocess_fn=student.preprocess)
        self._optimizer = torch.optim.AdamW(student.parameters(), lr=2e-5, fused=True)
        self._rows = [{column: row[column] for column in COLUMNS} for row in rows]
        self._random = np.random.default_rng(0)

    def __call__(self, loss: str, batch_size: int) -> float:
        """Seconds of one step on `batch_size` random rows, tokenization included."""
        rows = [self._rows[i] for i in self._random.choice(len(self._rows), batch_size, replace=False)]
        started = time.perf_counter()
        batch = self._collator(rows)
        features = [
            {key[len(column) + 1 :]: value for key, value in batch.items() if key.startswith(f"{column}_")}
            for column in COLUMNS
        ]
        self._losses[loss](features, torch.empty(0)).backward()
        torch.nn.utils.clip_grad_norm_(self._student.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return time.perf_counter() - started
