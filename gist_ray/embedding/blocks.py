"""Blocks: actors that turn blocks of staged texts into files of their vectors, in the type asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from gist_ray.chunks import BATCH_TOKENS
from gist_ray.data.embedders import BlockActor
from gist_ray.data.texts import Keys, key_column, write_arrow
from gist_ray.embed_config import EmbedConfig
from gist_ray.embedding.embedder import Rows, TextEmbedder, prompt_of
from gist_ray.encoder import fingerprint
from gist_ray.errors import InputError
from gist_ray.int8 import int8_file
from gist_ray.manifest import digest_files
from gist_ray.serving.engine import chosen_backend


def device_of(config: EmbedConfig) -> str:
    """Where the actors compute."""
    return "cuda" if config.cluster.gpus_per_worker else "cpu"


def vectors_fingerprint(config: EmbedConfig) -> dict[str, Any]:
    """Everything that decides a text's vector. `version` rises when the same settings give others.

    Raises:
        InputError: no such model, prompt or int8 variant, or a backend that does not compute in this precision.
    """
    device = device_of(config)
    model = fingerprint(config.model, revision=None, max_tokens=None, pooling=None, prompt="")
    made = {
        "prompt": prompt_of(config, model["prompts"]),
        "backend": chosen_backend(config.backend, config.precision, device),
        "batch_tokens": config.batch_tokens or BATCH_TOKENS[device],  # decides the padding, hence the last bits
        "version": 1,
    }
    if config.precision == "int8":
        file = int8_file(config.model)
        made["int8"] = digest_files([file, file.with_suffix(".bin")])
    return model | made | config.model_dump(include={"dimensions", "dtype", "precision"})


class BlockVectors(BlockActor):
    """Blocks of keys and vectors."""

    def __init__(self, config: EmbedConfig, expected: dict[str, Any]) -> None:
        super().__init__()
        try:
            if vectors_fingerprint(config) != expected:
                raise InputError(f"{config.model} is another model on this node; give all nodes the same files")
            threads = config.cluster.data_threads
            self._embedder = TextEmbedder.load(config, threads=threads, device=device_of(config))
        except InputError as error:
            self._error = str(error)

    def _write(self, keys: Keys, texts: list[str], file: Path) -> tuple[dict[str, Any], int]:
        rows, cut = self._embedder.embed(texts)
        write_arrow(file, {"key": key_column(keys), "vector": vector_column(rows)})
        return {"width": rows.shape[1], "cut": cut, "max_tokens": self._embedder.max_tokens}, 0


def vector_column(rows: Rows, *, mask: Any = None) -> Any:
    """Rows `[n, width]` as an Arrow column of lists of fixed size; null where `mask [n]` is true."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1], mask=mask)


def vector_rows(column: Any) -> Rows:
    """What `vector_column` was made of, read in place."""
    flat: Rows = column.flatten().to_numpy()
    return flat.reshape(len(column), column.type.list_size)
