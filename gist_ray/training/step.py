"""Step: a global batch in, one optimizer step done. GradCache by chunks, one reduction over workers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gist_ray.config import LossConfig, TrainConfig
from gist_ray.encoder import Encoder
from gist_ray.training.batch import Chunk, WorkerBatch
from gist_ray.training.collectives import gather_rows
from gist_ray.training.engine import update
from gist_ray.training.gradients import FlatGradients
from gist_ray.training.loss import Candidates, RowLosses, guided_contrastive_loss
from gist_ray.training.memory import ActivationMemory
from gist_ray.training.phases import PhaseClock
from gist_ray.training.words import words_of


@dataclass(frozen=True)
class StepSums:
    """Sums over the rows of one worker; added over workers they describe the global batch."""

    loss: float
    hidden: float
    candidates: float
    tokens: float
    padded_tokens: float
    recomputed_tokens: float
    grad_norm: float
    """Of the global batch, before clipping: no sum, the same on every worker."""


@dataclass(frozen=True)
class Stepper:
    """Everything that is the same for all steps of a run, on one worker."""

    encoder: Encoder
    engine: Any
    """DeepSpeed engine around the encoder's model."""
    loss: LossConfig
    train: TrainConfig
    memory: ActivationMemory
    clock: PhaseClock
    rank: int

    def step(self, number: int, batch: WorkerBatch) -> StepSums:
        """One optimizer step on a global batch; every worker must call it with its part.

        The result is that of one backward pass through the whole batch (Gao et al., arXiv 2101.06983): vectors first,
        then the loss and its gradient with respect to them, then each chunk's backward with that gradient. Chunks go
        through the same passes whether their activations were kept or are computed again, with the same dropout, so
        how much memory there is does not change a bit of the result.
        """
        chunks, kept = self._passes(batch)
        with words_of(self.engine, chunks) as words:
            vectors, graphs = self._vectors(number, chunks, kept)
            # Fillers come last, and their vectors go nowhere.
            result, gradient = self._loss_gradient(torch.cat(vectors)[: batch.counts[self.rank]], batch)
            with one_reduction(self.engine, self._gradients, self.clock):
                self._backward(number, chunks, graphs, gradient)
                if words:
                    with self.clock("backward"):
                        words.backward()
        with self.clock("optimizer"):
            grad_norm = update(self.engine)
        return StepSums(
            loss=float(result.loss.detach().sum()),
            hidden=float(result.hidden),
            candidates=float(result.candidates),
            tokens=batch.tokens,
            padded_tokens=batch.padded_tokens,
            grad_norm=grad_norm,
            recomputed_tokens=sum(c.ids.numel() for c, keep in zip(batch.chunks, kept, strict=False) if not keep),
        )

    @cached_property
    def _gradients(self) -> FlatGradients | None:
        """Where gradients add up under ZeRO 0; the other stages have buffers of their own."""
        return FlatGradients(self.engine.module) if self.engine.zero_optimization_stage() == 0 else None

    def _vectors(self, number: int, chunks: list[Chunk], kept: list[bool]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Vectors of each chunk, `[rows, dim]`, and the same with their graph where activations are kept."""
        outputs = []
        for place, chunk in enumerate(chunks):
            with self.clock("forward"), torch.set_grad_enabled(kept[place]):
                outputs.append(self._forward(number, chunk))
        graphs = [output if keep else None for output, keep in zip(outputs, kept, strict=True)]
        return [output.detach() for output in outputs], graphs

    def _backward(self, number: int, chunks: list[Chunk], graphs: list[Tensor | None], gradient: Tensor) -> None:
        """Backward pass of each chunk, from `gradient [own texts, dim]`; those without a graph are computed again."""
        start = 0
        for place, chunk in enumerate(chunks):
            output, graphs[place] = graphs[place], None  # its activations are freed as they are used
            if output is None:
                with self.clock("forward"):
                    output = self._forward(number, chunk)
            own, start = gradient[start : start + len(output)], start + len(output)
            with self.clock("backward"):
                surrogate = (output[: len(own)] * own).sum()  # its gradient is `own`; of a filler it is nothing
                self.engine.backward(surrogate, scale_wrt_gas=False)

    def _passes(self, batch: WorkerBatch) -> tuple[list[Chunk], list[bool]]:
        """Chunks to compute, fillers included, and which of them keep their activations.

        Under ZeRO 3 every forward and backward is a collective, so all workers do equally many and keep all or none.
        Else a worker without rows does one, to take part in the reduction.
        """
        if self.train.zero_stage == 3:
            keep = all(all(self.memory.kept(shapes)) for shapes in batch.shapes)
            passes = max(map(len, batch.shapes))
            return batch.chunks + [batch.filler] * (passes - len(batch.chunks)), [keep] * passes
        if not batch.chunks:
            return [batch.filler], [True]
        return batch.chunks, self.memory.kept(batch.shapes[self.rank])

    def _forward(self, number: int, chunk: Chunk) -> Tensor:
        """Vectors of a chunk; the same when it is computed again, because dropout starts from the same seed."""
        seed_chunk(self.train.seed, number, chunk.number)
        device = self.encoder.device
        ids, mask = chunk.ids.to(device, non_blocking=True), chunk.mask.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.train.precision == "bf16"):
            return self.encoder.forward(ids, mask)

    def _loss_gradient(self, local: Tensor, batch: WorkerBatch) -> tuple[RowLosses, Tensor]:
        """Losses of the own rows, and the gradient of the own texts' vectors `[own texts, dim]`.

        The gradient is W / B times that of the sum of all rows' losses: DeepSpeed's mean over W workers makes it the
        gradient of the batch's mean.
        """
        local.requires_grad_()
        with self.clock("gather"):
            everyone = gather_rows(local, batch.counts)
        with self.clock("loss"):
            result = batch_losses(everyone, batch, self.loss)
            scale = len(batch.counts) / batch.size
            (gradient,) = torch.autograd.grad(result.loss.sum() * scale, everyone)
        if everyone is not local:
            with self.clock("gather"):
                (gradient,) = torch.autograd.grad(everyone, local, gradient)
        return result, gradient


def batch_losses(everyone: Tensor, batch: WorkerBatch, loss: LossConfig) -> RowLosses:
    """Losses of this worker's rows, from the vectors of all texts of the global batch `[texts, dim]`."""
    device = everyone.device
    labels = None if batch.labels is None else batch.labels.to(device)
    pool = Candidates(everyone, batch.guide.to(device), batch.texts.to(device), labels)
    query, positive, negative = (
        pool.rows(places.to(device)) for places in (batch.query, batch.positive, batch.negative)
    )
    negative = replace(negative, owners=batch.owners.to(device))
    return guided_contrastive_loss(query, positive, negative, batch.own_rows.to(device), loss)


@contextmanager
def one_reduction(engine: Any, gradients: FlatGradients | None, clock: PhaseClock) -> Iterator[None]:
    """Backward passes inside add up on each worker; at the end the sums are reduced over the workers, once.

    `gradients` are those of ZeRO 0, None under the other stages.
    Without it, DeepSpeed reduces at every backward pass of a ZeRO stage 2 or 3, and refuses or repeats with 0 and 1.
    """
    if gradients:
        gradients.attach()
        with engine.no_sync():
            yield
        with clock("reduce"):
            gradients.average()
        return
    with engine.coalesce_grad_reduction():
        yield
        started = time.perf_counter()
    clock.add("reduce", started)


def seed_chunk(seed: int, step: int, chunk: int) -> None:
    """Dropout depends on (seed, step, chunk) alone: a repeated forward and a resumed run repeat it exactly.

    So do other numbers of workers, as long as they cut the batch into the same chunks.
    """
    state = np.random.SeedSequence([seed, step, chunk]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) >> 1)
