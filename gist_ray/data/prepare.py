"""prepare: triplets in, shards out. Read, validate, deduplicate, tokenize and embed with the guide, once, on Ray.

1. Staging: source units become pieces of rows and their texts (`staging.py`).
2. Embedding: actors turn blocks of texts into distinct texts with tokens and guide vectors (`embedders.py`).
3. Numbering: rows of texts become rows of ids, measured and maybe filtered by what the guide says (`numbering.py`).

Each step leaves whole files under names that depend on the data alone, so a killed run continues where it was and
the result is the same, byte for byte, whatever the number of workers. A step holds one piece or one block, so memory
does not grow with the rows.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gist_ray.cluster import connected
from gist_ray.config import Recipe
from gist_ray.data.embedders import EmbedderPool, guide_fingerprint
from gist_ray.data.files import shown
from gist_ray.data.numbering import Numbered, masked_shares, number_all
from gist_ray.data.report import DATA_REPORT_PAGE, write_data_report
from gist_ray.data.shards import KIND
from gist_ray.data.sources import Unit, content_digest, find_units
from gist_ray.data.staging import Staged, added_rejects, stage_all
from gist_ray.encoder import load_model, model_fingerprint
from gist_ray.errors import InputError
from gist_ray.manifest import digest_of, finished, write_json, write_manifest

log = logging.getLogger(__name__)

_VERSION = 2  # rises when the same input makes other shards: a run must not continue what an older one began
_LIMIT_SHOWN = 3


def prepare(recipe: Recipe) -> Path:
    """Make the shards of a recipe and return their folder; at once if they are already there.

    Raises:
        InputError: bad sources or models, no usable row, or shards made from something else.
    """
    out = recipe.shards_dir()
    units = find_units(recipe.data.sources)
    made_from = shards_fingerprint(recipe, units)
    if finished(out, KIND, made_from):
        shutil.rmtree(out / "staging", ignore_errors=True)  # of a run that was killed after its manifest
        return out
    _start_or_continue(out, made_from)
    log.info("prepare: %d source units -> %s", len(units), out)
    max_tokens = load_model(recipe.student, weights=False).max_tokens
    load_model(recipe.guide, weights=False)  # a wrong guide fails here, before anything is read
    with connected(recipe.cluster):
        staged, blocks = _stage_and_embed(recipe, units, out)
        block_rows = [block["texts"] for block in blocks]
        numbered = number_all(out, units, staged, block_rows, recipe.data.filters, max_tokens)
        masked = masked_shares(out, numbered, block_rows)
    texts = sum(block_rows)
    facts = {
        "tasks": staged.tasks,
        "rows_read": staged.rows + staged.rejected,
        "not_selected": staged.not_selected,
        "triplets": numbered.rows,
        "texts": texts,
        "repeated_texts": staged.occurrences - texts,
        "rejects": _by_reason(added_rejects([staged.rejects, numbered.rejects])),
        "tokens": sum(block["tokens"] for block in blocks),
        "truncated_texts": sum(block["truncated"] for block in blocks),
        "guide_dim": blocks[0]["guide_dim"],
    }
    _report(recipe, out, staged, numbered, masked, facts | {"max_tokens": max_tokens})
    _check_rows(numbered.rows, units, staged.rows + staged.rejected, facts["rejects"], out)
    write_manifest(out, KIND, made_from, **facts)
    shutil.rmtree(out / "staging")  # after the manifest: a half-removed staging folder must never be continued
    return out


def shards_fingerprint(recipe: Recipe, units: list[Unit]) -> dict[str, Any]:
    """What decides the content of the shards: source bytes, data section, student's tokenizer, guide."""
    student = model_fingerprint(recipe.student)
    data = recipe.data.model_dump(mode="json")
    for source in data["sources"]:
        del source["weight"]  # decides the plan, not the shards
        source["path"] = shown(source["path"])  # without credentials: a manifest is shown around
    return {
        "version": _VERSION,
        "sources": {f"{i}: {unit.name}": content_digest(unit) for i, unit in enumerate(units)},
        "data": data,
        "student": {key: student[key] for key in ("tokenizer", "positions", "max_tokens", "lower_case", "prompt")},
        "guide": guide_fingerprint(recipe.guide),
    }


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


def _stage_and_embed(recipe: Recipe, units: list[Unit], out: Path) -> tuple[Staged, list[dict[str, Any]]]:
    """Steps 1 and 2. Where CPUs suffice, actors load their models while the rows are read."""
    import ray

    with ExitStack() as stack:

        def start() -> EmbedderPool:
            pool = EmbedderPool(recipe.guide, recipe.guide_vectors_dir(), recipe.cluster, recipe.student)
            return stack.enter_context(pool)

        room = ray.available_resources().get("CPU", 0) >= recipe.cluster.data_workers + 1
        early = start() if room else None  # actors that hold every CPU would starve the reading tasks in silence
        staged = stage_all(units, recipe.data, out)
        _check_rows(staged.rows, units, staged.rows + staged.rejected, _by_reason(staged.rejects), out)
        if staged.rejected:
            log.warning("prepare: %d rows rejected, see %s", staged.rejected, out / "rejects")
        pool = early or start()
        return staged, pool.embed(out / "staging", staged.pieces, staged.texts, out / "texts")


def _check_rows(usable: int, units: list[Unit], read: int, rejects: dict[str, int], out: Path) -> None:
    if not usable:
        reasons = "; ".join(f"{reason}: {n} rows" for reason, n in list(rejects.items())[:_LIMIT_SHOWN])
        names = ", ".join(unit.name for unit in units[:_LIMIT_SHOWN])
        raise InputError(f"{names}: no usable row out of {read} ({reasons or 'the data set is empty'}), see {out}")


def _by_reason(rejects: dict[str, dict[str, int]]) -> dict[str, int]:
    """Counts by reason, the most frequent first."""
    total = sum((Counter(of_task) for of_task in rejects.values()), Counter[str]())
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def _report(
    recipe: Recipe,
    out: Path,
    staged: Staged,
    numbered: Numbered,
    masked: dict[str, float | None],
    facts: dict[str, Any],
) -> None:
    """`data_report.html` and `data_report.json`."""
    shown = {key: facts[key] for key in ("texts", "truncated_texts", "tokens", "max_tokens", "guide_dim")}
    models = {"student": recipe.student.path, "guide": recipe.guide.path}
    write_data_report(
        out,
        name=recipe.name,
        statistics=numbered.statistics,
        rejects=staged.rejects,
        not_selected=staged.not_selected,
        masked=masked,
        facts=shown | models | {"filters": recipe.data.filters.model_dump()},
    )
    log.info("prepare: what the data are like in %s", out / DATA_REPORT_PAGE)
