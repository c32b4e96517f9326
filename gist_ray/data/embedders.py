"""Embedders: actors that turn blocks of staged texts into files of distinct texts with tokens and guide vectors.

`BlockPool` and `BlockActor` are the part that does not know which vectors: `gist_ray.embedding` has others.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Self  # that of `typing` is not there before Python 3.11

from gist_ray.config import ClusterConfig, GuideConfig, ModelConfig
from gist_ray.counted import counted
from gist_ray.data.guide_vectors import GuideVectors
from gist_ray.data.shards import token_dtype_for
from gist_ray.data.staging import check_pieces
from gist_ray.data.texts import Keys, TextBlock, block_texts, num_blocks
from gist_ray.encoder import Encoder, TokenIds, load_model, model_fingerprint
from gist_ray.errors import InputError
from gist_ray.manifest import write_json

log = logging.getLogger(__name__)

_TEXT_SHOWN = 100


def guide_fingerprint(guide: GuideConfig) -> dict[str, Any]:
    """What decides a stored guide vector, its type included. `version` rises when one guide gives other vectors."""
    return model_fingerprint(guide) | {"dtype": "float16", "version": 1}


class BlockPool:
    """`cluster.data_workers` actors, each with its model loaded once. A `with` block; the actors end with it."""

    def __init__(self, actor: type[BlockActor], arguments: tuple[Any, ...], cluster: ClusterConfig, shown: str) -> None:
        """Start actors of `arguments`. `shown` is what the progress bar says they make."""
        import ray

        gpus = cluster.gpus_per_worker
        # A dead actor is restarted and its block done again: a block is whole or absent, so once more does no harm.
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=cluster.max_failures, max_task_retries=-1)(actor)
        self._actors = [remote.remote(*arguments) for _ in range(actors_that_fit(cluster))]
        self._shown = shown

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def embed(self, staging: Path, pieces: list[str], staged_texts: int, out: Path) -> list[dict[str, Any]]:
        """Write `out/block-*.arrow` from the texts of the staged pieces; return a report of each, in block order.

        Blocks that a killed run finished are not done again.

        Raises:
            InputError: a worker met bad input: a model it cannot load, a piece it cannot see, a text without a vector.
        """
        import ray
        from ray.util import ActorPool

        blocks = num_blocks(staged_texts)
        out.mkdir(parents=True, exist_ok=True)
        names = ray.put(pieces)
        items = [(number, blocks, staging, names, out) for number in range(blocks)]
        done = ActorPool(self._actors).map_unordered(lambda actor, item: actor.embed.remote(*item), items)
        reports = []
        for report in counted(done, blocks, self._shown, "block"):
            if "error" in report:
                raise InputError(report["error"])
            reports.append(report)
        embedded, reused = (sum(report[key] for report in reports) for key in ("embedded", "reused"))
        log.info("%s: %d texts embedded, %d found from earlier runs", self._shown, embedded, reused)
        return sorted(reports, key=lambda report: int(report["block"]))


class EmbedderPool(BlockPool):
    """Actors with the guide."""

    def __init__(
        self, guide: GuideConfig, vectors_dir: Path, cluster: ClusterConfig, student: ModelConfig | None = None
    ) -> None:
        arguments = (guide, guide_fingerprint(guide), vectors_dir, cluster, student)
        super().__init__(BlockEmbedder, arguments, cluster, "guide vectors")


class BlockActor(ABC):
    """One block of texts in, one file out, unless a killed run already wrote it."""

    def __init__(self) -> None:
        self._pieces: list[Path] = []
        self._error = ""
        """What prevents every block. Kept for the first one: an actor that fails before only says that it died."""

    def embed(self, number: int, blocks: int, staging: Path, pieces: list[str], out: Path) -> dict[str, Any]:
        """Make one block; bad input comes back as a value, because an actor would bury it in an error of its own."""
        if self._error:
            return {"error": self._error}
        try:
            self._pieces = self._pieces or check_pieces(staging, pieces, "texts")
            return self._embed(number, blocks, out / f"block-{number:05d}.arrow", staging / f"block-{number:05d}.json")
        except InputError as error:
            return {"error": str(error)}

    def _embed(self, number: int, blocks: int, file: Path, report_file: Path) -> dict[str, Any]:
        if file.is_file() and report_file.is_file():
            report: dict[str, Any] = json.loads(report_file.read_text())
            return report | {"embedded": 0, "reused": 0}
        keys, texts = block_texts(self._pieces, number, blocks)
        facts, reused = self._write(keys, texts, file)
        report = {"block": number, "texts": len(texts)} | facts
        write_json(report_file, report)
        return report | {"embedded": len(texts) - reused, "reused": reused}

    @abstractmethod
    def _write(self, keys: Keys, texts: list[str], file: Path) -> tuple[dict[str, Any], int]:
        """Write the file of a block; facts for its report, and how many texts had not to be embedded."""


class BlockEmbedder(BlockActor):
    """Blocks of guide vectors, and maybe of the student's tokens."""

    def __init__(
        self,
        guide: GuideConfig,
        expected: dict[str, Any],
        vectors_dir: Path,
        cluster: ClusterConfig,
        student: ModelConfig | None,
    ) -> None:
        import torch

        super().__init__()
        torch.set_num_threads(cluster.data_threads)
        self._guide_config, self._student_config = guide, student
        try:
            if guide_fingerprint(guide) != expected:
                raise InputError(f"guide {guide.path} is another model on this node; give all nodes the same files")
            self._student = load_model(student, weights=False) if student else None
            self._guide = load_model(guide, device="cuda" if cluster.gpus_per_worker else "cpu")
            self._vectors = GuideVectors(vectors_dir, expected)
        except InputError as error:
            self._error = str(error)

    def _write(self, keys: Keys, texts: list[str], file: Path) -> tuple[dict[str, Any], int]:
        vectors, reused = self._guide_vectors(keys, texts)
        tokens, whole = self._tokens(texts)
        dtype = token_dtype_for(len(self._student.tokenizer)) if self._student else "uint32"
        TextBlock(keys, texts, vectors, tokens, whole).write(file, dtype)
        facts = {"guide_dim": self._guide.dim}
        if tokens is not None and whole is not None:
            cut = np.array([len(row) for row in tokens], dtype=np.int64)
            facts |= {"tokens": int(cut.sum()), "truncated": int((whole > cut).sum())}
        return facts, reused

    def _guide_vectors(self, keys: Keys, texts: list[str]) -> tuple[npt.NDArray[np.float16], int]:
        """Vectors `[n, guide_dim]` of a block, and how many of them the store already had."""
        vectors = np.empty((len(texts), self._guide.dim), dtype=np.float16)
        found, known = self._vectors.find(keys)
        if known is not None:
            vectors[found] = known
        missing = np.flatnonzero(~found)
        if len(missing):
            encoded = self._guide.encode(
                [texts[i] for i in missing],
                prompt=self._guide_config.prompt,
                batch_tokens=self._guide_config.batch_tokens,
            )
            check_vectors(encoded, [texts[i] for i in missing], f"guide {self._guide_config.path}")
            vectors[missing] = encoded
            self._vectors.add(keys[missing], vectors[missing])
        return vectors, len(texts) - len(missing)

    def _tokens(self, texts: list[str]) -> tuple[list[TokenIds] | None, npt.NDArray[np.int64] | None]:
        """The student's tokens of each text, and their number before the cut."""
        if self._student is None or self._student_config is None:
            return None, None
        return tokens_and_lengths(self._student, texts, self._student_config.prompt)


def check_vectors(vectors: npt.NDArray[np.float32], texts: Sequence[str], model: str) -> None:
    """Before they are kept: a vector of zeros or not-a-numbers would be found for ever, and hide nothing.

    Raises:
        InputError: `model` gave one for the text that it names.
    """
    whole = np.isfinite(vectors).all(axis=1) & (np.abs(vectors).max(axis=1, initial=0) > 0)
    if not whole.all():
        raise InputError(
            f"{model} gives no vector (not a number, or all zeros) for the text "
            f"{texts[int(np.argmin(whole))][:_TEXT_SHOWN]!r}; check its weights, or leave such texts out"
        )


def actors_that_fit(cluster: ClusterConfig) -> int:
    """`cluster.data_workers`, or as many as the cluster can hold: work given to an actor that never starts is lost.

    Raises:
        InputError: not even one fits.
    """
    import ray

    total = ray.cluster_resources()
    fit = int(total.get("CPU", 0))
    if cluster.gpus_per_worker:
        fit = min(fit, int(total.get("GPU", 0) / cluster.gpus_per_worker))
    if fit < 1:
        raise InputError(
            f"the Ray cluster has {total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs, an actor takes 1 CPU "
            f"and {cluster.gpus_per_worker:g} GPUs; lower cluster.gpus_per_worker or use a larger cluster"
        )
    if fit < cluster.data_workers:
        log.warning("cluster.data_workers is %d; the Ray cluster holds %d, using those", cluster.data_workers, fit)
    return min(fit, cluster.data_workers)


def tokens_and_lengths(student: Encoder, texts: list[str], prompt: str) -> tuple[list[TokenIds], npt.NDArray[np.int64]]:
    """Tokens of each text cut at the student's limit, and how many there were before the cut, `[n]`."""
    tokens = student.tokenize(texts, prompt=prompt)
    whole = np.array([len(row) for row in tokens], dtype=np.int64)
    full = np.flatnonzero(whole == student.max_tokens)  # only these can have been cut
    whole[full] = [len(row) for row in student.tokenize([texts[i] for i in full], prompt=prompt, truncate=False)]
    return tokens, whole
