"""mine: labelled texts or pairs in, triplets out, with the guide's help, on Ray.

1. Staging: source units become pieces of rows and their texts.
2. Embedding: actors turn blocks of texts into distinct texts with guide vectors (`embedders.py`).
3. Indexing: rows become ids, a few integers a row, in the order that mining wants (`mining.py`).
4. Mining: actors take tiles of queries, stream the candidates past them and write triplets (`miners.py`).

Tiles and draws are decided by the data alone, so the triplets are the same, byte for byte, whatever the number of
workers; each step leaves whole files, so a killed run continues where it was.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gist_ray.cluster import connected
from gist_ray.config import DataConfig
from gist_ray.counted import counted
from gist_ray.data.embedders import EmbedderPool, actors_that_fit, guide_fingerprint
from gist_ray.data.files import shown
from gist_ray.data.miners import LABELS, QUERIES_PER_TILE, PartMiner
from gist_ray.data.mining import Hashes, Ids, LabelIndex, PairIndex, cut
from gist_ray.data.sources import Labelled, Reject, Unit, columns_of, content_digest, find_units, read_labelled
from gist_ray.data.staging import (
    CHARS_PER_PIECE,
    ROWS_PER_PIECE,
    RejectLog,
    Staged,
    added_rejects,
    check_pieces,
    piece_names,
    stage_all,
    task_codes,
    unit_reports,
)
from gist_ray.data.texts import Piece, TextTable, keys_to_numpy, read_arrow, text_key, write_arrow
from gist_ray.encoder import load_model
from gist_ray.errors import InputError
from gist_ray.manifest import digest_of, finished, write_json, write_manifest
from gist_ray.mine_config import MineConfig

log = logging.getLogger(__name__)

KIND = "triplets"
_VERSION = 2  # rises when the same input makes other triplets
_WORK = ".work"  # hidden: a run that reads this folder as a source must not take it for data
_PARTS = 32  # about so many files, so that workers have equal shares; larger data have larger files, up to
_TILES_PER_PART = 64
_UNNAMED = "default"  # what sources call the task of a row that names none


def mine(config: MineConfig, output: Path) -> Path:
    """Make triplets and return their folder, which `prepare` reads as a source; at once if they are already there.

    `output` gets `triplets-*.parquet`, `rejects/unit-*.log` (JSON lines) and a manifest with the counts. Rows are
    ordered by task, then label or query, not as in the source. Labels and candidates of different tasks never mix; a
    labelled row without a task is of the task that the source's file or folder names.

    Raises:
        InputError: bad source, guide or settings, no triplet, or an output made from something else.
    """
    output = Path(output).expanduser().absolute()
    kind = _kind(config)
    units = find_units((config.source,), kind="labels" if kind == "labels" else "triplets")
    made_from = mine_fingerprint(config, kind, units)
    if finished(output, KIND, made_from):
        shutil.rmtree(output / _WORK, ignore_errors=True)  # of a run that was killed after its manifest
        return output
    load_model(config.guide, weights=False)  # a wrong guide fails here, before anything is read
    work = _start_or_continue(output, made_from)
    log.info("mine: %d source units, by %s -> %s", len(units), kind, output)
    with connected(config.cluster):
        if kind == "labels":
            staged = _stage_labels(units, config.max_chars, work)
        else:
            staged = stage_all(units, DataConfig(sources=(config.source,), max_chars=config.max_chars), work)
        _check_rows(staged, units)
        vectors_dir = Path(config.guide.vectors_dir or output.parent / "guide-vectors").expanduser().absolute()
        with EmbedderPool(config.guide, vectors_dir, config.cluster) as pool:
            blocks = pool.embed(work / "staging", staged.pieces, staged.texts, work / "texts")
        tasks, facts = (_index_labels if kind == "labels" else _index_pairs)(work, staged.pieces)
        counts = _mine_all(config, kind, tasks, work, output)
    if not counts["triplets"]:
        raise InputError(f"{units[0].name}: no triplet: each of its {facts['labels']} labels has one text")
    facts |= {"tasks": tasks, "rows_read": staged.rows + staged.rejected, "not_selected": staged.not_selected}
    reasons = sum((Counter(of_task) for of_task in staged.rejects.values()), Counter[str]())
    facts |= {"rejects": dict(sorted(reasons.items())), "texts": sum(block["texts"] for block in blocks)}
    log.info("mine: %d triplets, %d without a negative", counts["triplets"], counts["without_negative"])
    _keep_rejects(work, output)
    write_manifest(output, KIND, made_from, **counts, **facts)
    shutil.rmtree(work)  # after the manifest: a half-removed folder must never be continued
    return output


def mine_fingerprint(config: MineConfig, kind: str, units: list[Unit]) -> dict[str, Any]:
    """What decides the triplets: source bytes, the guide, every setting but the cluster."""
    settings = config.model_dump(mode="json", exclude={"cluster", "guide", "source"})
    source = config.source.model_dump(mode="json", exclude={"path", "weight"})
    return {
        "version": _VERSION,
        "sources": {f"{i}: {unit.name}": content_digest(unit) for i, unit in enumerate(units)},
        "source": source | {"default_task": _default_task(config.source.path)},
        "settings": settings | {"kind": kind},
        "guide": guide_fingerprint(config.guide),
    }


def _kind(config: MineConfig) -> str:
    """`labels` or `pairs`, with settings that fit it."""
    kind: str = config.kind
    if kind == "auto":
        columns = set(columns_of(config.source))
        labelled = "text" in columns and bool(columns & {"label", "label_text"})
        found = [name for name, fits in (("labels", labelled), ("pairs", {"query", "pos"} <= columns)) if fits]
        if len(found) != 1:
            raise InputError(
                f"{shown(config.source.path)} has the columns {', '.join(sorted(columns)) or 'none'}; mining takes "
                "`text` and `label`, or `query` and `pos`. Map them with source.columns"
                + (", and say which with kind: labels or pairs" if found else "")
            )
        kind = found[0]
    if kind == "pairs" and config.negatives == "uniform":
        raise InputError("negatives: uniform needs labels; pairs have guided-hard negatives, leave it out")
    hard = kind == "pairs" or config.negatives == "hard"
    if hard and config.num_negatives > config.top_k:
        raise InputError(f"num_negatives {config.num_negatives} is above top_k {config.top_k}; raise top_k")
    return kind


def _start_or_continue(output: Path, made_from: dict[str, Any]) -> Path:
    """Keep the finished files of a killed run of the same making; clear those of any other unfinished run."""
    work, digest = output / _WORK, digest_of(made_from)
    marker = work / "made_from.json"
    ours = marker.is_file()
    if not ours and output.is_dir() and any(entry.name != _WORK for entry in output.iterdir()):
        raise InputError(f"{output} holds files that are not of an unfinished mining run; choose a new or empty folder")
    if not ours or json.loads(marker.read_text(encoding="utf-8"))["digest"] != digest:
        work.mkdir(parents=True, exist_ok=True)
        write_json(marker, {"digest": None})  # first: what is half removed must not be taken for the marker's work
        for part in ("staging", "rejects", "texts", "index", "parts"):
            shutil.rmtree(work / part, ignore_errors=True)
        shutil.rmtree(output / "rejects", ignore_errors=True)
        for file in output.glob("triplets-*.parquet"):
            file.unlink()
        (work / "staging").mkdir()
        write_json(marker, {"digest": digest})
    return work


# Step 1: stage -------------------------------------------------------------------------------------------------------


def _stage_labels(units: list[Unit], max_chars: int, work: Path) -> Staged:
    reports = unit_reports(len(units), lambda number: _stage_unit(units[number], number, max_chars, work))
    total = {key: sum(report[key] for report in reports) for key in ("rows", "texts", "not_selected")}
    rejects = added_rejects(report["rejects"] for report in reports)
    return Staged(**total, occurrences=total["rows"], rejects=rejects, tasks=[], pieces=piece_names(reports))


def _stage_unit(unit: Unit, number: int, max_chars: int, work: Path) -> dict[str, Any]:
    """Stage one unit of labelled texts, unless a killed run already did; its report is written last."""
    report_file = work / "staging" / f"unit-{number:08d}.json"
    if not report_file.is_file():
        (work / "rejects").mkdir(parents=True, exist_ok=True)
        counts: Counter[str] = Counter(rows=0, texts=0, not_selected=0, pieces=0)
        with RejectLog(work / "rejects" / f"unit-{number:08d}.jsonl") as rejects:
            for i, rows in enumerate(_pieces(unit, max_chars, rejects, counts)):
                stem = work / "staging" / f"unit-{number:08d}-{i:05d}"
                texts = Piece()
                numbers = np.array([texts.number(row.text) for row in rows], dtype=np.int64)
                position = texts.write(stem.with_name(f"{stem.name}.texts"))
                _write_labels(
                    stem.with_name(f"{stem.name}.rows"), position[numbers], rows, _default_task(unit.source.path)
                )
                counts.update(rows=len(rows), texts=len(texts), pieces=1)
        write_json(report_file, {**counts, "rejects": rejects.counts})
    report: dict[str, Any] = json.loads(report_file.read_text(encoding="utf-8"))
    return report


def _pieces(unit: Unit, max_chars: int, rejects: RejectLog, counts: Counter[str]) -> Iterator[list[Labelled]]:
    piece: list[Labelled] = []
    chars = 0
    for number, row in enumerate(read_labelled(unit, max_chars), start=unit.first_row):
        if row is None:
            counts["not_selected"] += 1
        elif isinstance(row, Reject):
            rejects.add(unit.name, number, row.reason, row.task, row.row)
        else:
            piece.append(row)
            chars += len(row.text)
            if len(piece) == ROWS_PER_PIECE or chars >= CHARS_PER_PIECE:
                yield piece
                piece, chars = [], 0
    if piece:
        yield piece


def _write_labels(file: Path, position: Ids, rows: list[Labelled], default_task: str) -> None:
    """Rows as positions of their texts, and their task and label as one JSON list."""
    import pyarrow as pa

    names: dict[str, int] = {}
    tasks = ((default_task if row.task == _UNNAMED else row.task) for row in rows)
    codes = [names.setdefault(json.dumps([task, row.label]), len(names)) for task, row in zip(tasks, rows, strict=True)]
    label = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(list(names)))
    write_arrow(file, {"text": pa.array(position, pa.uint32()), "label": label})


def _default_task(path: str) -> str:
    """Task of rows that name none: one for the whole source, after its file or folder, as its files may be parts."""
    parts = Path(path.split("?")[0] if "://" in path else path).parts
    names = [part.split(".")[0] for part in parts if not set(part) & set("*?[")]
    return next((name for name in reversed(names) if name), _UNNAMED)


def _check_rows(staged: Staged, units: list[Unit]) -> None:
    if not staged.rows:
        reasons = sorted({reason for of_task in staged.rejects.values() for reason in of_task})
        raise InputError(
            f"{units[0].name}: no usable row out of {staged.rejected + staged.not_selected} "
            f"({'; '.join(reasons[:3]) or 'none is selected'})"
        )
    if staged.rejected:
        log.warning("mine: %d rows rejected", staged.rejected)


def _keep_rejects(work: Path, output: Path) -> None:
    """Show the rejects beside the triplets; by a suffix that no source has, because they are not data."""
    (output / "rejects").mkdir(exist_ok=True)
    for file in sorted((work / "rejects").glob("unit-*.jsonl")):
        file.replace(output / "rejects" / f"{file.stem}.log")


# Step 3: index -------------------------------------------------------------------------------------------------------


def _index_labels(work: Path, pieces: list[str]) -> tuple[list[str], dict[str, Any]]:
    numbers: dict[str, int] = {}
    labels, texts = [], []
    for rows, ids in _staged_rows(work, pieces):
        local = [numbers.setdefault(name, len(numbers)) for name in rows["label"].dictionary.to_pylist()]
        labels.append(np.array(local, dtype=np.int64)[rows["label"].indices.to_numpy()])
        texts.append(ids[rows["text"].to_numpy()])
    names = sorted(numbers, key=json.loads)  # by task, then label, wherever they stood first
    rank = np.empty(len(names), dtype=np.int64)
    rank[[numbers[name] for name in names]] = np.arange(len(names))
    tasks = sorted({json.loads(name)[0] for name in names})
    codes = {task: code for code, task in enumerate(tasks)}
    task = np.array([codes[json.loads(name)[0]] for name in names], dtype=np.int64)
    index = LabelIndex.of(rank[np.concatenate(labels)], np.concatenate(texts), task)
    _save(work, index, cut(task[index.label], QUERIES_PER_TILE), label_hash=_hashes(map(text_key, names)))
    write_json(work / "index" / LABELS, [json.loads(name)[1] for name in names])
    return tasks, {
        "labels": len(names),
        "labels_with_one_text": int((np.diff(index.label_starts) == 1).sum()),
        "texts_with_several_labels": len(np.unique(index.corpus[index.also_place])),
        "queries": len(index.label),
    }


def _index_pairs(work: Path, pieces: list[str]) -> tuple[list[str], dict[str, Any]]:
    staged = list(_staged_rows(work, pieces))
    tasks = sorted({task for rows, _ in staged for task in rows["task"].dictionary.to_pylist()})
    columns: list[tuple[Ids, ...]] = []
    for rows, ids in staged:
        task = task_codes(rows["task"], tasks)
        negatives = rows["negatives"]
        given, count = ids[negatives.values.to_numpy()], np.diff(negatives.offsets.to_numpy())
        pair = (ids[rows[name].to_numpy()] for name in ("query", "positive"))
        columns.append((*pair, task, given, np.repeat(task, count)))
    index = PairIndex.of(*map(np.concatenate, zip(*columns, strict=True)))
    _save(work, index, cut(index.task, QUERIES_PER_TILE))
    return tasks, {"queries": len(np.unique(index.query)), "candidates": len(index.corpus)}


def _staged_rows(work: Path, pieces: list[str]) -> Iterator[tuple[Any, Ids]]:
    """Rows of each piece, and the ids of its texts by position."""
    table = TextTable(work / "texts", in_place=False)
    for file in check_pieces(work / "staging", pieces, "rows"):
        yield read_arrow(file), table.ids_of(keys_to_numpy(read_arrow(file.with_suffix(".texts"))["key"]))


def _hashes(keys: Any) -> Hashes:
    """The first eight bytes of text keys as numbers."""
    content = b"".join(keys) if not isinstance(keys, np.ndarray) else keys.tobytes()
    return np.frombuffer(content, ">u8")[::2].astype(np.uint64)


def _save(work: Path, index: LabelIndex | PairIndex, tiles: Ids, **more: npt.NDArray[Any]) -> None:
    """Arrays that every miner maps into its memory, so that they count once a machine."""
    (work / "index").mkdir(exist_ok=True)
    text_hash = _hashes(TextTable(work / "texts", in_place=False).keys())
    arrays = {field.name: getattr(index, field.name) for field in fields(index)}
    for name, array in {**arrays, **more, "tiles": tiles, "text_hash": text_hash}.items():
        np.save(work / "index" / f"{name}.npy", array)


# Step 4: mine --------------------------------------------------------------------------------------------------------


def _mine_all(config: MineConfig, kind: str, tasks: list[str], work: Path, output: Path) -> Counter[str]:
    import ray
    from ray.util import ActorPool

    cluster, tiles = config.cluster, len(np.load(work / "index" / "tiles.npy", mmap_mode="r"))
    size = min(_TILES_PER_PART, -(-tiles // _PARTS))
    parts = [(number, start, min(start + size, tiles)) for number, start in enumerate(range(0, tiles, size))]
    # A dead actor is restarted and its part done again: a part is whole or absent, so once more does no harm.
    remote = ray.remote(
        num_cpus=1, num_gpus=cluster.gpus_per_worker, max_restarts=cluster.max_failures, max_task_retries=-1
    )(PartMiner)
    actors = [
        remote.remote(config, kind, tasks, work, output) for _ in range(min(actors_that_fit(cluster), len(parts)))
    ]
    counts = Counter(triplets=0, without_negative=0, with_fewer_negatives=0, removed_by_margin=0)
    try:
        reports = ActorPool(actors).map_unordered(lambda actor, part: actor.mine.remote(*part), parts)
        for report in counted(reports, len(parts), "mining", "part"):
            counts.update(report)
    finally:
        for actor in actors:
            ray.kill(actor)
    return counts
