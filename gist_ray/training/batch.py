"""Batch: what one worker computes in a step, ready as tensors. Pure, and made ahead, so that no step waits for it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gist_ray.chunks import BATCH_TOKENS, SIMILAR_LENGTH, dealt_chunks
from gist_ray.config import Recipe
from gist_ray.data.shards import Shards
from gist_ray.encoder import Encoder

Ids = npt.NDArray[np.int64]
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Chunk:
    """Texts of one forward."""

    number: int
    """Of this chunk among those of all workers."""
    ids: Tensor
    """`[rows, tokens]` token ids, padded."""
    mask: Tensor
    """`[rows, tokens]`, 1 for a token, 0 for padding."""


@dataclass(frozen=True)
class WorkerBatch:
    """One worker's part of a global batch: texts that it embeds, and rows whose losses it computes.

    The two are dealt apart, so no text is embedded twice, on whatever workers. `texts` are those of all workers, worker
    after worker, in the order in which their chunks hold them: the order in which vectors are gathered. Which worker
    holds which text follows from the plan, so only vectors travel.
    """

    size: int
    """Rows of the global batch."""
    rows_crc32: int
    """Checksum of the row numbers: runs that show the same rows in the same order have the same ones."""
    chunks: list[Chunk]
    """Own texts, longest first."""
    counts: list[int]
    """Texts of each worker."""
    shapes: list[list[tuple[int, int]]]
    """Rows and padded tokens of each worker's chunks."""
    filler: Chunk
    """One text, for a forward that only keeps step with the other workers."""
    texts: Tensor
    """`[sum(counts)]` text ids."""
    labels: Tensor | None
    """`[sum(counts)]` label of each text, NO_LABEL where none is known; None where no text has one or the loss does not
    ask."""
    guide: Tensor
    """`[sum(counts), guide_dim]` guide vectors, fp32; `guide_dim` 0 where the loss does not ask the guide."""
    query: Tensor
    """`[size]` places in `texts` of the rows' queries."""
    positive: Tensor
    """`[size]`."""
    negative: Tensor
    """`[negatives]`, of all rows."""
    owners: Tensor
    """`[negatives]` places of their rows among the `size` ones."""
    own_rows: Tensor
    """`[rows]` places of this worker's rows among the `size` ones."""
    tokens: int
    """Real tokens of the own texts."""
    padded_tokens: int
    """Tokens that the own chunks compute."""


def make_batch(encoder: Encoder, shards: Shards, batch: Ids, recipe: Recipe, rank: int, world_size: int) -> WorkerBatch:
    """The part of worker `rank` of the global batch of row numbers `batch`."""
    triplets, lengths = shards.triplets, shards.texts.lengths
    budget = recipe.train.chunk_tokens or BATCH_TOKENS[encoder.device.type]
    wanted = triplets.texts_of(batch)
    dealt = dealt_chunks(lengths[wanted], budget, world_size, similar=SIMILAR_LENGTH)
    chunks_of = [[(number, wanted[places]) for number, places in own] for own in dealt]
    counts = [sum(len(ids) for _, ids in own) for own in chunks_of]
    texts = np.concatenate([np.zeros(0, np.int64), *(ids for own in chunks_of for _, ids in own)])
    order = np.argsort(texts)

    def places(ids: Ids) -> Tensor:
        return torch.from_numpy(order[np.searchsorted(texts, ids, sorter=order)])

    chunks = [_chunk(encoder, shards, number, ids) for number, ids in chunks_of[rank]]
    guided = recipe.loss.guide == "frozen"
    labels = shards.labels if recipe.loss.hide_same_label or recipe.loss.show_other_labels else None
    return WorkerBatch(
        size=len(batch),
        rows_crc32=zlib.crc32(np.ascontiguousarray(batch).tobytes()),
        chunks=chunks,
        counts=counts,
        shapes=[[(len(ids), int(lengths[ids].max())) for _, ids in own] for own in chunks_of],
        filler=_chunk(encoder, shards, sum(map(len, chunks_of)), texts[-1:]),
        texts=torch.from_numpy(texts),
        labels=None if labels is None else torch.from_numpy(labels[texts]),
        guide=torch.from_numpy(shards.texts.guide(texts)) if guided else torch.zeros((len(texts), 0)),
        query=places(triplets.query[batch]),
        positive=places(triplets.positive[batch]),
        negative=places(triplets.negatives_of(batch)),
        owners=torch.from_numpy(np.repeat(np.arange(len(batch)), triplets.num_negatives(batch))),
        own_rows=torch.arange(len(batch)).tensor_split(world_size)[rank],
        tokens=int(sum(chunk.mask.sum() for chunk in chunks)),
        padded_tokens=sum(chunk.ids.numel() for chunk in chunks),
    )


def made_ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """The items, each made in another thread while the one before is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="gist-ray-batches") as thread:
        ready: Future[_Item | None] = thread.submit(next, items, None)
        while (item := ready.result()) is not None:
            ready = thread.submit(next, items, None)
            yield item


def _chunk(encoder: Encoder, shards: Shards, number: int, texts: Ids) -> Chunk:
    ids, mask = encoder.padded(shards.texts.tokens(texts))
    if encoder.device.type == "cuda":  # pinned memory lets the copy run beside the step before
        ids, mask = ids.pin_memory(), mask.pin_memory()
    return Chunk(number, ids, mask)
