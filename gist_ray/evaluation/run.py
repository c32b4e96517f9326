"""evaluate: a model folder in, a report directory out."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_ray import html
from gist_ray.cluster import connected
from gist_ray.config import ClusterConfig
from gist_ray.encoder import fingerprint
from gist_ray.errors import InputError
from gist_ray.evaluation.pool import EncoderPool, Precision
from gist_ray.int8 import int8_file
from gist_ray.manifest import digest_files, digest_of, finished, write_json, write_manifest
from gist_ray.metrics import METRICS, read_metrics

if TYPE_CHECKING:
    from gist_ray.evaluation.mteb_encoder import RayEncoder
    from gist_ray.evaluation.tasks import EvalTask

KIND = "report"
REPORT = "report.json"

_log = logging.getLogger(__name__)


def evaluate(
    model: str | Path,
    *,
    output_dir: str | Path,
    tasks: tuple[str, ...] = (),
    data: str | Path | None = None,
    cluster: ClusterConfig = ClusterConfig(),  # noqa: B008 (frozen)
    batch_tokens: int | None = None,
    baseline: str | Path | None = None,
    precision: Precision = "fp32",
) -> Path:
    """Score a model with MTEB on Ray actors and write a report directory.

    The directory holds MTEB's result tree (`results/<org>__<model>/<revision>/<Task>.json`), what was
    predicted for each item (`predictions/`), `report.json` and `report.html`. A finished identical report is
    returned at once; after an interruption, tasks that were finished are not run again.

    Args:
        model: model folder or Hub id.
        output_dir: the report directory.
        tasks: names of MTEB tasks, with data from the Hub.
        data: folder of local tasks (see `gist_ray.evaluation.tasks`).
        cluster: `data_workers` actors with `data_threads` threads each.
        batch_tokens: padded tokens per forward; None: what suits the device.
        baseline: an earlier report directory to show scores against.
        precision: int8: score the variant that `export --int8` made.

    Returns:
        `output_dir`, absolute.

    Raises:
        InputError: a model, task, data or baseline that cannot be used; before Ray starts.
    """
    output = Path(output_dir).expanduser().absolute()
    identity = fingerprint(model, revision=None, max_tokens=None, pooling=None, prompt="")
    if precision == "int8":
        identity = {**identity, "int8": digest_files([(file := int8_file(model)), file.with_suffix(".bin")])}
    earlier = _read_report(Path(baseline).expanduser()) if baseline is not None else None
    chosen = _chosen(tasks, Path(data).expanduser() if data is not None else None)
    made_from = {
        "model": identity,
        "tasks": {task.name: task.revision for task in chosen},
        "mteb": version("mteb"),
        "baseline": earlier and digest_of([earlier["revision"], _scores(earlier)]),
    }
    if finished(output, KIND, made_from):
        return output
    revision = digest_of(identity)[:40]  # as long as a commit
    store = _Store(output, _model_name(model), revision)
    with contextlib.redirect_stdout(sys.stderr):  # stdout carries the verb's result alone
        pending = [task for task in chosen if store.result(task) is None]
        notes = {task.name: task.check() for task in chosen if task.folder or task in pending}
        if pending:
            _run(pending, store, model, cluster, batch_tokens, precision)
    summary = _summary(store, chosen, notes, earlier)
    write_json(output / REPORT, summary)
    (output / "report.html").write_text(_page(summary, _training(model)), encoding="utf-8")
    write_manifest(output, KIND, made_from, model=store.name, revision=revision, tasks=len(chosen))
    return output


def ndcg_at_10_per_query(report_dir: str | Path, task_folder: str | Path) -> dict[str, float]:
    """nDCG@10 of every query of a local retrieval task, from a report's stored predictions.

    The mean over queries is the score that the report gives. For paired comparisons
    (`gist_ray.evaluation.compare.paired_bootstrap`).

    Raises:
        InputError: the report has no predictions for this task, or the folder is no retrieval task.
    """
    import pytrec_eval

    from gist_ray.evaluation.tasks import local_tasks, retrieval_qrels

    folder = Path(task_folder).expanduser()
    qrels = retrieval_qrels(folder)
    [task] = local_tasks(folder)
    file = _predictions_file(Path(report_dir).expanduser(), task.name)
    if not file.is_file():
        raise InputError(f"{file} does not exist; evaluate the model on {folder} first")
    stored = json.loads(file.read_text(encoding="utf-8"))
    [split] = [splits for key, splits in stored.items() if key != "mteb_model_meta"]
    [ranking] = split.values()
    if task.make().ignore_identical_ids:  # a property of some MTEB tasks: queries that are documents too
        ranking = {query: {key: hits[key] for key in hits if key != query} for query, hits in ranking.items()}
    scores = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(ranking)
    return {query: float(measures["ndcg_cut_10"]) for query, measures in scores.items()}


class _Store:
    """The one writer of MTEB's result tree. Every file appears whole, by rename, a task's result last."""

    def __init__(self, output: Path, name: str, revision: str) -> None:
        self.name, self.revision, self.output = name, revision, output
        self.partial = output / ".partial"
        self.folder = output / "results" / name.replace("/", "__") / revision

    def result(self, task: EvalTask) -> Any:
        """The stored `TaskResult` of a task on this very data and mteb version, or None."""
        from mteb.results import TaskResult

        file = self.folder / f"{task.name}.json"
        if not file.is_file():
            return None
        stored = TaskResult.from_disk(file)
        same = stored.dataset_revision == task.revision and stored.mteb_version == version("mteb")
        return stored if same else None

    def score(self, task: EvalTask, encoder: RayEncoder) -> None:
        """Run one task and store its predictions, then its result."""
        import mteb

        predictions = _predictions_file(self.output, task.name)
        partial, whole = self.partial / predictions.name, self.folder / f"{task.name}.json"
        partial.unlink(missing_ok=True)  # mteb adds to a file it finds; an interrupted run left half of one
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*superseded")
            outcome = mteb.evaluate(
                encoder,
                [task.make()],
                cache=None,
                co2_tracker=False,
                encode_kwargs={"batch_size": 1024, "show_progress_bar": False},
                prediction_folder=self.partial,
                show_progress_bar=False,
            )
        [result] = outcome.task_results
        self.folder.mkdir(parents=True, exist_ok=True)
        predictions.parent.mkdir(exist_ok=True)
        partial.replace(predictions)
        meta = json.loads(json.dumps(encoder.mteb_model_meta.to_dict(), default=str))
        write_json(self.folder / "model_meta.json", meta)
        result.to_disk(self.partial / whole.name)
        (self.partial / whole.name).replace(whole)
        seconds = result.evaluation_time
        _log.info("%s: %s %.4f in %.1f s", task.name, task.main_metric, result.get_score(), seconds)


def _run(
    pending: list[EvalTask],
    store: _Store,
    model: str | Path,
    cluster: ClusterConfig,
    batch_tokens: int | None,
    precision: Precision,
) -> None:
    import datasets
    from tqdm import tqdm

    from gist_ray.evaluation.mteb_encoder import RayEncoder

    datasets.disable_progress_bars()  # one bar for the run, not three for each task
    logging.getLogger("mteb.abstasks.abstask").setLevel(logging.ERROR)  # "superseded": the task was chosen
    with (
        connected(cluster),
        EncoderPool(
            model,
            workers=cluster.data_workers,
            threads=cluster.data_threads,
            gpus=cluster.gpus_per_worker,
            batch_tokens=batch_tokens,
            precision=precision,
        ) as pool,
    ):
        encoder = RayEncoder(pool, store.name, store.revision)
        bar = tqdm(pending, desc="evaluate", unit="task", disable=None)
        for task in bar:
            bar.set_postfix_str(task.name)
            store.score(task, encoder)
    shutil.rmtree(store.partial, ignore_errors=True)


def _model_name(model: str | Path) -> str:
    """`org/model` for MTEB: a Hub id as it is, a folder by its name."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return str(model)
    return f"local/{re.sub(r'[^A-Za-z0-9._-]', '-', folder.absolute().name)}"


def _chosen(names: tuple[str, ...], data: Path | None) -> list[EvalTask]:
    if not names and data is None:
        raise InputError("nothing to evaluate on: give names of MTEB tasks, or a data folder of local tasks")
    from gist_ray.evaluation.tasks import hub_task, local_tasks

    local = local_tasks(data) if data is not None else []
    twice = sorted({task.name for task in local} & set(names))
    if twice:
        raise InputError(f"task {twice[0]} is both a name and a folder in {data}; drop one of the two")
    return [*local, *(hub_task(name) for name in dict.fromkeys(names))]


def _predictions_file(output: Path, task: str) -> Path:
    return output / "predictions" / f"{task}_predictions.json"


def _read_report(directory: Path) -> dict[str, Any]:
    try:
        earlier: dict[str, Any] = json.loads((directory / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"baseline {directory} is no report: {REPORT} cannot be read ({error})") from error
    return earlier


def _scores(summary: dict[str, Any]) -> list[list[Any]]:
    """Name, data revision and score of each task of a report."""
    return [[task["name"], task["revision"], task["score"]] for task in summary["tasks"]]


def _summary(
    store: _Store, chosen: list[EvalTask], notes: dict[str, tuple[str, ...]], earlier: dict[str, Any] | None
) -> dict[str, Any]:
    """What `report.json` holds. Scores are MTEB's (0 to 1); `before` is the baseline's on the same data."""
    before = {(name, data): score for name, data, score in _scores(earlier or {"tasks": []})}
    rows = []
    for task in chosen:
        result = store.result(task)
        row = {
            "name": task.name,
            "type": task.type,
            "main_metric": task.main_metric,
            "score": result.get_score(),
        }
        if earlier is not None:
            row["before"] = before.get((task.name, task.revision))
        row |= {"seconds": round(result.evaluation_time, 2), "revision": task.revision}
        rows.append({**row, "data": "local" if task.folder else "hub", "notes": list(notes.get(task.name, ()))})
    types = sorted({task.type for task in chosen})
    return {
        "model": store.name,
        "revision": store.revision,
        "mteb_version": version("mteb"),
        "baseline": earlier and {"model": earlier["model"], "revision": earlier["revision"]},
        "tasks": rows,
        "metrics": {
            "mean": _mean([row["score"] for row in rows]),
            "mean_by_type": {kind: _mean([row["score"] for row in rows if row["type"] == kind]) for kind in types},
        },
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _training(model: str | Path) -> list[dict[str, float]]:
    """Metrics of the run that made a model, where `export` left them beside it."""
    return read_metrics(Path(model).expanduser() / METRICS)


def _page(summary: dict[str, Any], training: list[dict[str, float]]) -> str:
    """`report.html`."""
    rows = summary["tasks"]
    by_type = summary["metrics"]["mean_by_type"]
    tiles = [("mean over tasks", f"{100 * summary['metrics']['mean']:.2f}", f"{len(rows)} tasks")]
    tiles += [(kind, f"{100 * mean:.2f}", "mean") for kind, mean in by_type.items() if len(by_type) > 1]
    bars = [(row["name"], _percent(row.get("before")), 100 * row["score"]) for row in rows]
    cells = [
        [row["name"], row["type"], row["main_metric"], _percent(row.get("before")), 100 * row["score"],
         row["seconds"], "; ".join(row["notes"])]
        for row in rows
    ]  # fmt: skip
    headers = ["task", "type", "metric", "before", "score", "seconds", "remarks"]
    if summary["baseline"] is None:
        headers.remove("before")
        cells = [[*row[:3], *row[4:]] for row in cells]
    made = [
        ["model", summary["model"]],
        ["content hash", summary["revision"]],
        ["mteb", summary["mteb_version"]],
    ]
    if summary["baseline"]:
        made.append(["before", f"{summary['baseline']['model']} @ {summary['baseline']['revision'][:12]}"])
    return html.render_report(
        f"Evaluation of {summary['model']}",
        "Scores are MTEB's main score of each task, times 100.",
        [
            html.tiles(tiles),
            html.section("Scores", html.bars_before_after(bars)),
            html.section("Tasks", html.table(headers, cells)),
            *([html.section("Training", html.training_curves(training))] if training else []),
            html.section("Made from", html.table(["what", "value"], made)),
        ],
    )


def _percent(score: float | None) -> float | None:
    return None if score is None else 100 * score
