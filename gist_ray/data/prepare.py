"""prepare: triplets in, shards out. Read, validate, deduplicate, tokenize and embed with the guide, once, on Ray Data.

1. Reading tasks turn each source unit into staged pieces: rows of text keys, and their texts ordered by key.
2. Guide actors turn each block (a range of keys over all pieces) into one file of distinct texts.
3. Writing tasks replace keys by ids, which are positions in key order.

Each step leaves whole files under names that depend on the data alone, so a killed run continues where it was and
the result is the same, byte for byte, whatever the number of workers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from gist_ray.cluster import connected
from gist_ray.config import ClusterConfig, GuideConfig, ModelConfig, Recipe
from gist_ray.data.shards import (
    KEY_BYTES,
    KIND,
    TextBlock,
    Triplets,
    keys_to_numpy,
    read_keys,
    token_dtype_for,
    write_texts,
    write_triplets,
)
from gist_ray.data.sources import Reject, Triplet, Unit, content_digest, find_units, read_unit
from gist_ray.encoder import Encoder, fingerprint
from gist_ray.errors import InputError
from gist_ray.manifest import digest_of, finished, write_json, write_manifest

log = logging.getLogger(__name__)

_ROWS_PER_PIECE = 65_536
_TEXTS_PER_BLOCK = 2_048
_BUCKETS = 64
_LIMIT_SHOWN = 3


def prepare(recipe: Recipe) -> Path:
    """Make the shards of a recipe and return their folder; at once if they are already there.

    Raises:
        InputError: bad sources or models, no usable row, or shards made from something else.
    """
    out = recipe.shards_dir()
    units = find_units(recipe.data)
    made_from = shards_fingerprint(recipe, units)
    if finished(out, KIND, made_from):
        return out
    _start_or_continue(out, made_from)
    log.info("prepare: %d source units -> %s", len(units), out)
    with connected(recipe.cluster):
        totals = _read_all(recipe, units, out)
        blocks = _embed_all(recipe, totals["texts"], out)
        tasks = _number_rows(recipe, len(units), out)
    texts = sum(block["texts"] for block in blocks)
    write_manifest(
        out,
        KIND,
        made_from,
        tasks=tasks,
        rows_read=totals["rows"] + totals["rejected"],
        triplets=totals["rows"],
        texts=texts,
        repeated_texts=totals["occurrences"] - texts,
        rejects=totals["rejects"],
        tokens=sum(block["tokens"] for block in blocks),
        truncated_texts=sum(block["truncated"] for block in blocks),
        guide_dim=blocks[0]["guide_dim"],
    )
    shutil.rmtree(out / "staging")  # after the manifest: a half-removed staging folder must never be continued
    return out


def shards_fingerprint(recipe: Recipe, units: list[Unit]) -> dict[str, Any]:
    """What decides the content of the shards: source bytes, data section, student's tokenizer, guide."""
    student = model_fingerprint(recipe.student)
    return {
        "sources": {f"{i}: {unit.name}": content_digest(unit) for i, unit in enumerate(units)},
        "data": recipe.data.model_dump(mode="json"),
        "student": {key: student[key] for key in ("tokenizer", "positions", "max_tokens", "lower_case", "prompt")},
        "guide": model_fingerprint(recipe.guide) | {"dtype": "float16"},
    }


def model_fingerprint(model: ModelConfig) -> dict[str, Any]:
    """`encoder.fingerprint` of a recipe's model section."""
    return fingerprint(
        model.path,
        revision=model.revision,
        max_tokens=model.max_tokens,
        pooling=model.pooling,
        prompt=model.prompt,
    )


def load_model(model: ModelConfig, **options: Any) -> Encoder:
    """`Encoder.load` of a recipe's model section."""
    return Encoder.load(
        model.path, revision=model.revision, max_tokens=model.max_tokens, pooling=model.pooling, **options
    )


def text_key(text: str) -> bytes:
    """Identity of a text: 128-bit hash of its exact bytes."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=KEY_BYTES).digest()


def _start_or_continue(out: Path, made_from: dict[str, Any]) -> None:
    """Keep the finished files of a killed run of the same making; clear those of any other unfinished run."""
    marker = out / "staging" / "made_from.json"
    same = marker.is_file() and json.loads(marker.read_text())["digest"] == digest_of(made_from)
    if not same:
        marker.unlink(missing_ok=True)  # first: what is half removed must not be taken for the marker's work
        for part in ("staging", "texts", "triplets", "rejects"):
            shutil.rmtree(out / part, ignore_errors=True)
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_json(marker, {"digest": digest_of(made_from)})


# Step 1: read --------------------------------------------------------------------------------------------------------


def _read_all(recipe: Recipe, units: list[Unit], out: Path) -> dict[str, Any]:
    import ray

    data = recipe.data

    def read(item: dict[str, Any]) -> dict[str, Any]:
        i = int(item["unit"])
        try:
            return _stage_unit(units[i], i, out, data.keep_instructions, data.max_chars)
        except InputError as error:  # as a value: Ray Data would retry it, and bury it in its own error
            return {"report": json.dumps({"error": str(error)})}

    reports = ray.data.from_items([{"unit": i} for i in range(len(units))], override_num_blocks=len(units))
    counts = [json.loads(row["report"]) for row in reports.map(read, num_cpus=1).take_all()]
    if errors := [count["error"] for count in counts if "error" in count]:
        raise InputError("; ".join(errors))
    totals: dict[str, Any] = {key: sum(c[key] for c in counts) for key in ("rows", "texts", "occurrences", "rejected")}
    totals["rejects"] = dict(sum((Counter(c["rejects"]) for c in counts), Counter[str]()))
    if not totals["rows"]:
        reasons = "; ".join(f"{reason}: {n} rows" for reason, n in list(totals["rejects"].items())[:_LIMIT_SHOWN])
        names = ", ".join(unit.name for unit in units[:_LIMIT_SHOWN])
        raise InputError(f"{names}: no usable row out of {totals['rejected']} ({reasons or 'the data set is empty'})")
    if totals["rejected"]:
        log.warning("prepare: %d rows rejected, see %s: %s", totals["rejected"], out / "rejects", totals["rejects"])
    return totals


def _stage_unit(unit: Unit, number: int, out: Path, keep_instructions: bool, max_chars: int) -> dict[str, Any]:
    """Stage one unit, unless a killed run already did; the report file is written last."""
    staging = out / "staging"
    report_file = staging / f"unit-{number:05d}.json"
    if not report_file.is_file():
        (out / "rejects").mkdir(parents=True, exist_ok=True)
        counts: Counter[str] = Counter()
        rejects: Counter[str] = Counter()
        rows = read_unit(unit, keep_instructions=keep_instructions, max_chars=max_chars)
        with (out / "rejects" / f"unit-{number:05d}.jsonl").open("w", encoding="utf-8") as reject_file:
            for piece, triplets in enumerate(_pieces(rows, unit, rejects, reject_file)):
                counts.update(_stage_piece(triplets, staging / f"unit-{number:05d}-{piece:05d}"))
        keys = ("rows", "texts", "occurrences")
        write_json(report_file, {**{k: counts[k] for k in keys}, "rejected": rejects.total(), "rejects": dict(rejects)})
    return {"report": report_file.read_text()}


def _pieces(
    rows: Iterator[Triplet | Reject], unit: Unit, rejects: Counter[str], reject_file: Any
) -> Iterator[list[Triplet]]:
    piece: list[Triplet] = []
    for number, row in enumerate(rows):
        if isinstance(row, Reject):
            rejects[row.reason] += 1
            shown = json.dumps(row.row, default=str)[:2000]
            reject_file.write(json.dumps({"source": unit.name, "row": number, "reason": row.reason, "content": shown}))
            reject_file.write("\n")
            continue
        piece.append(row)
        if len(piece) == _ROWS_PER_PIECE:
            yield piece
            piece = []
    if piece:
        yield piece


def _stage_piece(triplets: list[Triplet], stem: Path) -> dict[str, int]:
    """Write `<stem>.rows` (keys and task of each row) and `<stem>.texts` (distinct texts, one row group a bucket)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts: dict[bytes, str] = {}

    def key(text: str) -> bytes:
        digest = text_key(text)
        texts[digest] = text
        return digest

    binary = pa.binary(KEY_BYTES)
    rows = pa.table(
        {
            "query": pa.array([key(t.query) for t in triplets], binary),
            "positive": pa.array([key(t.positive) for t in triplets], binary),
            "negatives": pa.array([[key(n) for n in t.negatives] for t in triplets], pa.large_list(binary)),
            "task": pa.array([t.task for t in triplets], pa.string()),
        }
    )
    pq.write_table(rows, f"{stem}.rows", compression="zstd")
    ordered = sorted(texts)
    values = pa.array([texts[k] for k in ordered], pa.large_string())
    table = pa.table({"key": pa.array(ordered, binary), "text": values})
    starts = np.searchsorted([k[0] for k in ordered], np.arange(0, 257, 256 // _BUCKETS))
    with pq.ParquetWriter(f"{stem}.texts", table.schema, compression="zstd") as writer:
        for start, stop in itertools.pairwise(starts.tolist()):
            writer.write_table(table.slice(start, stop - start))  # an empty group too: groups are found by number
    occurrences = sum(2 + len(t.negatives) for t in triplets)
    return {"rows": len(triplets), "texts": len(texts), "occurrences": occurrences}


# Step 2: tokenize and embed ------------------------------------------------------------------------------------------


def _embed_all(recipe: Recipe, staged_texts: int, out: Path) -> list[dict[str, Any]]:
    import ray

    blocks = min(_BUCKETS, max(1, -(-staged_texts // _TEXTS_PER_BLOCK)))
    actors, gpus = min(recipe.cluster.data_workers, blocks), recipe.cluster.gpus_per_worker
    dataset = ray.data.from_items([{"block": i} for i in range(blocks)], override_num_blocks=blocks)
    done = dataset.map_batches(
        _BlockEmbedder,
        fn_constructor_args=(recipe.student, recipe.guide, recipe.cluster, blocks, str(out)),
        batch_size=1,
        num_cpus=1,
        num_gpus=gpus or None,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    bar = tqdm(done.iter_rows(), total=blocks, desc="guide vectors", unit="block", disable=None)
    return sorted((json.loads(row["report"]) for row in bar), key=lambda report: int(report["block"]))


class _BlockEmbedder:
    """Actor: one block number in, one `texts/block-*.arrow` out, unless a killed run already wrote it."""

    def __init__(self, student: ModelConfig, guide: GuideConfig, cluster: ClusterConfig, blocks: int, out: str) -> None:
        import torch

        torch.set_num_threads(cluster.data_threads)
        self._student, self._guide_config = student, guide
        # The student is loaded for its tokenizer and limits; its weights are freed at once.
        self._tokenizer = load_model(student)
        self._token_dtype = token_dtype_for(len(self._tokenizer.tokenizer))
        self._tokenizer.model = None
        self._guide = load_model(guide, device="cuda" if cluster.gpus_per_worker else "cpu")
        self._blocks, self._out = blocks, Path(out)

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, list[str]]:
        return {"report": [json.dumps(self._embed(int(block))) for block in batch["block"]]}

    def _embed(self, number: int) -> dict[str, Any]:
        file = self._out / "texts" / f"block-{number:05d}.arrow"
        report_file = self._out / "staging" / f"block-{number:05d}.json"
        if not (file.is_file() and report_file.is_file()):
            keys, texts = _distinct_texts(self._out / "staging", number, self._blocks)
            whole = self._tokenizer.tokenize(texts, prompt=self._student.prompt, truncate=False)
            tokens = self._tokenizer.tokenize(texts, prompt=self._student.prompt)
            guide = self._guide.encode(
                texts, prompt=self._guide_config.prompt, batch_tokens=self._guide_config.batch_tokens
            )
            write_texts(file, TextBlock(keys, tokens, guide.astype(np.float16), texts), self._token_dtype)
            report = {
                "block": number,
                "texts": len(texts),
                "tokens": sum(map(len, tokens)),
                "truncated": sum(len(w) > len(t) for w, t in zip(whole, tokens, strict=True)),
                "guide_dim": self._guide.dim,
            }
            write_json(report_file, report)
        loaded: dict[str, Any] = json.loads(report_file.read_text())
        return loaded


def _distinct_texts(staging: Path, number: int, blocks: int) -> tuple[npt.NDArray[np.bytes_], list[str]]:
    """Keys and texts of one block: its range of buckets over all staged pieces, each text once, in key order."""
    import pyarrow.parquet as pq

    buckets = range(number * _BUCKETS // blocks, (number + 1) * _BUCKETS // blocks)
    found: dict[bytes, str] = {}
    for piece in sorted(staging.glob("unit-*.texts")):
        table = pq.ParquetFile(piece).read_row_groups(list(buckets))
        found.update(zip(table["key"].to_pylist(), table["text"].to_pylist(), strict=True))
    ordered = sorted(found)
    return np.array(ordered, dtype=f"S{KEY_BYTES}"), [found[key] for key in ordered]


# Step 3: number ------------------------------------------------------------------------------------------------------


def _number_rows(recipe: Recipe, units: int, out: Path) -> list[str]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    import ray

    pieces = sorted((out / "staging").glob("unit-*.rows"))
    columns = [pq.read_table(piece, columns=["task"])["task"] for piece in pieces]
    tasks = sorted({task for column in columns for task in pc.unique(column).to_pylist()})

    def number(item: dict[str, Any]) -> dict[str, Any]:
        i = int(item["piece"])
        write_triplets(out / "triplets" / f"part-{i:05d}.arrow", _numbered(pieces[i], read_keys(out), tasks))
        return item

    items = ray.data.from_items([{"piece": i} for i in range(len(pieces))], override_num_blocks=len(pieces))
    items.map(number, num_cpus=1).take_all()
    return tasks


def _numbered(piece: Path, keys: npt.NDArray[np.bytes_], tasks: list[str]) -> Triplets:
    import pyarrow.parquet as pq

    table = pq.read_table(piece).combine_chunks()

    def ids(column: Any) -> npt.NDArray[np.int64]:
        wanted = keys_to_numpy(column)
        found = np.searchsorted(keys, wanted)
        assert np.array_equal(keys[found], wanted), "a staged row refers to a text that no block holds"
        return found.astype(np.int64)

    negatives = table["negatives"].chunk(0)
    codes = {task: i for i, task in enumerate(tasks)}
    return Triplets(
        query=ids(table["query"].chunk(0)),
        positive=ids(table["positive"].chunk(0)),
        negative_starts=negatives.offsets.to_numpy().astype(np.int64),
        negatives=ids(negatives.values),
        task=np.array([codes[task] for task in table["task"].to_pylist()], dtype=np.int64),
    )
