"""export: checkpoint in, model folder out, with a model card, its provenance and, on request, an int8 variant."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gist_ray.config import LossConfig, Recipe
from gist_ray.data.shards import Shards
from gist_ray.encoder import Encoder, TokenIds, fingerprint
from gist_ray.errors import InputError
from gist_ray.evaluation.report import read_report
from gist_ray.int8 import CALIBRATION_TEXTS, MAX_GATE_TEXTS, PROVENANCE, quantize
from gist_ray.manifest import digest_files, digest_of, finished, read_manifest, write_json, write_manifest
from gist_ray.metrics import METRICS
from gist_ray.recipe_file import parse_recipe
from gist_ray.training.checkpoint import KIND as CHECKPOINT
from gist_ray.training.checkpoint import student_folder, trained_student

log = logging.getLogger(__name__)

KIND = "model"

_LOSS = LossConfig().model_dump(mode="json")
_TOLD = ("guide", "temperature", "margin", "margin_kind")  # options of the loss that the card has rows for


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    report: str | Path | None = None,
    int8: bool = False,
    texts: str | Path | None = None,
    start_share: float | None = None,
) -> Path:
    """Write the model folder of a finished checkpoint and return its path; at once if it is already there.

    The folder loads in `SentenceTransformer`, text-embeddings-inference and `Encoder.load`. `report` is a finished
    report whose scores go into the card. `int8` adds a quantized variant for CPUs and its measured accuracy (see
    `gist_ray.int8`), calibrated with the lines of the file `texts` or, without it, the texts of the training data. With
    `int8` and `texts`, `checkpoint` may be any model folder or Hub id. `start_share` goes before the recipe's: another
    mean of the weights before and after, without another training.

    Raises:
        InputError: not a finished checkpoint or report, `out` holds something else, or a `start_share` outside [0, 1);
            or as `quantize`.
    """
    if texts and not int8:
        raise InputError("--texts are what int8 is calibrated with; add --int8, or leave them out")
    out = Path(out)
    made_from, provenance = _origin(checkpoint, report, int8, start_share)
    if int8:
        made_from["int8"] = digest_files([_text_file(texts)]) if texts else "training texts"
    if finished(out, KIND, made_from):
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty and not a finished model folder; choose another folder or clear it")
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed export
    recipe = provenance.get("recipe")
    encoder = _encoder(checkpoint, recipe, start_share)
    provenance |= {"dim": encoder.dim, "max_tokens": encoder.max_tokens}
    if int8:  # first: it refuses before anything is written
        provenance["int8"] = quantize(encoder, _calibration(encoder, texts, recipe), unfinished, threads=_threads())
        _tell(provenance["int8"])
    encoder.save(unfinished)
    if recipe:
        shutil.copyfile(Path(checkpoint) / METRICS, unfinished / METRICS)  # for the curves in the reports on this model
    write_json(unfinished / PROVENANCE, provenance)
    if recipe:
        (unfinished / "README.md").write_text(model_card(recipe["name"], provenance), encoding="utf-8")
    write_manifest(unfinished, KIND, made_from)
    if out.exists():
        out.rmdir()  # empty, as checked
    unfinished.rename(out)
    return out


def _origin(
    checkpoint: str | Path, report: str | Path | None, int8: bool, start_share: float | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the folder is made from, as fingerprint and as provenance; of a model that is no checkpoint, its own."""
    scores = _scores(Path(report)) if report else []
    manifest = read_manifest(Path(checkpoint))
    if int8 and start_share is None and (manifest is None or manifest.get("kind") != CHECKPOINT):
        model = fingerprint(checkpoint, revision=None, max_tokens=None, pooling=None, prompt="")
        return {"model": digest_of(model), "scores": digest_of(scores)}, {"fingerprint": model, "scores": scores}
    student_folder(Path(checkpoint))  # or says what is wrong with it
    assert manifest is not None, "student_folder has checked the checkpoint"
    made_from: dict[str, Any] = {"checkpoint": digest_of(manifest["fingerprint"]), "scores": digest_of(scores)}
    kept = {name: manifest[name] for name in ("recipe", "fingerprint", "steps")}
    if start_share is not None:
        made_from["start_share"] = start_share
        kept["recipe"] = _with_start_share(kept["recipe"], start_share)
    return made_from, {**kept, "scores": scores}


def _with_start_share(recipe: dict[str, Any], share: float) -> dict[str, Any]:
    tree = {**recipe, "train": {**recipe["train"], "start_share": share}}
    return parse_recipe(tree, "--start-share").model_dump(mode="json")


def _encoder(checkpoint: str | Path, recipe: dict[str, Any] | None, start_share: float | None) -> Encoder:
    if recipe is None:
        return Encoder.load(checkpoint)
    if start_share is None:
        return Encoder.load(student_folder(Path(checkpoint)))
    return trained_student(Recipe.model_validate(recipe), Path(checkpoint))


def _calibration(encoder: Encoder, texts: str | Path | None, recipe: dict[str, Any] | None) -> Sequence[TokenIds]:
    """Token ids of different texts, drawn at random: of a file's lines, or of the training data."""
    random, wanted = np.random.default_rng(0), CALIBRATION_TEXTS + MAX_GATE_TEXTS
    if texts:
        lines = sorted({line.strip() for line in _text_file(texts).read_text(encoding="utf-8").splitlines()} - {""})
        return encoder.tokenize([lines[i] for i in random.permutation(len(lines))[:wanted]])
    folder = Recipe.model_validate(recipe).shards_dir() if recipe else None
    if folder is None or not (folder / "manifest.json").is_file():
        where = f"the training data is no longer at {folder}" if folder else "this is no checkpoint with training data"
        raise InputError(f"int8 needs texts to calibrate with, and {where}; give a file of lines with --texts")
    shards = Shards.open(folder)
    return shards.texts.tokens(random.permutation(shards.texts.num_texts)[:wanted])


def _text_file(texts: str | Path) -> Path:
    file = Path(texts)
    if not file.is_file():
        raise InputError(f"--texts {texts} is not a file; give one with a text on each line")
    return file


def _tell(record: dict[str, Any]) -> None:
    numbers = ", ".join(f"{name} {record[name]:.3f} (needed {limit})" for name, limit in record["needed"].items())
    if record["passed"]:
        log.info("int8: %s", numbers)
    else:
        log.warning("int8: %s: not accurate enough, it will not be served", numbers)


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def model_card(name: str, provenance: dict[str, Any]) -> str:
    """README of a model folder: what it is, how to use it, what it was made from."""
    recipe = provenance["recipe"]
    student, guide, loss, train = (recipe[section] for section in ("student", "guide", "loss", "train"))
    sources = "\n".join(f"- `{_short_name(source['path'])}`" for source in recipe["data"]["sources"])
    # A base that is a Hub id is linked by the Hub; a local folder has no page to link to.
    base = "" if Path(student["path"]).is_absolute() else f"base_model: {student['path']}\n"
    scores = "\n".join(f"| {s['name']} | {s['type']} | {s['score']:.4f} |" for s in provenance["scores"])
    int8 = _int8_section(provenance["int8"]) if "int8" in provenance else ""
    table = f"\n## Scores\n\n| task | type | score |\n|---|---|---|\n{scores}\n" if scores else ""
    layers = f", layers {student['layers']}" if student["layers"] is not None else ""
    others = ", ".join(
        f"`{key}: {json.dumps(value)}`" for key, value in loss.items() if key not in _TOLD and value != _LOSS[key]
    )
    options = f"| other options of the loss | {others} |\n" if others else ""
    start = f"| share of the student's first weights | {train['start_share']} |\n" if train["start_share"] else ""
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
{base}tags:
- sentence-transformers
- feature-extraction
- sentence-similarity
- gist-ray
---

# {name}

A sentence encoder of {provenance["dim"]} dimensions and at most {provenance["max_tokens"]} tokens, fine-tuned with
GISTEmbed ([arXiv 2402.16829](https://arxiv.org/abs/2402.16829)) by gist-ray.

## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
vectors = model.encode(["a text", "another text"])
print(model.similarity(vectors, vectors))
```

## Made from

| what | value |
|---|---|
| student | `{_short_name(student["path"])}`{layers} |
| guide | `{_short_name(guide["path"])}` ({loss["guide"]}) |
| steps x batch | {provenance["steps"]} x {train["batch_size"]} triplets, {train["epochs"]} epochs |
{start}| learning rate | {train["learning_rate"]}, {train["schedule"]}, warm-up {train["warmup_ratio"]} |
| temperature, margin | {loss["temperature"]}, {loss["margin"]} ({loss["margin_kind"]}) |
{options}| data fingerprint | `{provenance["fingerprint"]["shards"]}` |
| seed | {train["seed"]} |

Training data:

{sources}

The whole recipe and every fingerprint stand in `{PROVENANCE}`.
{table}{int8}"""


def _int8_section(record: dict[str, Any]) -> str:
    rows = "\n".join(f"| {name} | {record[name]:.4f} | {limit} |" for name, limit in record["needed"].items())
    verdict = "Accurate enough to be served" if record["passed"] else "Not accurate enough to be served"
    return f"""
## int8

`{record["file"]}`: {record["method"]}, calibrated on {record["calibration_texts"]} texts and compared with fp32 on
{record["measured_on_texts"]} others. {verdict} (`gist-ray serve --precision int8`).

| measure | value | needed |
|---|---|---|
{rows}
"""


def _short_name(path: str) -> str:
    """A Hub id as it is; of a local folder the name alone, which is all that a reader elsewhere can use."""
    return Path(path).name if Path(path).is_absolute() else path


def _scores(report: Path) -> list[dict[str, Any]]:
    manifest = read_manifest(report)
    if manifest is None or manifest.get("kind") != "report":
        raise InputError(f"{report} is not a finished report; give the folder that `gist-ray evaluate` printed")
    scores: list[dict[str, Any]] = read_report(report)["tasks"]
    return scores
