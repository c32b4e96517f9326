"""What one manifest calls by name another defines: images, accounts, secrets, volumes, ports, paths, commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from gist_ray.cli import _parser
from gist_ray.config import Recipe
from gist_ray.recipe_file import load_recipe
from tests.cluster.manifests import (
    CLUSTER,
    FILES,
    KUBERNETES,
    OVERLAYS,
    RAY_KINDS,
    ROOT,
    STAGES,
    Manifest,
    documents,
    pod_templates,
    rendered,
    walk,
)

EVERYTHING = [doc for file in FILES for doc in documents(file)]
RAY = [doc for doc in EVERYTHING if doc["kind"] in RAY_KINDS]
PARTS = {"RayCluster": "spec", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
READY_MADE = {"kube-root-ca.crt"}  # every namespace has it
every_ray = pytest.mark.parametrize("manifest", RAY, ids=lambda m: f"{m['kind']}:{m['metadata']['name']}")
every_kind = pytest.mark.parametrize("machine", ["cpu", "gpu"])
every_stage = pytest.mark.parametrize("stage", STAGES)


def named(kind: str) -> set[str]:
    return {doc["metadata"]["name"] for doc in EVERYTHING if doc["kind"] == kind}


def manifest_of(kind: str, name: str) -> Manifest:
    (found,) = [doc for doc in EVERYTHING if doc["kind"] == kind and doc["metadata"]["name"] == name]
    return found


def ray_cluster(manifest: Manifest) -> Manifest:
    part = PARTS[manifest["kind"]]
    return manifest["spec"] if part == "spec" else manifest["spec"][part]


def values(tree: Any, key: str) -> Iterator[Any]:
    return (node[key] for _, node in walk(tree) if isinstance(node, dict) and key in node)


def containers(tree: Any) -> Iterator[Manifest]:
    return chain.from_iterable(pod["spec"]["containers"] for _, pod in pod_templates(tree))


def component(pod: Manifest) -> str:
    return pod["metadata"]["labels"]["app.kubernetes.io/component"]


def recipe_of(machine: str) -> Recipe:
    return load_recipe(KUBERNETES / "overlays" / machine / "recipe" / "recipe.yaml")


def test_nothing_is_compared_with_nothing():
    assert len(RAY) == 5 and len(OVERLAYS) == 14
    assert {component(pod) for doc in EVERYTHING for _, pod in pod_templates(doc)} == {
        "ray-cluster", "prepare", "train", "evaluate", "serving", "redis"
    }  # fmt: skip


def test_kustomizations_name_files_that_exist_and_every_file_is_named():
    reached: set[Path] = set()
    for file in FILES:
        for doc in documents(file):
            if doc["kind"] in ("Kustomization", "Component"):
                patches = [patch["path"] for patch in doc.get("patches", [])]
                generated = [name for maps in doc.get("configMapGenerator", []) for name in maps["files"]]
                for name in doc.get("resources", []) + doc.get("components", []) + patches + generated:
                    target = (file.parent / name).resolve()
                    reached.add(target if target.is_file() else target / "kustomization.yaml")
    assert [file for file in reached if not file.is_file()] == []
    roots = {overlay / "kustomization.yaml" for overlay in OVERLAYS}
    optional = {KUBERNETES / "components" / name / "kustomization.yaml" for name in ("prometheus", "ingress")}
    assert set(FILES) - reached == (roots - reached) | optional


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda o: "-".join(o.parts[-2:]))
def test_one_image_everywhere(overlay: Path):
    (version,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    machine = "cpu" if overlay.name == "serving" else overlay.parent.name
    images = {container["image"] for doc in rendered(overlay) for container in containers(doc)}
    assert images <= {f"registry.example.com/gist-ray:{version}-{machine}", "redis:7.2.11-alpine"}
    assert images or overlay.name == "recipe"
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert f'image.version="{version}-' in dockerfile and f"gist-ray:{version}-{machine}" in dockerfile


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
@pytest.mark.parametrize("stage", [*STAGES, "ray-cluster", "serving", "platform"])
def test_config_maps_come_with_the_overlay(machine: str, stage: str):
    docs = rendered(KUBERNETES / "overlays" / machine / stage)
    present = {doc["metadata"]["name"] for doc in docs if doc["kind"] == "ConfigMap"} | READY_MADE
    wanted = {source["name"] for doc in docs for source in values(doc, "configMap") if isinstance(source, dict)}
    assert wanted <= present
    assert ("gist-ray-recipe" in wanted) == (stage in STAGES)


def test_accounts_and_claims_are_defined():
    accounts = set(chain.from_iterable(values(doc, "serviceAccountName") for doc in EVERYTHING))
    claims = {claim["claimName"] for doc in EVERYTHING for claim in values(doc, "persistentVolumeClaim")}
    assert accounts == named("ServiceAccount")  # and none is idle
    assert claims == named("PersistentVolumeClaim")


def test_secrets_are_those_that_the_readme_creates():
    readme = (CLUSTER / "README.md").read_text()
    created = re.findall(r"create secret generic (\S+) --from-\w+=([\w.-]+)=", readme)
    wanted = {(ref["name"], ref["key"]) for doc in EVERYTHING for ref in values(doc, "secretKeyRef")}
    wanted |= {(auth["secretName"], "auth_token") for doc in EVERYTHING for auth in values(doc, "authOptions")}
    assert wanted == set(created)
    tls = {entry["secretName"] for doc in EVERYTHING for entry in chain.from_iterable(values(doc, "tls"))}
    assert tls == set(re.findall(r"create secret tls (\S+)", readme))


def test_no_secret_is_written_down():
    assert "Secret" not in {doc["kind"] for doc in EVERYTHING}
    for doc in EVERYTHING:
        for variable in chain.from_iterable(values(doc, "env")):
            if re.search("TOKEN|KEY|PASSWORD|AUTH|SECRET", variable["name"]):
                assert "value" not in variable, variable


@every_ray
def test_mounts_have_volumes(manifest: Manifest):
    for _, pod in pod_templates(manifest):
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        mounts = {mount["name"] for container in pod["spec"]["containers"] for mount in container["volumeMounts"]}
        if pod["spec"]["containers"][0]["name"] == "ray-head":
            mounts |= {mount["name"] for mount in ray_cluster(manifest)["autoscalerOptions"]["volumeMounts"]}
        assert mounts == volumes


def test_the_storage_is_mounted_where_recipes_and_commands_look():
    for manifest in RAY:
        for container in containers(manifest):
            where = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            if "storage" in where:
                assert where["storage"] == "/mnt/gist-ray"
            assert where.get("recipe", "/etc/gist-ray") == "/etc/gist-ray"


def test_redis_is_found():
    (service,) = [doc for doc in EVERYTHING if doc["kind"] == "Service"]
    redis = manifest_of("StatefulSet", "gist-ray-redis")
    assert redis["spec"]["serviceName"] == service["metadata"]["name"]
    assert redis["spec"]["template"]["metadata"]["labels"] == service["spec"]["selector"]
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    options = [doc for doc in RAY if "gcsFaultToleranceOptions" in ray_cluster(doc)]
    assert [doc["kind"] for doc in options] == ["RayCluster", "RayService"]  # a job has a new cluster a try
    assert {ray_cluster(doc)["gcsFaultToleranceOptions"]["redisAddress"] for doc in options} == {address}


def ports_of(pods: list[Manifest]) -> dict[str, int]:
    return {
        port["name"]: port["containerPort"]
        for pod in pods
        for container in pod["spec"]["containers"]
        for port in container.get("ports", [])
    }


def test_policies_open_ports_that_pods_have():
    pods = [pod for doc in EVERYTHING for _, pod in pod_templates(doc)]
    open_inside = {port["port"] for doc in EVERYTHING if doc["kind"] == "NetworkPolicy"
                   for rule in doc["spec"].get("ingress", []) for port in rule.get("ports", [])}  # fmt: skip
    assert open_inside <= set(ports_of(pods).values()) | {52365}  # the agent's, that no container names
    for name in {component(pod) for pod in pods} - {"redis"}:
        selector = {"matchLabels": {"app.kubernetes.io/part-of": "gist-ray", "app.kubernetes.io/component": name}}
        spec = manifest_of("NetworkPolicy", name)["spec"]
        assert spec["podSelector"] == selector
        assert spec["ingress"][0] == {"from": [{"podSelector": selector}]}
        assert spec["egress"] == [{"to": [{"podSelector": selector}]}]
    assert manifest_of("NetworkPolicy", "deny-all")["spec"]["podSelector"] == {}


def test_monitors_and_budget_select_pods():
    for monitor in (doc for doc in EVERYTHING if doc["kind"] == "PodMonitor"):
        kind = monitor["spec"]["selector"]["matchLabels"]["ray.io/node-type"]
        for manifest in RAY:
            pods = [pod for _, pod in pod_templates(manifest) if pod["spec"]["containers"][0]["name"] == f"ray-{kind}"]
            assert pods
            assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports_of(pods).keys()
    budget = manifest_of("PodDisruptionBudget", "gist-ray-serving")["spec"]["selector"]["matchLabels"]
    assert budget.pop("ray.io/node-type") == "worker"  # the operator's label
    assert (
        budget.items()
        <= next(
            pod["metadata"]["labels"] for _, pod in pod_templates(manifest_of("RayService", "gist-ray-serving"))
        ).items()
    )


def test_the_endpoint_has_one_port_and_one_address():
    service = manifest_of("RayService", "gist-ray-serving")
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (backend,) = [
        path["backend"]["service"] for doc in EVERYTHING for path in chain.from_iterable(values(doc, "paths"))
    ]
    assert backend["name"] == f"{service['metadata']['name']}-serve-svc"
    pods = [pod for _, pod in pod_templates(service)]
    assert ports_of(pods)["serve"] == backend["port"]["number"] == config["http_options"]["port"]
    assert config["http_options"]["host"] == "0.0.0.0"
    for pod in pods:
        if pod["spec"]["containers"][0]["name"] == "ray-worker":
            assert pod["spec"]["containers"][0]["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}
    names = [doc["metadata"]["name"] for doc in RAY]
    assert len(set(names)) == len(names)  # or their head services would be one


def test_pods_end_after_their_draining():
    service = manifest_of("RayService", "gist-ray-serving")
    drain_s = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]["drain_s"]
    for group in ray_cluster(service)["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        env = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
        node = float(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        ingress = float(env["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"])
        assert pod["terminationGracePeriodSeconds"] > node + ingress + drain_s
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > drain_s


def test_replicas_have_room():
    service = manifest_of("RayService", "gist-ray-serving")
    serving = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]["serving"]
    groups = ray_cluster(service)["workerGroupSpecs"]
    cpus = [int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]) for group in groups]
    least, most = (
        sum(group[key] * n for group, n in zip(groups, cpus, strict=True)) for key in ("minReplicas", "maxReplicas")
    )
    assert serving["threads"] * serving["min_replicas"] <= least
    assert serving["threads"] * serving["max_replicas"] <= most


@every_kind
@every_stage
def test_commands_parse_and_agree_with_the_recipe(machine: str, stage: str):
    recipe = recipe_of(machine)
    (job,) = [doc for doc in rendered(KUBERNETES / "overlays" / machine / stage) if doc["kind"] == "RayJob"]
    words = shlex.split(job["spec"]["entrypoint"])
    script = words[2] if words[:2] == ["bash", "-c"] else shlex.join(words)
    # The operator puts the line into a shell: what it could take for itself must be inside quotes.
    assert not set("&|;<>") & set(re.sub("'[^']*'", "", job["spec"]["entrypoint"]))
    commands = [shlex.split(command) for command in script.split("&&")]
    parsed = [_parser().parse_args(command[1:]) for command in commands]
    assert [command[0] for command in commands] == ["gist-ray"] * len(commands)
    assert [arguments.verb for arguments in parsed] == {"train": ["train", "export"]}.get(stage, [stage])
    if stage == "train":
        assert parsed[0].resume  # a second try, on a new cluster, goes on
        assert parsed[1].checkpoint == str(recipe.checkpoint_dir())
    mounted = f"/etc/gist-ray/{next(iter(_recipe_map(machine)))}"
    assert parsed[0].recipe == mounted


@every_kind
def test_the_model_is_one_folder_from_training_to_serving(machine: str):
    jobs = {stage: _entrypoint(stage) for stage in ("train", "evaluate")}
    service = yaml.safe_load(manifest_of("RayService", "gist-ray-serving")["spec"]["serveConfigV2"])
    (place,) = service["applications"][0]["deployments"][0]["user_config"]["models"].values()
    assert jobs["train"].split()[-1].rstrip("'") == place
    assert f"evaluate {place} " in jobs["evaluate"]
    assert recipe_of(machine).output_dir == "/mnt/gist-ray/runs"


@every_kind
@every_stage
def test_the_smallest_cluster_of_a_stage_holds_what_its_recipe_asks(machine: str, stage: str):
    cluster = recipe_of(machine).cluster
    (job,) = [doc for doc in rendered(KUBERNETES / "overlays" / machine / stage) if doc["kind"] == "RayJob"]
    (group,) = [g for g in ray_cluster(job)["workerGroupSpecs"] if g["minReplicas"]]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    cpus, gpus = int(limits["cpu"]), int(limits.get("nvidia.com/gpu", 0))
    assert gpus == cluster.gpus_per_worker == (machine == "gpu")
    if stage == "train":
        assert isinstance(cluster.num_workers, tuple)
        assert cluster.num_workers[0] == group["minReplicas"]
        assert cluster.num_workers[1] == sum(g["maxReplicas"] for g in ray_cluster(job)["workerGroupSpecs"])
        assert cluster.threads_per_worker <= cluster.cpus_per_worker < cpus
    else:
        on_a_node = cluster.data_workers / group["minReplicas"]
        assert on_a_node * cluster.data_threads <= cpus
        assert on_a_node * cluster.gpus_per_worker <= gpus


@every_stage
def test_runtime_environments_have_known_keys_alone(stage: str):
    from ray.runtime_env import RuntimeEnv

    tree = yaml.safe_load(manifest_of("RayJob", f"gist-ray-{stage}")["spec"]["runtimeEnvYAML"])
    assert tree and set(tree) <= set(RuntimeEnv.known_fields)
    assert set(dict(tree, env_var={})) - set(RuntimeEnv.known_fields) == {"env_var"}  # Ray itself says nothing
    RuntimeEnv(**tree)


def _entrypoint(stage: str) -> str:
    return manifest_of("RayJob", f"gist-ray-{stage}")["spec"]["entrypoint"]


def _recipe_map(machine: str) -> dict[str, str]:
    (doc,) = [doc for doc in rendered(KUBERNETES / "overlays" / machine / "recipe") if doc["kind"] == "ConfigMap"]
    data: dict[str, str] = doc["data"]
    return data
