"""The whole road on three hosts, then again with hosts that die, are cut off or slow: the results of one machine."""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from gist_ray.metrics import read_metrics
from tests.evaluation.tiny_tasks import write
from tests.faults.hosts import CLIENT, HEAD, NODES, Hosts, hosts
from tests.faults.verse_tasks import write_verse_tasks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # the first test pays for both roads

KEY = "a-key-of-this-test"
TEXTS = ["In the beginning God created the heavens and the earth.", "Jesus wept."]
GUIDE, WORKER, ENCODER = "ray::BlockEmbedder", "ray::RayTrainWorker", "ray::EncoderActor"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triplets of verses, and tasks on verses: enough texts for a host to die among them."""
    from gist_ray.tour import read_verses

    folder, verses = tmp_path_factory.mktemp("sources"), read_verses()[:12_000]
    write(folder / "triplets.jsonl", [{"query": v.web, "pos": v.ylt} for v in verses[:6000]])
    write_verse_tasks(folder / "tasks", verses)
    return folder


def write_recipe(folder: Path, sources: Path, model: Path) -> None:
    recipe = {
        "name": "run",
        "output_dir": str(folder),
        "data": {"sources": [{"path": str(sources / "triplets.jsonl")}]},
        "student": {"path": str(model), "max_tokens": 32},
        "guide": {"path": str(model)},
        "train": {"batch_size": 60, "checkpoint_steps": 10, "learning_rate": 1e-3},
        # Two CPUs of a node's three: a worker on each node.
        "cluster": {"num_workers": 2, "cpus_per_worker": 2},
    }
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))


def evaluation(model: Path, sources: Path, folder: Path) -> list[str]:
    """Without a cache, so that scores are equal to the last bit.

    A sum in fp32 depends on who shares its batch. With a cache, what one task has embedded is not embedded again for
    another, so batches depend on who was first.
    """
    words = ["gist-ray", "evaluate", str(model), "--data", str(sources / "tasks"), "--out", str(folder / "report")]
    return [*words, "--cache-gb", "0"]


def scores(report: Path) -> dict[str, float]:
    return {task["name"]: task["score"] for task in json.loads((report / "report.json").read_text())["tasks"]}


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "run/metrics.jsonl")]


@pytest.fixture(scope="module")
def single(sources: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The road on this machine alone, without Ray jobs."""
    folder = tmp_path_factory.mktemp("single")
    write_recipe(folder, sources, tiny_model)
    road = """
import sys
from gist_ray import evaluate, export, train
from gist_ray.cluster import connected
from gist_ray.config import ClusterConfig
from gist_ray.recipe_file import load_recipe

folder, tasks = sys.argv[1:]
recipe = load_recipe("run.yaml")
with connected(recipe.cluster):
    model = export(train(recipe), f"{folder}/model")
    evaluate(model, output_dir=f"{folder}/report", data=tasks, cache_gb=0)
"""
    done = subprocess.run(
        [sys.executable, "-c", road, str(folder), str(sources / "tasks")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(folder)) > 90
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Hosts]:
    with hosts(KEY) as made:
        for host in (HEAD, *NODES):
            made.start(host)
        yield made


def succeeded(job: subprocess.Popen[str]) -> str:
    said, _ = job.communicate(timeout=400)
    assert job.returncode == 0, said[-4000:]
    return said


def when(holds: Callable[[], Any], job: subprocess.Popen[str], what: str) -> None:
    """Wait until it holds, while the job runs."""
    deadline = time.monotonic() + 180
    while not holds():
        if job.poll() is not None or time.monotonic() > deadline:
            job.kill()
            raise AssertionError(f"not seen: {what}; {job.communicate()[0][-3000:]}")
        time.sleep(0.05)


@pytest.fixture(scope="module")
def road(
    cluster: Hosts, single: Path, sources: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """prepare, train, export, evaluate as jobs."""
    folder = tmp_path_factory.mktemp("road")
    write_recipe(folder, sources, tiny_model)
    model = folder / "model"
    stages = {
        "prepare": ["gist-ray", "prepare", "run.yaml"],
        "train": ["gist-ray", "train", "run.yaml"],
        "export": ["gist-ray", "export", str(folder / "run/checkpoint"), str(model)],
        "evaluate": evaluation(model, sources, folder),
    }
    for job, words in stages.items():
        started = cluster.submit(job, *words, folder=folder)
        if job == "train":
            when(lambda: cluster.with_process(WORKER) == list(NODES), started, "a worker on each node")
        succeeded(started)
    return folder


@pytest.fixture(scope="module")
def served(cluster: Hosts, road: Path) -> None:
    """Two replicas, on two nodes; each node answers."""
    cluster.deploy(road / "serve.yaml", road / "model")
    cluster.wait_until_served()


def test_the_results_are_those_of_one_machine(road: Path, single: Path):
    assert digests(road / "run/shards") == digests(single / "run/shards")
    assert np.abs(np.subtract(losses(road), losses(single))).max() < 1e-5
    assert scores(road / "report") == scores(single / "report")
    tasks = {task["name"]: task for task in json.loads((road / "report/report.json").read_text())["tasks"]}
    asked, trained_on = tasks["Verses"]["trained_on"]["documents"]  # half of the verses are in the triplets
    assert 0.4 < trained_on / asked < 0.6


def test_a_host_that_is_no_node_is_answered(cluster: Hosts, served, single: Path):
    from gist_ray.encoder import Encoder

    expected = Encoder.load(single / "model").encode(TEXTS)
    for node in NODES:
        status, body = cluster.answer(node, TEXTS)
        assert status == 200
        vectors = [row["embedding"] for row in json.loads(body)["data"]]
        assert np.abs(np.subtract(vectors, expected)).max() < 1e-5


@pytest.mark.parametrize(
    "route", ["/v1/embeddings", "/embed", "/", "/similarity", "/tokenize", "/v1/models", "/info", "/metrics", "/docs"]
)
def test_a_wrong_key_opens_no_route(cluster: Hosts, served, route: str):
    for method in ("GET", "POST"):
        for key in ([], ["-H", "authorization: Bearer wrong"], ["-H", f"authorization: Basic {KEY}"]):
            command = ["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "-X", method, *key, "-d", "{}"]
            status = cluster.run(CLIENT, *command, f"http://{cluster.address(HEAD)}:8000{route}")
            # The page, where a key is typed in, is open; of the rest nobody learns even whether there is such a route.
            assert status == ("200" if (method, route) == ("GET", "/") else "401"), (method, route, key)


def rays_routes() -> list[tuple[str, str]]:
    """Method and path of every REST route of the head's dashboard, as Ray registers them."""
    from ray.dashboard import modules
    from ray.dashboard.optional_utils import DashboardHeadRouteTable
    from ray.dashboard.subprocesses.routes import SubprocessRouteTable

    for module in pkgutil.walk_packages(modules.__path__, f"{modules.__name__}."):
        if "test" not in module.name:
            importlib.import_module(module.name)
    tables = (DashboardHeadRouteTable, SubprocessRouteTable)
    routes = {(method, path) for table in tables for method, paths in table._bind_map.items() for path in paths}
    return sorted((method, re.sub(r"{[^}]*}", "a", path)) for method, path in routes)


def test_without_a_token_no_route_of_rays_is_answered(cluster: Hosts):
    asking = f"""
import httpx, json
routes, found = {rays_routes()!r}, []
with httpx.Client(base_url="{cluster.dashboard}", timeout=30, trust_env=False) as client:
    for method, route in routes:
        refused = [client.request(method, route, headers=headers).status_code
                   for headers in ({{}}, {{"authorization": "Bearer wrong"}})]
        found.append([method, route, *refused])
    known = client.get("/api/version", headers={{"authorization": "Bearer {cluster.token}"}}).status_code
print(json.dumps([known, found]))
"""
    known, found = json.loads(cluster.run(CLIENT, sys.executable, "-c", asking).splitlines()[-1])
    assert known == 200 and len(found) > 50
    healthy = ["GET", "/api/gcs_healthz", 200, 200]  # for probes; it says whether the head lives, and nothing else
    assert [row for row in found if row[2:] != [401, 403] and row != healthy] == []


def test_serving_loses_only_what_a_killed_node_held(cluster: Hosts, served):
    with cluster.asked(HEAD) as found:
        time.sleep(3)
        cluster.kill(NODES[0])
        time.sleep(25)  # the head takes the node for dead in this time, and a new replica comes
    cluster.start(NODES[0])
    assert found["asked"] > 200 and not found["lost"], found
    assert len(found["failures"]) <= 4, found  # each of the four clients has one question in flight


@pytest.fixture
def unserved(cluster: Hosts) -> None:
    """CPUs for what follows."""
    cluster.run(CLIENT, "serve", "shutdown", "--yes")


def segments(folder: Path) -> list[Path]:
    return list((folder / "guide-vectors").rglob("[!.]*.arrow"))


def test_a_node_is_killed_while_the_guide_embeds(
    cluster: Hosts, unserved, single: Path, sources: Path, tiny_model: Path, tmp_path: Path
):
    write_recipe(tmp_path, sources, tiny_model)
    job = cluster.submit("prepare-killed", "gist-ray", "prepare", "run.yaml", folder=tmp_path)
    when(lambda: segments(tmp_path), job, "a block of vectors")
    victim = cluster.with_process(GUIDE)[-1]
    assert len(segments(tmp_path)) < len(segments(single)), "the kill came too late to show anything"
    cluster.kill(victim)
    succeeded(job)
    cluster.start(victim)
    assert digests(tmp_path / "run/shards") == digests(single / "run/shards")


@pytest.mark.parametrize("how", ["killed", "cut off", "slow"])
def test_a_node_goes_while_training(how: str, cluster: Hosts, unserved, single: Path, tmp_path: Path):
    """A killed node closes its connections; of one that is cut off nobody hears; a slow one holds up all, no more."""
    shutil.copytree(single / "run/shards", tmp_path / "run/shards")
    recipe = yaml.safe_load((single / "run.yaml").read_text()) | {"output_dir": str(tmp_path)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    job = cluster.submit(f"train-{how[:4]}", "gist-ray", "train", "run.yaml", folder=tmp_path)
    when(lambda: len(losses(tmp_path)) > 13, job, "a checkpoint")
    victim = NODES[1]
    if how == "slow":
        with cluster.slow(victim, WORKER):
            said = succeeded(job)
    elif how == "killed":
        cluster.kill(victim)
        cluster.start(victim)
        said = succeeded(job)
    else:
        before = cluster.alive_nodes()
        cluster.cut(victim, off=True)
        when(lambda: 0 < len(cluster.alive_nodes()) < len(before), job, "that the head takes it for dead")
        cluster.kill(victim)
        cluster.cut(victim, off=False)
        cluster.start(victim)
        said = succeeded(job)
    assert ("restarted at step" in said) == (how != "slow"), said[-3000:]
    assert losses(tmp_path) == losses(single)  # bit for bit


def test_a_node_is_killed_while_scores_are_made(cluster: Hosts, unserved, single: Path, sources: Path, tmp_path: Path):
    job = cluster.submit("evaluate-killed", *evaluation(single / "model", sources, tmp_path), folder=tmp_path)
    when(lambda: cluster.with_process(ENCODER), job, "an encoder")
    victim = cluster.with_process(ENCODER)[-1]
    time.sleep(3)
    assert job.poll() is None, "the kill came too late to show anything"
    cluster.kill(victim)
    succeeded(job)
    cluster.start(victim)
    assert scores(tmp_path / "report") == scores(single / "report")
