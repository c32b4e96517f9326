"""evaluate: a model folder in, a report directory out."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_ray.cluster import connected
from gist_ray.config import ClusterConfig, EvaluationConfig
from gist_ray.converted_models import cache_folder
from gist_ray.encoder import fingerprint
from gist_ray.errors import InputError
from gist_ray.evaluation.any_pool import AnyPool
from gist_ray.evaluation.contamination import training_sets
from gist_ray.evaluation.endpoint import endpoint_pool
from gist_ray.evaluation.pool import encoder_pool
from gist_ray.evaluation.report import REPORT, REPORT_PAGE, page, read_report, summary
from gist_ray.evaluation.training_texts import TrainingTexts
from gist_ray.evaluation.unit import ModelName
from gist_ray.int8 import int8_file
from gist_ray.manifest import MANIFEST, digest_files, digest_of, finished, write_json, write_manifest
from gist_ray.metrics import METRICS, read_metrics
from gist_ray.serving_config import Precision

if TYPE_CHECKING:
    from gist_ray.evaluation.eval_task import EvalTask
    from gist_ray.evaluation.hub_tasks import Average
    from gist_ray.evaluation.store import Store

KIND = "report"
_DEFAULTS = EvaluationConfig()

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """What a model is scored on."""

    tasks: tuple[EvalTask, ...]
    averages: tuple[Average, ...]


def evaluate(
    model: str | Path,
    *,
    output_dir: str | Path,
    tasks: tuple[str, ...] = (),
    benchmark: str | None = None,
    data: str | Path | None = None,
    cluster: ClusterConfig = ClusterConfig(),  # noqa: B008 (frozen)
    batch_tokens: int | None = None,
    baseline: str | Path | None = None,
    precision: Precision = "fp32",
    retries: int = _DEFAULTS.retries,
    cache_gb: float = _DEFAULTS.cache_gb,
) -> Path:
    """Score a model with MTEB on Ray actors and write a report directory.

    The directory holds MTEB's result tree (`results/<org>__<model>/<revision>/<Task>.json`), what was predicted
    (`predictions/`), what each score is made of (`items/`, for `gist-ray compare`), `report.json`, `report.html`
    and `model-index.yml`, metadata for a model card. What is there for the same model, data and mteb version is not
    computed again: after an interruption, a failure, or with more tasks than before, only the rest is.

    Args:
        model: model folder, Hub id, or URL of a served model (see `gist_ray.evaluation.endpoint`).
        output_dir: the report directory.
        tasks: names of MTEB tasks, with data from the Hub.
        benchmark: name of an MTEB benchmark, e.g. `MTEB(eng, v2)`.
        data: folder of local tasks (see `gist_ray.evaluation.tasks`).
        cluster: `data_workers` actors with `data_threads` threads each.
        batch_tokens: padded tokens per forward; None: what suits the device.
        baseline: an earlier report directory to show scores against.
        precision: int8: score the variant that `export --int8` made.
        retries: how often a task that fails is tried again.
        cache_gb: vectors that are kept on each node's disk for later runs, at most; 0: none are.

    Returns:
        `output_dir`, absolute.

    Raises:
        InputError: a model, task, data or baseline that cannot be used; before Ray starts, where that can be known.
        RuntimeError: tasks failed. The report of the others is written.
    """
    output = Path(output_dir).expanduser().absolute()
    subject = _subject(model, cluster, batch_tokens, precision, cache_gb)
    earlier = read_report(Path(baseline).expanduser()) if baseline is not None else None
    chosen = _chosen(tasks, benchmark, Path(data).expanduser() if data is not None else None)
    facts = {
        "tasks": {task.name: task.revision for task in chosen.tasks},
        "mteb": version("mteb"),
        "baseline": earlier and digest_of([earlier["revision"], earlier["tasks"]]),
    }
    made_from = {"model": subject.identity}
    if (manifest := finished(output, KIND, made_from)) and manifest["scored"] == facts:
        return output
    from gist_ray.evaluation.store import Store

    (output / MANIFEST).unlink(missing_ok=True)  # what it says of is about to change
    store = Store(output, subject.name)
    with contextlib.redirect_stdout(sys.stderr):  # stdout carries the verb's result alone
        failures = _run(chosen, store, cluster, subject, _seconds(earlier), retries)
    _write_report(store, chosen, earlier, failures, model)
    _log.info("evaluate: the scores in %s", output / REPORT_PAGE)
    if failures:
        first = next(iter(failures))
        raise RuntimeError(
            f"{len(failures)} of {len(chosen.tasks)} tasks failed, e.g. {first} ({failures[first]}); the others stand "
            f"in {output}; run it again to try those that failed"
        )
    name = subject.name
    write_manifest(output, KIND, made_from, scored=facts, model=name.name, revision=name.revision)
    return output


@dataclass(frozen=True)
class _Subject:
    """What is scored: a model folder, a Hub id, or a served model."""

    name: ModelName
    identity: dict[str, Any]
    """Everything that decides its vectors."""
    pool: Callable[[], AbstractContextManager[AnyPool]]
    trained_on: TrainingTexts | None = None


def _subject(
    model: str | Path, cluster: ClusterConfig, batch_tokens: int | None, precision: Precision, cache_gb: float
) -> _Subject:
    if str(model).startswith(("http://", "https://")):
        served = endpoint_pool(str(model))
        name = ModelName(f"endpoint/{_plain(served.model)}", served.revision)
        identity = {"endpoint": served.url, "model": served.model, "probes": served.revision}
        return _Subject(name, identity, lambda: contextlib.nullcontext(served))
    identity = fingerprint(model, revision=None, max_tokens=None, pooling=None, prompt="")
    if precision == "int8":
        identity = {**identity, "int8": digest_files([(file := int8_file(model)), file.with_suffix(".bin")])}
    kept = cache_folder() / "embeddings", int(cache_gb * 1e9), {"model": identity}
    name = ModelName(_model_name(model), digest_of(identity)[:40])  # as long as a commit
    pool = functools.partial(
        encoder_pool,
        model,
        workers=cluster.data_workers,
        threads=cluster.data_threads,
        gpus=cluster.gpus_per_worker,
        batch_tokens=batch_tokens,
        precision=precision,
        cache=kept if cache_gb > 0 else None,
        name=name.name,
    )
    return _Subject(name, identity, pool, TrainingTexts.of(model))


def _run(
    chosen: Chosen, store: Store, cluster: ClusterConfig, subject: _Subject, seconds: dict[str, float], retries: int
) -> dict[str, str]:
    """Score what is not scored yet; returns why tasks failed, by name."""
    from gist_ray.evaluation.schedule import largest_first, start_processes, units_at_work

    pending = [task for task in chosen.tasks if store.result(task) is None]
    if not pending:
        return {}
    for task in pending:
        if task.folder is not None:  # a bad line is told of before any machine is asked for
            task.loaded()
    with connected(cluster):
        start_processes(min(len(pending), units_at_work(cluster.data_workers)))
        with subject.pool() as pool:
            return _scored(largest_first(pending, seconds), pool, store, retries, subject.trained_on)


def _scored(
    tasks: list[EvalTask], pool: AnyPool, store: Store, retries: int, trained_on: TrainingTexts | None
) -> dict[str, str]:
    from tqdm import tqdm

    from gist_ray.evaluation.schedule import outcomes, reason

    failures: dict[str, str] = {}
    found = outcomes(tasks, pool, store.model, retries=retries, trained_on=trained_on)
    for task, outcome in tqdm(found, desc="evaluate", total=len(tasks), unit="task", disable=None):
        if isinstance(outcome, Exception):
            failures[task.name] = reason(outcome)
            _log.error("%s failed: %s", task.name, failures[task.name])
            continue
        store.add(task, outcome)
        _log.info("%s: %s %.4f in %.1f s", task.name, task.main_metric, outcome.score, outcome.seconds)
    return failures


def _write_report(
    store: Store,
    chosen: Chosen,
    earlier: dict[str, Any] | None,
    failures: dict[str, str],
    model: str | Path,
) -> None:
    from gist_ray.evaluation.model_index import write_model_index

    store.output.mkdir(parents=True, exist_ok=True)
    averages = {average.name: store.add_average(average) for average in chosen.averages}
    found = summary(store, list(chosen.tasks), averages, earlier, failures)
    write_model_index(store, list(chosen.tasks))
    found["training_sets"] = training_sets(model)
    write_json(store.output / REPORT, found)
    (store.output / REPORT_PAGE).write_text(
        page(found, read_metrics(Path(model).expanduser() / METRICS)), encoding="utf-8"
    )


def _model_name(model: str | Path) -> str:
    """`org/model` for MTEB: a Hub id as it is, a folder by its name."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return str(model)
    return f"local/{_plain(folder.absolute().name)}"


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)


def _chosen(names: tuple[str, ...], benchmark: str | None, data: Path | None) -> Chosen:
    if not names and data is None and benchmark is None:
        raise InputError("nothing to evaluate on: give MTEB tasks, a benchmark, or a data folder of local tasks")
    from gist_ray.evaluation.hub_tasks import benchmark_tasks, hub_tasks
    from gist_ray.evaluation.tasks import local_tasks

    named, averages = hub_tasks(names)
    if benchmark is not None:
        members, more = benchmark_tasks(benchmark)
        named, averages = [*named, *members], [*averages, *more]
    local = local_tasks(data) if data is not None else []
    twice = sorted({task.name for task in local} & {task.name for task in named})
    if twice:
        raise InputError(f"task {twice[0]} is both a name and a folder in {data}; drop one of the two")
    hub = {task.name: task for task in named}
    return Chosen((*local, *hub.values()), tuple({average.name: average for average in averages}.values()))


def _seconds(earlier: dict[str, Any] | None) -> dict[str, float]:
    """What tasks took another model."""
    return {task["name"]: task["seconds"] for task in (earlier or {"tasks": []})["tasks"]}
