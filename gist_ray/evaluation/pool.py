"""EncoderPool: one encoder on N Ray actors, used like a local one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gist_ray.chunks import BATCH_TOKENS, length_sorted_chunks
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.int8 import Int8Encoder

Precision = Literal["fp32", "int8"]

_IN_FLIGHT = 2  # the second chunk waits at the actor while the first is computed, so the actor never idles
_MAX_LOSSES = 3  # a chunk (or a load) that ends this many actors is itself the cause
_FORWARDS_PER_CHUNK = 16  # a round trip costs little against 16 full forwards, and 16 still balance


class _EncoderActor:
    """Holds the model in one worker process.

    Loading is a method, not the constructor: an error in a Ray constructor reaches the caller as the text of
    a traceback, one in a method as the exception itself.
    """

    def load(self, model: str, revision: str | None, threads: int, device: str, precision: Precision) -> dict[str, Any]:
        import torch

        torch.set_num_threads(threads)
        encoder = (
            Int8Encoder(model, threads=threads)
            if precision == "int8"
            else Encoder.load(model, revision=revision, device=device)
        )
        self._encoder: Encoder | Int8Encoder = encoder
        return {"dim": encoder.dim, "prompts": encoder.prompts, "max_tokens": encoder.max_tokens}

    def encode(self, texts: list[str], prompt: str, batch_tokens: int) -> npt.NDArray[np.float32]:
        return self._encoder.encode(texts, prompt=prompt, batch_tokens=batch_tokens)


@dataclass(eq=False)
class _Worker:
    actor: Any
    loading: Any
    """Reference to the facts of the loaded model; None once they have arrived."""


@dataclass
class _Chunk:
    rows: npt.NDArray[np.int64]
    losses: int = 0


@dataclass
class _Job:
    """One call of `encode`: what is to do, what is on its way, what has arrived."""

    texts: list[str]
    prompt: str
    vectors: npt.NDArray[np.float32]
    waiting: deque[_Chunk]
    running: dict[Any, tuple[_Worker, _Chunk]] = field(default_factory=dict)


class EncoderPool:
    """`Encoder.encode` on `workers` Ray actors that each load the model once.

    Needs a connected Ray (`gist_ray.cluster.connected`). An actor that dies is replaced, and what it was
    computing goes to whichever actor is free. Not safe for calls from several threads at once.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        workers: int = 2,
        threads: int = 1,
        cpus: float = 1.0,
        gpus: float = 0.0,
        batch_tokens: int | None = None,
        precision: Precision = "fp32",
    ) -> None:
        """Start the actors and wait until the first has loaded the model.

        Args:
            model: model folder (on storage that every node sees) or Hub id.
            revision: commit of a Hub id.
            workers: number of actors.
            threads: CPU threads of each actor.
            cpus: logical CPUs that each actor holds, may be fractional.
            gpus: GPUs that each actor holds; above 0 the model runs there.
            batch_tokens: padded tokens per forward; None: what suits the device.
            precision: int8: the variant that `gist-ray export --int8` made, on the CPU.

        Raises:
            InputError: the model cannot be loaded.
        """
        import ray

        path = Path(model).expanduser()
        device = "cuda" if gpus else "cpu"
        self._load_args = (str(path.absolute()) if path.is_dir() else str(model), revision, threads, device, precision)
        self._actor_class = ray.remote(_EncoderActor).options(num_cpus=cpus, num_gpus=gpus)
        self._batch_tokens = batch_tokens or BATCH_TOKENS[device]
        self._losses = 0
        self._facts: dict[str, Any] = {}
        self._workers = [self._start() for _ in range(workers)]
        try:
            while not self._facts:
                [ref], _ = ray.wait(list(self._loads()), num_returns=1)
                self._loaded(self._loads()[ref])
        except BaseException:
            self.close()
            raise

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self._facts["dim"])

    @property
    def max_tokens(self) -> int:
        """Where texts are cut."""
        return int(self._facts["max_tokens"])

    @property
    def prompts(self) -> dict[str, str]:
        """Prompts that the model folder defines, by name."""
        return dict(self._facts["prompts"])

    def encode(self, texts: Sequence[str], prompt: str = "") -> npt.NDArray[np.float32]:
        """Vectors of texts, `[n, dim]` float32 of unit norm, in order. Equal texts are computed once.

        Raises:
            InputError: an actor cannot load the model.
            RuntimeError: the same chunk of texts ended several actors.
        """
        unique = list(dict.fromkeys(texts))
        vectors = np.empty((len(unique), self.dim), dtype=np.float32)
        waiting = deque(_Chunk(rows) for rows in self._cut(unique))
        job = _Job(unique, prompt, vectors, waiting)
        while job.waiting or job.running:
            self._hand_out(job)
            self._take_one(job)
        if len(unique) == len(texts):
            return vectors
        row = {text: i for i, text in enumerate(unique)}
        return vectors[[row[text] for text in texts]]

    def close(self) -> None:
        """Free the actors. The pool cannot be used afterwards."""
        import ray

        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers = []

    def __enter__(self) -> EncoderPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cut(self, texts: list[str]) -> list[npt.NDArray[np.int64]]:
        """Rows of each chunk: longest texts first, so that the last chunks to finish are short ones.

        Lengths are estimated from characters (tokenizing here would serialise it on the driver); the actor
        sorts and budgets by real tokens. A small call makes small chunks, so that every actor gets work.
        """
        tokens = np.array([min(len(text) // 4 + 2, self.max_tokens) for text in texts], dtype=np.int64)
        fair_share = int(tokens.sum()) // (2 * max(1, len(self._workers)))
        budget = min(max(fair_share, self._batch_tokens), _FORWARDS_PER_CHUNK * self._batch_tokens)
        return length_sorted_chunks(tokens, budget)

    def _hand_out(self, job: _Job) -> None:
        """Give every loaded worker chunks, least busy first, up to its bound."""
        busy = {id(worker): 0 for worker in self._workers}
        for worker, _ in job.running.values():
            busy[id(worker)] = busy.get(id(worker), 0) + 1
        ready = [worker for worker in self._workers if worker.loading is None]
        while job.waiting and ready:
            worker = min(ready, key=lambda candidate: busy[id(candidate)])
            if busy[id(worker)] >= _IN_FLIGHT:
                return
            busy[id(worker)] += 1
            chunk = job.waiting.popleft()
            texts = [job.texts[i] for i in chunk.rows]
            ref = worker.actor.encode.remote(texts, job.prompt, self._batch_tokens)
            job.running[ref] = (worker, chunk)

    def _take_one(self, job: _Job) -> None:
        """Wait for one thing that is on its way: a chunk's vectors, or a new worker's model."""
        import ray

        loads = self._loads()
        [ref], _ = ray.wait([*job.running, *loads], num_returns=1)
        if ref in loads:
            self._loaded(loads[ref])
            return
        worker, chunk = job.running.pop(ref)
        try:
            job.vectors[chunk.rows] = ray.get(ref)
        except _lost() as error:
            self._replace(worker)
            chunk.losses += 1
            if chunk.losses >= _MAX_LOSSES:
                raise RuntimeError(
                    f"{chunk.losses} evaluation actors died on the same {len(chunk.rows)} texts; "
                    f"out of memory? Lower batch_tokens (now {self._batch_tokens})"
                ) from error
            job.waiting.appendleft(chunk)

    def _start(self) -> _Worker:
        actor = self._actor_class.remote()
        return _Worker(actor, loading=actor.load.remote(*self._load_args))

    def _loads(self) -> dict[Any, _Worker]:
        return {worker.loading: worker for worker in self._workers if worker.loading is not None}

    def _loaded(self, worker: _Worker) -> None:
        import ray

        try:
            self._facts = ray.get(worker.loading)
        except _lost() as error:
            self._losses += 1
            if self._losses >= _MAX_LOSSES:
                model = self._load_args[0]
                raise RuntimeError(f"{self._losses} evaluation actors died while loading {model}") from error
            self._replace(worker)
            return
        except InputError as error:  # Ray's subclass of it, with the remote traceback as message
            raise InputError(str(getattr(error, "cause", error))) from None
        worker.loading = None
        self._losses = 0

    def _replace(self, worker: _Worker) -> None:
        """Start a worker in a dead one's place; other chunks it held come back as losses of their own."""
        import ray

        if worker in self._workers:
            ray.kill(worker.actor)  # "unavailable" is not "dead": it must not hold its CPU beside the new one
            self._workers[self._workers.index(worker)] = self._start()


def _lost() -> tuple[type[Exception], ...]:
    """What Ray raises when a worker, its node or its result is gone."""
    from ray import exceptions

    return (exceptions.RayActorError, exceptions.ObjectLostError, exceptions.OutOfMemoryError)
