"""embed: a file or data set in, its rows with their vectors out, on Ray.

1. Staging: source units become pieces of rows and their texts (`staging.py`).
2. Embedding: actors turn blocks of distinct texts into vectors, sorted by length (`blocks.py`).
3. Parts: each piece's rows meet their vectors, in the input's order (`parts.py`).

Each step leaves whole files under names that depend on the data alone, so a killed run continues where it was and
the result is the same, byte for byte, whatever the number of workers. A step holds one piece or one block.
"""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gist_ray.cluster import connected
from gist_ray.data.embedders import BlockPool
from gist_ray.data.files import shown
from gist_ray.data.sources import Unit, columns_of, content_digest, find_units
from gist_ray.data.staging import check_pieces, unit_reports
from gist_ray.data.texts import TextTable
from gist_ray.embed_config import EmbedConfig
from gist_ray.embedding.blocks import BlockVectors, vectors_fingerprint
from gist_ray.embedding.embedder import check_dimensions, null_row
from gist_ray.embedding.parts import VECTOR, join_npy, join_parquet, write_npy_part, write_parquet_part
from gist_ray.embedding.staging import Staged, kept_schema, stage_all
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.manifest import MANIFEST, digest_of, finished, read_manifest, write_json, write_manifest

log = logging.getLogger(__name__)

KIND = "embeddings"
_VERSION = 1  # rises when the same input makes another output
_WORK = ".work"  # hidden: who reads the folder as a source must not take it for data
_PLACED = "placed"  # from then on, what is at the output's path may be ours though it has no manifest


def embed(config: EmbedConfig, output: str | Path) -> Path:
    """Embed every row of a source and return the output's path; at once if it is already there.

    `output` ends in `.npy` (an array `[rows, width]`), in `.parquet` (the kept columns and `embedding`, a list of
    fixed size), or is a folder that gets `embeddings/part-*.parquet`. Rows come in the input's order, none is left out.
    A folder has its `manifest.json`; that of a file `NAME` is in the folder `.NAME.gist_ray` beside it.

    Raises:
        InputError: bad source, model or settings, rows without a text, or an output made from something else.
    """
    output = _output_path(output)
    about = _about(output)
    if output.suffix == ".npy":
        config = config.model_copy(update={"keep": ()})  # an array has no columns
    units = find_units((config.source,), kind="texts")
    made_from = embed_fingerprint(config, units)
    manifest = _finished(output, about, made_from)
    if manifest:
        _check_rows(config, sum(manifest["bad_rows"].values()), manifest["rows"], manifest["examples"])
        shutil.rmtree(about / _WORK, ignore_errors=True)  # of a run that was killed after its manifest
        return output
    _check_settings(config, output)
    work = _start_or_continue(output, about, made_from)
    log.info("embed: %d source units -> %s", len(units), output)
    with connected(config.cluster):
        staged, blocks = _stage_and_embed(config, units, made_from["vectors"], work)
        parts = _write_parts(config, staged, blocks, work, output)
    _join(parts, work, output)
    facts = {"rows": staged.rows, "texts": sum(block["texts"] for block in blocks), "width": blocks[0]["width"]}
    facts |= {"bad_rows": staged.bad_rows, "examples": staged.examples, "cut": sum(block["cut"] for block in blocks)}
    write_manifest(about, KIND, made_from, **facts)
    shutil.rmtree(work)  # after the manifest: a half-removed folder must never be continued
    _tell(facts, blocks[0]["max_tokens"])
    return output


def embed_fingerprint(config: EmbedConfig, units: list[Unit]) -> dict[str, Any]:
    """What decides the output: source bytes, the columns, all that decides a vector.

    Not how rows without a text are met: an output without any is the same.
    """
    return {
        "version": _VERSION,
        "sources": {f"{i}: {unit.name}": content_digest(unit) for i, unit in enumerate(units)},
        "columns": config.source.columns,
        "max_rows": config.source.max_rows,
        "keep": config.keep,
        "vectors": vectors_fingerprint(config),
    }


# Where it goes -------------------------------------------------------------------------------------------------------


def _output_path(output: str | Path) -> Path:
    if "://" in str(output):
        raise InputError(f"output {shown(str(output))} is not a path; give a local one, or one that all nodes see")
    return Path(output).expanduser().absolute()


def _is_file(output: Path) -> bool:
    return output.suffix in (".npy", ".parquet")


def _about(output: Path) -> Path:
    """The folder of what belongs to an output: itself, or for a file a hidden one beside it."""
    return output.with_name(f".{output.name}.gist_ray") if _is_file(output) else output


def _finished(output: Path, about: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    ours = (read_manifest(about) or {}).get("kind") == KIND
    if ours and not (output if _is_file(output) else output / "embeddings").exists():
        (about / MANIFEST).unlink()  # the user has removed what it speaks of
    return finished(about, KIND, made_from, shown=output)


def _start_or_continue(output: Path, about: Path, made_from: dict[str, Any]) -> Path:
    """Keep the finished files of a killed run of the same making; clear those of any other unfinished run."""
    work, digest = about / _WORK, digest_of(made_from)
    marker = work / "made_from.json"
    same = marker.is_file() and json.loads(marker.read_text(encoding="utf-8"))["digest"] == digest
    there = output.exists() and (_is_file(output) or any(entry.name != _WORK for entry in output.iterdir()))
    if there and not (same and (work / _PLACED).is_file()):
        raise InputError(f"{output} is there already, and not made by `embed`; choose another name, or remove it")
    if not same:
        marker.unlink(missing_ok=True)  # first: what is half removed must not be taken for the marker's work
        shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    write_json(marker, {"digest": digest})
    return work


def _join(parts: list[Path], work: Path, output: Path) -> None:
    """Put finished parts where the user wants them."""
    (work / _PLACED).touch()
    if not _is_file(output):
        shutil.rmtree(output / "embeddings", ignore_errors=True)  # of a run that was killed before its manifest
        (work / "parts").rename(output / "embeddings")
        return
    (join_npy if output.suffix == ".npy" else join_parquet)(parts, work / output.name)
    (work / output.name).replace(output)


# Steps ---------------------------------------------------------------------------------------------------------------


def _check_settings(config: EmbedConfig, output: Path) -> None:
    """What is wrong is said before anything is read."""
    encoder = Encoder.load(config.model, weights=False)
    check_dimensions(config, encoder.dim)
    if output.suffix == ".npy" and config.bad_rows == "null":
        null_row(config.dtype, 1)
    present = columns_of(config.source.model_copy(update={"columns": {}}), kind="texts")
    missing = next((name for name in config.keep or () if present and name not in present), None)
    if missing is not None:
        raise InputError(f"{shown(config.source.path)} has no column `{missing}` to keep; it has {', '.join(present)}")
    if VECTOR in (present if config.keep is None else config.keep):
        raise InputError(f"{shown(config.source.path)} has a column `{VECTOR}` already; keep the others: --keep NAME …")


def _stage_and_embed(
    config: EmbedConfig, units: list[Unit], vectors: dict[str, Any], work: Path
) -> tuple[Staged, list[dict[str, Any]]]:
    """Steps 1 and 2. Where CPUs suffice, actors load their models while the rows are read."""
    import ray

    with ExitStack() as stack:

        def start() -> BlockPool:
            return stack.enter_context(BlockPool(BlockVectors, (config, vectors), config.cluster, "vectors"))

        room = ray.available_resources().get("CPU", 0) >= config.cluster.data_workers + 1
        early = start() if room else None  # actors that hold every CPU would starve the reading tasks in silence
        staged = stage_all(units, config.keep, work)
        if not staged.rows:
            raise InputError(f"{shown(config.source.path)} has no rows")
        _check_rows(config, sum(staged.bad_rows.values()), staged.rows, staged.examples)
        pool = early or start()
        return staged, pool.embed(work / "staging", staged.pieces, staged.texts, work / "vectors")


def _check_rows(config: EmbedConfig, bad_rows: int, rows: int, examples: list[str]) -> None:
    if bad_rows and config.bad_rows == "fail":
        raise InputError(
            f"{bad_rows} of {rows} rows have no text to embed: {'; '.join(examples)}{' …' if bad_rows > 3 else ''}. "
            "Mend them, or leave a null in place of their vectors: --bad-rows null"
        )


def _write_parts(
    config: EmbedConfig, staged: Staged, blocks: list[dict[str, Any]], work: Path, output: Path
) -> list[Path]:
    """Step 3, on Ray Data: a part for each piece, unless a killed run already wrote it."""
    stems = [file.with_suffix("") for file in check_pieces(work / "staging", staged.pieces, "rows")]
    suffix = ".npy" if output.suffix == ".npy" else ".parquet"
    files = [work / "parts" / f"part-{number:05d}{suffix}" for number in range(len(stems))]
    block_rows, width, dtype = [block["texts"] for block in blocks], blocks[0]["width"], config.dtype
    schema = None if suffix == ".npy" else kept_schema(stems)

    def write(number: int) -> dict[str, Any]:
        if not files[number].is_file():
            table = TextTable(work / "vectors", in_place=False, rows=block_rows)
            if suffix == ".npy":
                write_npy_part(stems[number], table, width, dtype, files[number])
            else:
                first_row = sum(staged.piece_rows[:number])
                write_parquet_part(stems[number], first_row, table, width, dtype, schema, files[number])
        return {}

    unit_reports(len(stems), write, shown="rows", unit="piece")
    return files


def _tell(facts: dict[str, Any], max_tokens: int) -> None:
    log.info("embed: %d rows, %d distinct texts", facts["rows"], facts["texts"])
    if facts["cut"]:
        log.warning("embed: %d texts were longer than the model's %d tokens, and were cut", facts["cut"], max_tokens)
    if facts["bad_rows"]:
        log.warning("embed: %d rows have no vector: %s", sum(facts["bad_rows"].values()), "; ".join(facts["examples"]))
