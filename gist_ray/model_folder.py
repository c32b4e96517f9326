"""export: checkpoint in, model folder out, with a model card and its provenance."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.manifest import digest_of, finished, read_manifest, write_json, write_manifest
from gist_ray.metrics import METRICS
from gist_ray.training.checkpoint import student_folder

KIND = "model"
PROVENANCE = "gist_ray.json"


def export(checkpoint: str | Path, out: str | Path, *, report: str | Path | None = None) -> Path:
    """Write the model folder of a finished checkpoint and return its path; at once if it is already there.

    The folder loads in `SentenceTransformer`, text-embeddings-inference and `Encoder.load`. `report` is a finished
    report whose scores go into the card.

    Raises:
        InputError: not a finished checkpoint or report, or `out` holds something else.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    student = student_folder(checkpoint)
    manifest = read_manifest(checkpoint)
    assert manifest is not None, "student_folder has checked the checkpoint"
    scores = _scores(Path(report)) if report else []
    made_from = {"checkpoint": digest_of(manifest["fingerprint"]), "scores": digest_of(scores)}
    if finished(out, KIND, made_from):
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not empty and not a finished model folder; choose another folder or clear it")
    encoder = Encoder.load(student)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed export
    shutil.copytree(student, unfinished)
    recipe = manifest["recipe"]
    provenance = {
        "recipe": recipe,
        "fingerprint": manifest["fingerprint"],
        "steps": manifest["steps"],
        "dim": encoder.dim,
        "max_tokens": encoder.max_tokens,
        "scores": scores,
    }
    shutil.copyfile(checkpoint / METRICS, unfinished / METRICS)  # for the curves in the reports on this model
    write_json(unfinished / PROVENANCE, provenance)
    (unfinished / "README.md").write_text(model_card(recipe["name"], provenance), encoding="utf-8")
    write_manifest(unfinished, KIND, made_from)
    if out.exists():
        out.rmdir()  # empty, as checked
    unfinished.rename(out)
    return out


def model_card(name: str, provenance: dict[str, Any]) -> str:
    """README of a model folder: what it is, how to use it, what it was made from."""
    recipe = provenance["recipe"]
    student, guide, loss, train = (recipe[section] for section in ("student", "guide", "loss", "train"))
    sources = "\n".join(f"- `{_short_name(source['path'])}`" for source in recipe["data"]["sources"])
    # A base that is a Hub id is linked by the Hub; a local folder has no page to link to.
    base = "" if Path(student["path"]).is_absolute() else f"base_model: {student['path']}\n"
    scores = "\n".join(f"| {s['name']} | {s['type']} | {s['score']:.4f} |" for s in provenance["scores"])
    table = f"\n## Scores\n\n| task | type | score |\n|---|---|---|\n{scores}\n" if scores else ""
    layers = f", layers {student['layers']}" if student["layers"] else ""
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
| learning rate | {train["learning_rate"]}, {train["schedule"]}, warm-up {train["warmup_ratio"]} |
| temperature, margin | {loss["temperature"]}, {loss["margin"]} ({loss["margin_kind"]}) |
| data fingerprint | `{provenance["fingerprint"]["shards"]}` |
| seed | {train["seed"]} |

Training data:

{sources}

The whole recipe and every fingerprint stand in `{PROVENANCE}`.
{table}"""


def _short_name(path: str) -> str:
    """A Hub id as it is; of a local folder the name alone, which is all that a reader elsewhere can use."""
    return Path(path).name if Path(path).is_absolute() else path


def _scores(report: Path) -> list[dict[str, Any]]:
    manifest = read_manifest(report)
    if manifest is None or manifest.get("kind") != "report":
        raise InputError(f"{report} is not a finished report; give the folder that `gist-ray evaluate` printed")
    tasks: list[dict[str, Any]] = json.loads((report / "report.json").read_text(encoding="utf-8"))["tasks"]
    return tasks
