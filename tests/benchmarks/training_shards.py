"""Rows, models and shards of the training benchmark: real texts, real guide vectors, in a folder of their own."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from data import SHARED, minilm

from gist_ray.config import Recipe
from gist_ray.recipe_file import parse_recipe

ROLES = ("query", "pos", "neg")
MAX_TOKENS = 128
SHORT, MIXED = ("esnli",), ("medquad", "trivia")

Row = dict[str, Any]
Embed = Callable[[list[str]], np.ndarray]


@functools.cache
def work_folder() -> Path:
    """A temporary folder that goes when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="gist-ray-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def mpnet() -> str:
    """all-mpnet-base-v2: below the folder of `GIST_RAY_MODELS`, or from the Hub."""
    folder = Path(os.environ.get("GIST_RAY_MODELS", Path.home() / ".cache" / "gist-ray" / "models"))
    local = folder / "all-mpnet-base-v2"
    return str(local) if local.is_dir() else "sentence-transformers/all-mpnet-base-v2"


def random_bert(name: str, layers: int, dim: int, heads: int) -> str:
    """A BERT with random weights and MiniLM's tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from gist_ray.encoder import Encoder

    folder = work_folder() / name
    if not folder.is_dir():
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(minilm())
        config = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * dim,
        )
        Encoder(BertModel(config).eval(), tokenizer, "mean", MAX_TOKENS).save(folder)
    return str(folder)


def real_rows(files: tuple[str, ...], count: int) -> list[Row]:
    """`count` rows of training files, drawn at random. Where there are fewer, copies with texts of their own."""
    rows = [
        {key: row[key] for key in (*ROLES, "task_name")}
        for name in files
        for row in pq.read_table(SHARED / "train" / f"{name}.parquet").to_pylist()
        if row["neg"] and row["query"] != row["pos"]
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    found = []
    for place in range(count):
        copy, row = place // len(rows), rows[order[place % len(rows)]]
        found.append(row if not copy else row | {role: f"{row[role]} {copy}" for role in ROLES})
    return found


def distinct_rows(files: tuple[str, ...], count: int) -> list[Row]:
    """`count` real rows that share no text."""
    seen: set[str] = set()
    found: list[Row] = []
    for row in real_rows(files, 3 * count):
        texts = {row[role] for role in ROLES}
        if len(texts) == len(ROLES) and not texts & seen:
            found.append(row)
            seen |= texts
    assert len(found) >= count, "too many repeated texts"
    return found[:count]


def recipe_for(name: str, guide: str, **sections: dict[str, Any]) -> Recipe:
    """A recipe whose student is all-MiniLM-L6-v2."""
    source = work_folder() / f"{name}.parquet"
    tree = {
        "name": name,
        "output_dir": str(work_folder()),
        "data": {"sources": [{"path": str(source)}]},
        "student": {"path": str(minilm()), "max_tokens": MAX_TOKENS},
        "guide": {"path": guide, "max_tokens": MAX_TOKENS},
    }
    return parse_recipe(tree | sections)


def write_shards(recipe: Recipe, rows: list[Row], embed: Embed) -> Recipe:
    """Write the shards that `prepare` would, with guide vectors `[n, dim]` by `embed`; returns the recipe."""
    from gist_ray.data.embedders import tokens_and_lengths
    from gist_ray.data.shards import KIND, NO_LABEL, Triplets, token_dtype_for, write_triplets
    from gist_ray.data.texts import KEY_BYTES, TextBlock, text_key
    from gist_ray.encoder import load_model
    from gist_ray.manifest import write_manifest

    folder = recipe.shards_dir()
    keyed = sorted((text_key(text), text) for text in {row[role] for row in rows for role in ROLES})
    texts = [text for _, text in keyed]
    ids = {text: place for place, text in enumerate(texts)}
    student = load_model(recipe.student, weights=False)
    vectors = embed(texts).astype(np.float16)
    keys = np.array([key for key, _ in keyed], dtype=f"S{KEY_BYTES}")
    block = TextBlock(keys, texts, vectors, *tokens_and_lengths(student, texts, ""))
    block.write(folder / "texts" / "block-00000.arrow", token_dtype_for(len(student.tokenizer)))
    tasks = sorted({row["task_name"] for row in rows})
    query, positive, negative = (np.array([ids[row[role]] for row in rows]) for role in ROLES)
    task = np.array([tasks.index(row["task_name"]) for row in rows])
    source, no_label = np.zeros(len(rows), dtype=np.int64), np.full(len(rows), NO_LABEL)
    triplets = Triplets(query, positive, np.arange(len(rows) + 1), negative, task, source, no_label)
    write_triplets(folder / "triplets" / "part-00000000.arrow", triplets)
    write_manifest(folder, KIND, {"benchmark": recipe.name}, tasks=tasks, guide_dim=vectors.shape[1])
    return recipe


_embedded: dict[str, dict[str, np.ndarray]] = {}


def embedder(guide: str) -> Embed:
    """The guide's own vectors, each text computed once for all sections."""

    def embed(texts: list[str]) -> np.ndarray:
        from gist_ray.encoder import Encoder

        known = _embedded.setdefault(guide, {})
        missing = [text for text in texts if text not in known]
        if missing:
            vectors = Encoder.load(guide, max_tokens=MAX_TOKENS).encode(missing)
            known.update(zip(missing, vectors, strict=True))
        return np.stack([known[text] for text in texts])

    return embed


def widened(embed: Embed, dim: int) -> Embed:
    """The same similarities in vectors of `dim` numbers: a wider guide with realistic masks."""

    def wide(texts: list[str]) -> np.ndarray:
        vectors = embed(texts)
        return np.pad(vectors, ((0, 0), (0, dim - vectors.shape[1])))

    return wide


def random_vectors(dim: int) -> Embed:
    """Random unit vectors, where only sizes matter."""

    def embed(texts: list[str]) -> np.ndarray:
        vectors = np.random.default_rng(0).standard_normal((len(texts), dim), dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return embed
