"""Dashboards and alerts against what is really exported; and a real Prometheus that asks every query of them."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from gist_ray.cluster import free_port
from gist_ray.serving.api import create_api
from gist_ray.serving.fake_engine import FakeEngine
from gist_ray.serving.gate import Access
from gist_ray.serving.measures import Measures
from gist_ray.serving.models import Models
from gist_ray.serving.scheduler import Scheduler
from tests.cluster.dashboards import (
    DASHBOARDS,
    OBSERVABILITY,
    UNITS,
    Query,
    Series,
    draw,
    metrics,
    queries,
    tree,
    variables,
)
from tests.cluster.manifests import KUBERNETES, documents
from tests.scrape import Samples, node_metrics, samples
from tests.serving.served import client_of

QUERIES = [query for file in DASHBOARDS for query in queries(file)]
ALERTS: list[dict[str, Any]] = yaml.safe_load((OBSERVABILITY / "alerts.yaml").read_text())["groups"][0]["rules"]
every_dashboard = pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda file: file.stem)


def exported_by_serving() -> Samples:
    async def run() -> str:
        models = Models(lambda place: FakeEngine(), partial(Scheduler, cache_bytes=1 << 20))
        await models.replace({"org/demo": "a-place"})
        async with client_of(create_api(models, Measures(models, "r1"), Access())) as client:
            await client.post("/v1/embeddings", json={"input": ["a", "b", "a"]})
            text = (await client.get("/metrics")).text
        await models.close()
        return text

    return samples(asyncio.run(run()))


def exported_by_ray() -> Samples:
    """The driver's and a worker's, and Ray's own."""
    import ray

    from gist_ray.evaluation.prometheus import TaskCounts, TextCounts

    @ray.remote(num_cpus=0)
    class Worker:
        def work(self) -> None:
            from gist_ray.training.loop import Rates, global_metrics
            from gist_ray.training.phases import PhaseClock
            from gist_ray.training.prometheus import RayMetrics
            from gist_ray.training.step import StepSums

            sink, rates = RayMetrics("observed"), Rates(20)
            line = {"step": 10, "total_steps": 20, "learning_rate": 1e-5, "grad_norm": 1.0, "eta_s": rates.eta_s(10)}
            sums = StepSums(**dict.fromkeys(StepSums.__dataclass_fields__, 1))
            sink.log({"step": 0, "event": "start", "workers": 1})
            sink.log(line | global_metrics(sums, PhaseClock(), 8, rates))
            sink.log({"step": 10, "event": "checkpoint", "stall_s": 0.5})
            sink.log({"step": 10, "event": "validation", "score": 0.875})
            TextCounts("org/observed").embedded(computed=2, cached=1)

    worker = Worker.remote()
    counts = TaskCounts("org/observed")
    counts.at_work(1, 2)
    ray.get(worker.work.remote())
    wanted = {name for query in QUERIES for name in metrics(query.expression) if name.startswith("ray_")}
    deadline, found = time.monotonic() + 60, node_metrics()
    while not wanted <= set(found) and time.monotonic() < deadline:
        time.sleep(0.5)
        found = node_metrics()
    counts.close()
    ray.kill(worker)
    return found


@pytest.fixture(scope="module")
def exported(ray_session: None) -> Samples:
    up: Samples = {"up": [({"job": "ray", "instance": "x"}, 1.0)]}  # Prometheus's own
    return {**exported_by_serving(), **exported_by_ray(), **up}


def missing(expression: str, exported: Samples) -> list[str]:
    """Metrics that nobody exports, and labels that a metric does not have."""
    problems = []
    asked = metrics(expression)
    assert asked, expression
    for name, labels in asked.items():
        known = {label for found, _ in exported.get(name, []) for label in found}
        problems += [name] if name not in exported else [f"{name}{{{label}}}" for label in labels - known]
    return problems


def test_dashboards_alerts_and_variables_name_what_is_exported(exported: Samples):
    asked = [query.expression for query in QUERIES] + [alert["expr"] for alert in ALERTS]
    asked += [f"{selector}{{{label}=''}}" for file in DASHBOARDS for selector, label in variables(file).values()]
    assert [problem for expression in asked for problem in missing(expression.replace("}{", ", "), exported)] == []
    for query in QUERIES:  # what a line's name is made of is among the labels that are left
        grouped = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", query.expression))))
        assert set(re.findall(r"\{\{(\w+)\}\}", query.legend)) <= grouped, query
    assert missing('sum(gist_ray_textz_total{modl=~"a"})', exported) == ["gist_ray_textz_total"]
    assert missing('gist_ray_texts_total{modl=~"a"}', exported) == ["gist_ray_texts_total{modl}"]


@every_dashboard
def test_panels_have_units_and_a_place_of_their_own_and_variables_exist(dashboard: Path):
    taken: set[tuple[int, int]] = set()
    titles = [panel["title"] for panel in tree(dashboard)["panels"]]
    assert len(set(titles)) == len(titles)
    for panel in tree(dashboard)["panels"]:
        place = panel["gridPos"]
        cells = {(x, place["y"]) for x in range(place["x"], place["x"] + place["w"])}
        assert not cells & taken and place["x"] + place["w"] <= 24 and place["y"] % 8 == 0 and place["h"] == 8
        taken |= cells
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["datasource"] == {"type": "prometheus", "uid": "${source}"}
    used = {name for query in queries(dashboard) for name in re.findall(r"\$(\w+)", query.expression)}
    assert used == set(variables(dashboard))
    assert tree(dashboard)["templating"]["list"][0]["name"] == "source"


def test_kubernetes_asks_the_service_that_the_manifests_make_as_the_plain_configuration_does():
    (scrape,) = documents(OBSERVABILITY / "kubernetes.yaml")
    (service,) = documents(KUBERNETES / "base" / "serving" / "ray-service.yaml")
    (namespace,) = documents(KUBERNETES / "base" / "platform" / "namespace.yaml")
    port = yaml.safe_load(service["spec"]["serveConfigV2"])["http_options"]["port"]
    address = f"{service['metadata']['name']}-serve-svc.{namespace['metadata']['name']}:{port}"
    assert scrape["spec"]["staticConfigs"] == [{"targets": [address]}]
    plain = yaml.safe_load((OBSERVABILITY / "prometheus.yaml").read_text())["scrape_configs"][1]
    spec = scrape["spec"]
    assert (spec["jobName"], spec["scrapeInterval"], spec["metricsPath"]) == (
        plain["job_name"],
        plain["scrape_interval"],
        plain["metrics_path"],
    )


def program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}, of Debian's package prometheus")
    return found


def test_promtool_takes_configuration_rules_and_every_query(tmp_path: Path):
    promtool = program("promtool")
    shutil.copytree(OBSERVABILITY, tmp_path / "here")
    (tmp_path / "here" / "api-key").touch()
    asked = [{"record": f"query:{number}", "expr": query.filled()} for number, query in enumerate(QUERIES)]
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": asked}]}))
    for command in (["config", tmp_path / "here" / "prometheus.yaml"], ["rules", tmp_path / "queries.yaml"]):
        done = subprocess.run([promtool, "check", *map(str, command)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


# An alert, series that it is for, series that it is not for, and after how many minutes it is looked at.
PLANTED = [
    ("TargetDown", [('up{job="ray", instance="a"}', "0x30")], [('up{job="ray", instance="a"}', "1x30")], 5),
    (
        "TrainingStalled",
        [('ray_gist_ray_train_step{run="mine"}', "7x30")],
        [
            ('ray_gist_ray_train_step{run="mine"}', "1+1x30"),
            ('ray_gist_ray_train_step{run="ended"}', "7x9 stale"),
        ],
        20,
    ),
    (
        "TrainingRestarts",
        [(f'ray_gist_ray_train_events_total{{run="mine", event="start", WorkerId="{n}"}}', "1x200") for n in range(4)],
        [(f'ray_gist_ray_train_events_total{{run="mine", event="start", WorkerId="{n}"}}', "1x200") for n in range(3)],
        30,
    ),
    (
        "EvaluationTaskFailed",
        [('ray_gist_ray_evaluation_tasks{model="m", state="failed"}', "1x9")],
        [('ray_gist_ray_evaluation_tasks{model="m", state="failed"}', "0x9")],
        5,
    ),
    (
        "NodeMemoryFull",
        [('ray_node_mem_used{instance="a"}', "95x9"), ('ray_node_mem_total{instance="a"}', "100x9")],
        [('ray_node_mem_used{instance="a"}', "90x9"), ('ray_node_mem_total{instance="a"}', "100x9")],
        5,
    ),
    (
        "ServingErrors",
        # Probes and scrapes do not hide the errors, and a replica that is not ready yet is none.
        [('gist_ray_requests_total{route="/embed", status="200"}', "0+90x30"),
         ('gist_ray_requests_total{route="/embed", status="500"}', "0+10x30"),
         ('gist_ray_requests_total{route="/metrics", status="200"}', "0+9000x30")],
        [('gist_ray_requests_total{route="/embed", status="200"}', "0+90x30"),
         ('gist_ray_requests_total{route="/embed", status="400"}', "0+10x30"),
         ('gist_ray_requests_total{route="/ready", status="503"}', "0+90x30")],
        20,
    ),
    (
        "ServingSheds",
        [('gist_ray_requests_shed_total{model="m"}', "0+1x30")],
        [('gist_ray_requests_shed_total{model="m"}', "9x30")],
        20,
    ),
    (
        "ServingSlow",
        [('gist_ray_request_seconds_bucket{route="/embed", le="5"}', "0+0x30"),
         ('gist_ray_request_seconds_bucket{route="/embed", le="+Inf"}', "0+60x30")],
        [('gist_ray_request_seconds_bucket{route="/metrics", le="5"}', "0+0x30"),
         ('gist_ray_request_seconds_bucket{route="/metrics", le="+Inf"}', "0+60x30")],
        25,
    ),
    ("ModelNotLoaded", [("gist_ray_failed_swaps_total", "0 0 1x30")], [("gist_ray_failed_swaps_total", "1x30")], 9),
    (
        "NoReplicaReady",
        [('gist_ray_ready{model="m", replica="a"}', "0x30")],
        [('gist_ray_ready{model="m", replica="a"}', "0x30"), ('gist_ray_ready{model="m", replica="b"}', "1x30")],
        9,
    ),
]  # fmt: skip


def test_alerts_fire_when_they_should_and_not_else(tmp_path: Path):
    promtool = program("promtool")
    assert [name for name, *_ in PLANTED] == [alert["alert"] for alert in ALERTS]
    cases = []
    for name, bad, good, minutes in PLANTED:
        for series in (bad, good):
            fires = series is bad
            cases.append(
                {
                    "interval": "1m",
                    "input_series": [{"series": series_name, "values": values} for series_name, values in series],
                    "promql_expr_test": [
                        {
                            "expr": f'count(ALERTS{{alertname="{name}", alertstate="firing"}}) > bool 0 or vector(0)',
                            "eval_time": f"{minutes}m",
                            "exp_samples": [{"labels": "{}", "value": int(fires)}],
                        }
                    ],
                }
            )
    test = {"rule_files": [str(OBSERVABILITY / "alerts.yaml")], "evaluation_interval": "1m", "tests": cases}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    done = subprocess.run(
        [promtool, "test", "rules", str(tmp_path / "test.yaml")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


_DRIVER = """
import sys
from contextlib import redirect_stdout
from pathlib import Path
from gist_ray.cluster import connected
from gist_ray.config import ClusterConfig
from gist_ray.evaluation.run import evaluate
from gist_ray.recipe_file import load_recipe
from gist_ray.serving.app import serve_model
from gist_ray.serving_config import ServingConfig
from gist_ray.training.run import train

folder, model = Path(sys.argv[1]), sys.argv[2]
cluster = ClusterConfig(num_workers=2, data_workers=2)
serving = ServingConfig(port=0, min_replicas=2, max_replicas=2, batch_tokens=512, max_queue_tokens=4000)
say = sys.stdout
with redirect_stdout(sys.stderr), connected(cluster), serve_model(model, serving, model_id="org/demo") as endpoint:
    print(endpoint.url, file=say, flush=True)
    sys.stdin.readline()
    train(load_recipe(str(folder / "recipe.yaml")))
    for report in ("first", "second"):  # what the first one computed is in the cache of the second
        evaluate(model, output_dir=folder / report, data=folder / "tasks", cluster=cluster)
    print("done", file=say, flush=True)
    sys.stdin.readline()
"""


def write_work(folder: Path, model: Path, rows: list[dict[str, Any]]) -> None:
    """A recipe with its data, and two tasks."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "watched",
        "output_dir": str(folder / "runs"),
        "data": {"sources": [{"path": str(folder / "rows.jsonl")}]},
        "student": {"path": str(model), "max_tokens": 32},
        "guide": {"path": str(model)},
        "train": {"batch_size": 16, "epochs": 42, "learning_rate": 1e-3, "checkpoint_steps": 60},
        "validation": {"rows": 16},
        "cluster": {"num_workers": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for task in range(2):
        pairs = [
            {"sentence1": row["query"], "sentence2": row["pos"], "score": number % 5}
            for number, row in enumerate(rows[task * 100 : task * 100 + 100])
        ]
        file = folder / "tasks" / f"Verses{task}" / "test.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


class Traffic:
    """Questions from four clients all the time, some of them refused."""

    def __init__(self, url: str, key: str, rows: list[dict[str, Any]]) -> None:
        self.texts = self.refused = 0
        self._url, self._headers, self._rows = url, {"authorization": f"Bearer {key}"}, rows
        self._over, self._lock = threading.Event(), threading.Lock()
        self._clients, self._together = ThreadPoolExecutor(4), threading.Barrier(4)

    def __enter__(self) -> Traffic:
        self._asking = [self._clients.submit(self._ask, number) for number in range(4)]
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._together.abort()
        for client in self._asking:
            client.result(60)

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self._url, headers=self._headers, timeout=60, trust_env=False) as client:
            for turn in itertools.count():
                if self._over.wait(0.2):
                    return
                crowd = turn % 20 == 19  # all at once, with new texts: more than may wait
                if crowd:
                    with suppress(threading.BrokenBarrierError):
                        self._together.wait(60)
                chosen = [self._rows[(number * 99 + turn * 7 + i) % len(self._rows)]["query"] for i in range(98)]
                texts = [f"{number} {turn} {text}" for text in chosen] if crowd else [*chosen[:2], "a", "a"]
                answer = client.post("/v1/embeddings", json={"input": texts})
                assert answer.status_code in (200, 429), answer.text
                with self._lock:
                    self.texts += len(texts) if answer.status_code == 200 else 0
                    self.refused += answer.status_code == 429
                if turn % 10 == 0:
                    assert client.post("/v1/embeddings", json={"input": ""}).status_code == 400


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait(20)


class Prometheus:
    """A server with our configuration, on the targets and the endpoint of a test, in seconds instead of ten."""

    def __init__(self, folder: Path, cache: Path, endpoint: str, key: str) -> None:
        here = folder / "observability"
        shutil.copytree(OBSERVABILITY, here)
        config = (here / "prometheus.yaml").read_text().replace("127.0.0.1:8000", endpoint.removeprefix("http://"))
        (here / "prometheus.yaml").write_text(re.sub(r"(_interval: )\d+s", r"\g<1>1s", config))
        (here / "targets").symlink_to(cache / "prometheus")
        (here / "api-key").write_text(key)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/api/v1"
        options = ["--config.file", here / "prometheus.yaml", "--storage.tsdb.path", folder / "tsdb"]
        options += ["--web.listen-address", f"127.0.0.1:{port}"]
        with (folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(
                [program("prometheus"), *map(str, options)], stdout=log, stderr=log, text=True
            )

    def ask(self, path: str, **parameters: Any) -> Any:
        answer = httpx.get(f"{self.url}/{path}", params=parameters, timeout=60, trust_env=False)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def wait(self, holds: Callable[[], Any], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None
            with suppress(httpx.HTTPError, AssertionError):  # it starts
                if holds():
                    return
            time.sleep(0.5)
        raise AssertionError(self.ask("targets")["activeTargets"])

    def range(self, start: float, expression: str) -> Series:
        found = self.ask("query_range", query=expression, start=start, end=time.time(), step="1")["result"]
        return [(series["metric"], [(float(at), float(value)) for at, value in series["values"]]) for series in found]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_prometheus_has_an_answer_to_every_query(tiny_model: Path, verse_rows, tmp_path: Path):
    program("prometheus")
    write_work(tmp_path, tiny_model, verse_rows[:320])
    cache, key = tmp_path / "cache", secrets.token_hex(16)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GIST_RAY_"))}
    clean |= {"GIST_RAY_CACHE": str(cache), "GIST_RAY_API_KEYS": key, "RAY_metrics_report_interval_ms": "3000"}
    command = [sys.executable, "-c", _DRIVER, str(tmp_path), str(tiny_model)]
    driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean)
    with ended(driver):
        assert driver.stdin and driver.stdout
        url = driver.stdout.readline().strip()
        assert url.startswith("http"), "nothing is served"
        prometheus, start = Prometheus(tmp_path, cache, url, key), time.time()
        with ended(prometheus.process):
            for job in ("ray", "gist-ray-serving"):
                prometheus.wait(lambda job=job: prometheus.range(start, f'up{{job="{job}"}} == 1'))
            with Traffic(url, key, verse_rows) as traffic:
                driver.stdin.write("\n")
                driver.stdin.flush()
                assert driver.stdout.readline() == "done\n"
            time.sleep(10)  # each replica is scraped once more, with what was asked of it
            pictures = Path(os.environ.get("GIST_RAY_DASHBOARD_PICTURES", tmp_path))
            for file in DASHBOARDS:
                draw(file, partial(prometheus.range, start), start, pictures / f"{file.stem}.png")
                assert (pictures / f"{file.stem}.png").stat().st_size > 10_000
            check_answers(prometheus, start, traffic)
        driver.stdin.close()
        assert driver.wait(120) == 0


def check_answers(prometheus: Prometheus, start: float, traffic: Traffic) -> None:
    def numbers(query: Query) -> bool:
        found = prometheus.range(start, query.filled())
        return any(not math.isnan(value) for _, points in found for _, value in points)

    assert [(query.panel, query.filled()) for query in QUERIES if not numbers(query)] == []
    for file in DASHBOARDS:
        for name, (selector, label) in variables(file).items():
            chosen = re.sub(r"\$\w+", ".*", selector)
            found = prometheus.ask(f"label/{label}/values", **{"match[]": chosen, "start": start})
            assert found, (file.stem, name)
    rules = prometheus.ask("rules")["groups"][0]["rules"]
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == [] and len(rules) == len(ALERTS)
    # Each scrape was answered by one of two replicas: both are known, and together they have seen all there was.
    [(_, texts)] = prometheus.range(start, "sum(last_over_time(gist_ray_texts_total[1m]))")
    assert len(prometheus.range(start, "gist_ray_ready")) == 2
    [(_, refused)] = prometheus.range(start, "sum(last_over_time(gist_ray_requests_shed_total[1m]))")
    assert (texts[-1][1], refused[-1][1]) == (traffic.texts, traffic.refused) and traffic.refused > 0
