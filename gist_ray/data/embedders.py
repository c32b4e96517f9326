"""Embedders: actors that turn blocks of staged texts into files of distinct texts with tokens and guide vectors."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from gist_ray.config import ClusterConfig, GuideConfig, ModelConfig
from gist_ray.data.guide_vectors import GuideVectors
from gist_ray.data.shards import token_dtype_for
from gist_ray.data.texts import Keys, TextBlock, block_texts, num_blocks
from gist_ray.encoder import Encoder, TokenIds, load_model, model_fingerprint
from gist_ray.errors import InputError
from gist_ray.manifest import write_json

log = logging.getLogger(__name__)


def guide_fingerprint(guide: GuideConfig) -> dict[str, Any]:
    """What decides a stored guide vector, its type included."""
    return model_fingerprint(guide) | {"dtype": "float16"}


class EmbedderPool:
    """`cluster.data_workers` actors, each with the guide loaded once. A `with` block; the actors end with it."""

    def __init__(
        self, guide: GuideConfig, vectors_dir: Path, cluster: ClusterConfig, student: ModelConfig | None = None
    ) -> None:
        import ray

        gpus = cluster.gpus_per_worker
        # A dead actor is restarted and its block done again: a block is whole or absent, so once more does no harm.
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=cluster.max_failures, max_task_retries=-1)
        actor = remote(BlockEmbedder)
        self._actors = [actor.remote(guide, vectors_dir, cluster, student) for _ in range(cluster.data_workers)]

    def __enter__(self) -> EmbedderPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def embed(self, staging: Path, staged_texts: int, out: Path) -> list[dict[str, Any]]:
        """Write `out/block-*.arrow` from the texts of `staging/*.texts`; return a report of each, in block order.

        Blocks that a killed run finished are not done again.

        Raises:
            InputError: a worker met bad input.
        """
        from ray.util import ActorPool

        blocks = num_blocks(staged_texts)
        out.mkdir(parents=True, exist_ok=True)
        items = [(number, blocks, staging, out) for number in range(blocks)]
        done = ActorPool(self._actors).map_unordered(lambda actor, item: actor.embed.remote(*item), items)
        reports = []
        with tqdm(total=blocks, desc="guide vectors", unit="block", disable=None) as bar:
            for report in done:
                if "error" in report:
                    raise InputError(report["error"])
                reports.append(report)
                bar.update()
        embedded, reused = (sum(report[key] for report in reports) for key in ("embedded", "reused"))
        log.info("guide vectors: %d texts embedded, %d found from earlier runs", embedded, reused)
        return sorted(reports, key=lambda report: int(report["block"]))


class BlockEmbedder:
    """One block of texts in, one file out, unless a killed run already wrote it."""

    def __init__(
        self, guide: GuideConfig, vectors_dir: Path, cluster: ClusterConfig, student: ModelConfig | None
    ) -> None:
        import torch

        torch.set_num_threads(cluster.data_threads)
        self._guide_config, self._student_config = guide, student
        self._student = load_model(student, weights=False) if student else None
        self._guide = load_model(guide, device="cuda" if cluster.gpus_per_worker else "cpu")
        self._vectors = GuideVectors(vectors_dir, guide_fingerprint(guide))
        self._pieces: list[Path] = []

    def embed(self, number: int, blocks: int, staging: Path, out: Path) -> dict[str, Any]:
        """Make one block; bad input comes back as a value, because an actor would bury it in an error of its own."""
        try:
            self._pieces = self._pieces or sorted(staging.glob("*.texts"))
            return self._embed(number, blocks, out / f"block-{number:05d}.arrow", staging / f"block-{number:05d}.json")
        except InputError as error:
            return {"error": str(error)}

    def _embed(self, number: int, blocks: int, file: Path, report_file: Path) -> dict[str, Any]:
        if file.is_file() and report_file.is_file():
            report: dict[str, Any] = json.loads(report_file.read_text())
            return report | {"embedded": 0, "reused": 0}
        keys, texts = block_texts(self._pieces, number, blocks)
        vectors, reused = self._guide_vectors(keys, texts)
        tokens, whole = self._tokens(texts)
        dtype = token_dtype_for(len(self._student.tokenizer)) if self._student else "uint32"
        TextBlock(keys, texts, vectors, tokens, whole).write(file, dtype)
        report = {"block": number, "texts": len(texts), "guide_dim": self._guide.dim}
        if tokens is not None and whole is not None:
            cut = np.array([len(row) for row in tokens], dtype=np.int64)
            report |= {"tokens": int(cut.sum()), "truncated": int((whole > cut).sum())}
        write_json(report_file, report)
        return report | {"embedded": len(texts) - reused, "reused": reused}

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
            ).astype(np.float16)
            self._vectors.add(keys[missing], encoded)
            vectors[missing] = encoded
        return vectors, len(texts) - len(missing)

    def _tokens(self, texts: list[str]) -> tuple[list[TokenIds] | None, npt.NDArray[np.int64] | None]:
        """The student's tokens of each text, and their number before the cut."""
        if self._student is None or self._student_config is None:
            return None, None
        return tokens_and_lengths(self._student, texts, self._student_config.prompt)


def tokens_and_lengths(student: Encoder, texts: list[str], prompt: str) -> tuple[list[TokenIds], npt.NDArray[np.int64]]:
    """Tokens of each text cut at the student's limit, and how many there were before the cut, `[n]`."""
    tokens = student.tokenize(texts, prompt=prompt)
    whole = np.array([len(row) for row in tokens], dtype=np.int64)
    full = np.flatnonzero(whole == student.max_tokens)  # only these can have been cut
    whole[full] = [len(row) for row in student.tokenize([texts[i] for i in full], prompt=prompt, truncate=False)]
    return tokens, whole
