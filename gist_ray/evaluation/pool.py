"""EncoderPool: one encoder on N Ray actors, which any number of processes use at once like a local one."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gist_ray.chunks import BATCH_TOKENS, length_sorted_chunks
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.evaluation.cost import Cost
from gist_ray.evaluation.encoder_actor import ActorSettings, EncoderActor, ModelFacts, distinct, nearest
from gist_ray.serving_config import Precision

log = logging.getLogger(__name__)

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]

_IN_FLIGHT = 2  # of each caller at each actor: the second waits there while the first is computed
_RESTARTS = 20  # of one actor, whose node may be preempted again and again in a long run
_DEATHS = 3  # a chunk that ends its actor this often is itself the cause
_FORWARDS_PER_CHUNK = 16  # a round trip costs little against 16 full forwards, and 16 still balance
_LOOK_S, _LATE_S = 5.0, 30.0
"""How often it is looked whether a chunk is late, and how late it must be for another actor to be asked."""
_LATECOMER_S = 60.0
"""How much longer than the first actor the others may take to load. Who takes longer is not waited for."""


@dataclass(frozen=True)
class EncoderPool:
    """Handles of the actors, and what is known of their model. Can be sent to other processes.

    Every caller keeps a few chunks at each actor, so no actor idles while any caller has work, and callers get equal
    shares. An actor that dies is started again by Ray, and so is what it was computing.
    """

    actors: tuple[Any, ...]
    facts: ModelFacts
    batch_tokens: int
    """Padded tokens per forward."""
    spent: Cost = field(default_factory=Cost, compare=False)
    """For this process, since it has the pool."""

    def encode(self, texts: Sequence[str], prompt: str = "") -> Vectors:
        """Vectors of texts, `[n, dim]` float32 of unit norm, in order. Equal texts are computed once.

        Raises:
            RuntimeError: the same chunk of texts ended several actors.
        """
        unique, places = distinct(texts)
        vectors = np.empty((len(unique), self.facts.dim), dtype=np.float32)
        chunks = self._cut(unique, _FORWARDS_PER_CHUNK)
        self.spent.add(Cost(texts=len(texts)))
        for chunk, (result, spent) in self._each(
            chunks, lambda actor, rows: actor.encode.remote([unique[i] for i in rows], prompt)
        ):
            vectors[chunk] = result
            self.spent.add(spent)
        return vectors if len(unique) == len(texts) else vectors[places]

    def nearest(self, queries: Vectors, texts: Sequence[str], prompt: str, most: int) -> Iterator[tuple[Ids, Vectors]]:
        """Of part after part of `texts`: places in `texts` of those nearest to each of `queries [n, dim]`, and cosines.

        `[n, k]` each, best first, k at most `most`. The parts cover all texts; their vectors stay at the actors.

        Raises:
            RuntimeError: as `encode`.
        """
        import ray

        shared = ray.put(queries)  # once, not with every part
        # A part sends back `most` numbers a query: parts of fewer texts than that would send all there are.
        forwards = max(_FORWARDS_PER_CHUNK, 4 * most * self._mean_tokens(texts) // self.batch_tokens)
        parts = self._cut(texts, forwards)
        self.spent.add(Cost(texts=len(texts)))
        for part, ((places, scores), spent) in self._each(
            parts, lambda actor, rows: actor.nearest.remote([texts[i] for i in rows], prompt, shared, most)
        ):
            self.spent.add(spent)
            yield part[places], scores

    def _tokens(self, texts: Sequence[str]) -> Ids:
        """Lengths, estimated from characters: tokenizing here would do it in one process for all."""
        return np.array([min(len(text) // 4 + 2, self.facts.max_tokens) for text in texts], dtype=np.int64)

    def _mean_tokens(self, texts: Sequence[str]) -> int:
        return int(self._tokens(texts).mean()) if len(texts) else 0

    def _cut(self, texts: Sequence[str], forwards: int) -> list[Ids]:
        """Places of each chunk's texts, longest first, so that the last chunks to finish are short ones.

        Equal texts go together. A small call makes small chunks, so that every actor gets work.
        """
        order = np.array(sorted(range(len(texts)), key=lambda i: texts[i]), dtype=np.int64)
        tokens = self._tokens([texts[i] for i in order])
        fair_share = int(tokens.sum()) // (2 * len(self.actors))
        budget = min(max(fair_share, self.batch_tokens), forwards * self.batch_tokens)
        return [order[chunk] for chunk in length_sorted_chunks(tokens, budget)]

    def _each(self, chunks: list[Ids], start: Callable[[Any, Ids], Any]) -> Iterator[tuple[Ids, Any]]:
        """Chunks with what `start(actor, chunk)` returned for them, as they end.

        What is late while an actor has nothing to do is given to that one as well, and the first answer counts: the
        node of an actor may be gone for good, or slow.
        """
        import ray

        waiting, running = deque(range(len(chunks))), _Running(len(self.actors))
        done: set[int] = set()
        while len(done) < len(chunks):
            while waiting and (actor := running.freest()) is not None:
                chunk = waiting.popleft()
                running.add(start(self.actors[actor], chunks[chunk]), actor, chunk)
            ready, _ = ray.wait(list(running.where), num_returns=1, timeout=_LOOK_S)
            for ref in ready:
                chunk = running.remove(ref)
                if chunk in done:
                    continue
                result = _result(ref, len(chunks[chunk]), self.batch_tokens)
                done.add(chunk)
                yield chunks[chunk], result
            if not ready and not waiting and (late := running.late(done)) is not None:
                actor, chunk = late
                log.warning("an evaluation actor is late with %d texts; another one is asked", len(chunks[chunk]))
                running.add(start(self.actors[actor], chunks[chunk]), actor, chunk)


class LocalPool:
    """An encoder of this process where an `EncoderPool` is expected."""

    actors = ()

    def __init__(self, encoder: Encoder, batch_tokens: int | None = None) -> None:
        self._encoder, self._batch_tokens = encoder, batch_tokens
        self.facts = ModelFacts(encoder.dim, encoder.max_tokens, dict(encoder.prompts))
        self.spent = Cost()

    def encode(self, texts: Sequence[str], prompt: str = "") -> Vectors:
        """As `EncoderPool.encode`."""
        started, (unique, places) = time.perf_counter(), distinct(texts)
        vectors = self._encoder.encode(unique, prompt=prompt, batch_tokens=self._batch_tokens)
        self.spent.add(Cost(len(texts), len(unique), encode_s=time.perf_counter() - started))
        return vectors[places]

    def nearest(self, queries: Vectors, texts: Sequence[str], prompt: str, most: int) -> Iterator[tuple[Ids, Vectors]]:
        """As `EncoderPool.nearest`, in one part."""
        if texts:
            yield nearest(queries, self.encode(texts, prompt), most)


class _Running:
    """What is on its way: which actor computes which chunk, and since when."""

    def __init__(self, actors: int) -> None:
        self.where: dict[Any, tuple[int, int, float]] = {}
        self._busy = [0] * actors

    def add(self, ref: Any, actor: int, chunk: int) -> None:
        self.where[ref] = (actor, chunk, time.monotonic())
        self._busy[actor] += 1

    def remove(self, ref: Any) -> int:
        """The chunk of what has ended."""
        actor, chunk, _ = self.where.pop(ref)
        self._busy[actor] -= 1
        return chunk

    def freest(self) -> int | None:
        """The actor with the least to do, if it may have more."""
        actor = min(range(len(self._busy)), key=self._busy.__getitem__)
        return actor if self._busy[actor] < _IN_FLIGHT else None

    def late(self, done: set[int]) -> tuple[int, int] | None:
        """An idle actor and a chunk that only another one has, for longer than it should."""
        idle = next((actor for actor, busy in enumerate(self._busy) if not busy), None)
        chunks = [chunk for _, chunk, _ in self.where.values()]
        now = time.monotonic()
        for _, chunk, since in sorted(self.where.values(), key=lambda one: one[2]):
            if idle is not None and chunk not in done and chunks.count(chunk) == 1 and now - since > _LATE_S:
                return idle, chunk
        return None


def _result(ref: Any, texts: int, batch_tokens: int) -> Any:
    import ray
    from ray import exceptions

    try:
        return ray.get(ref)
    except (exceptions.RayActorError, exceptions.ObjectLostError, exceptions.OutOfMemoryError) as error:
        raise RuntimeError(
            f"an evaluation actor died {_DEATHS} times on the same {texts} texts; out of memory? "
            f"Lower batch_tokens (now {batch_tokens})"
        ) from error


@contextmanager
def encoder_pool(
    model: str | Path,
    *,
    workers: int = 2,
    threads: int = 1,
    cpus: float = 1.0,
    gpus: float = 0.0,
    batch_tokens: int | None = None,
    precision: Precision = "fp32",
    cache: tuple[Path, int, dict[str, Any]] | None = None,
    name: str | None = None,
) -> Iterator[EncoderPool]:
    """Actors that have loaded a model, for the length of a `with` block. Needs a connected Ray.

    Args:
        model: model folder (on storage that every node sees) or Hub id.
        workers: number of actors.
        threads: CPU threads of each actor.
        cpus: logical CPUs that each actor holds, may be fractional.
        gpus: GPUs that each actor holds; above 0 the model runs there.
        batch_tokens: padded tokens per forward; None: what suits the device.
        precision: int8: the variant that `gist-ray export --int8` made, on the CPU.
        cache: where vectors are kept, how many bytes at most, and everything that decides them but the prompt.
        name: of the model, in the metrics; None: `model`.

    Raises:
        InputError: the model cannot be loaded.
        RuntimeError: actors die while they load it.
    """
    import ray

    path = Path(model).expanduser()
    device = "cuda" if gpus else "cpu"
    settings = ActorSettings(
        model=str(path.absolute()) if path.is_dir() else str(model),
        threads=threads,
        device=device,
        precision=precision,
        batch_tokens=batch_tokens or BATCH_TOKENS[device],
        cache_dir=str(cache[0]) if cache else None,
        cache_bytes=cache[1] if cache else 0,
        made_from=cache[2] if cache else None,
        name=name or str(model),
    )
    actor_class = ray.remote(EncoderActor).options(
        num_cpus=cpus, num_gpus=gpus, max_restarts=_RESTARTS, max_task_retries=_DEATHS - 1
    )
    actors = [actor_class.remote(settings) for _ in range(workers)]
    try:
        loaded, facts = _loaded(actors, settings.model)
        yield EncoderPool(loaded, facts, settings.batch_tokens)
    finally:
        for actor in actors:
            ray.kill(actor)


def _loaded(actors: list[Any], model: str) -> tuple[tuple[Any, ...], ModelFacts]:
    """The actors that have loaded the model, and its facts: all of them, unless some are much later than the first."""
    import ray
    from ray import exceptions

    refs = {actor.facts.remote(): actor for actor in actors}
    try:
        [first], _ = ray.wait(list(refs), num_returns=1)
        facts = ray.get(first)
        ready, late = ray.wait(list(refs), num_returns=len(refs), timeout=_LATECOMER_S)
        ray.get(ready)
    except exceptions.RayActorError as error:
        raise RuntimeError(f"evaluation actors die while they load {model}; out of memory?") from error
    except InputError as error:  # Ray's subclass of it, with the remote traceback as message
        raise InputError(str(getattr(error, "cause", error))) from None
    if late:
        log.warning("%d of %d evaluation actors have not started: the cluster is full", len(late), len(actors))
    return tuple(refs[ref] for ref in ready), facts
