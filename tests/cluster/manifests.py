"""The manifests of cluster/kubernetes: how they are read and rendered, and what is wrong with one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from tests.conftest import SHARED

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
KUBERNETES = CLUSTER / "kubernetes"
FILES = sorted(KUBERNETES.rglob("*.yaml"))
OVERLAYS = sorted(file.parent for file in KUBERNETES.glob("overlays/*/*/kustomization.yaml"))
STAGES = ("prepare", "train", "evaluate")
RAY_KINDS = ("RayCluster", "RayJob", "RayService")

Manifest = dict[str, Any]

_text = {"type": "string"}
_labels = {"type": "object", "additionalProperties": _text}
_relabelings = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"sourceLabels": {"type": "array", "items": _text}, "targetLabel": _text},
        "additionalProperties": False,
    },
}
# Of the two kinds that no package has a schema of: exactly the keys that we use, written down from their documentation.
_OUR_OWN = {
    "PodMonitor": {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": "monitoring.coreos.com/v1"},
            "kind": {"const": "PodMonitor"},
            "metadata": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": _text, "namespace": _text, "labels": _labels},
                "additionalProperties": False,
            },
            "spec": {
                "type": "object",
                "required": ["selector", "podMetricsEndpoints"],
                "properties": {
                    "jobLabel": _text,
                    "namespaceSelector": {
                        "type": "object",
                        "properties": {"matchNames": {"type": "array", "items": _text}},
                        "additionalProperties": False,
                    },
                    "selector": {
                        "type": "object",
                        "properties": {"matchLabels": _labels},
                        "additionalProperties": False,
                    },
                    "podMetricsEndpoints": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["port"],
                            "properties": {"port": _text, "relabelings": _relabelings},
                            "additionalProperties": False,
                        },
                    },
                },
                "additionalProperties": False,
            },
        },
        "additionalProperties": False,
    },
    "Kustomization": {
        "type": "object",
        "required": ["apiVersion", "kind"],
        "properties": {
            "apiVersion": {"const": "kustomize.config.k8s.io/v1beta1"},
            "kind": {"const": "Kustomization"},
            "namespace": _text,
            "resources": {"type": "array", "items": _text},
            "components": {"type": "array", "items": _text},
            "configMapGenerator": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"name": _text, "files": {"type": "array", "items": _text}},
                    "additionalProperties": False,
                },
            },
            "generatorOptions": {
                "type": "object",
                "properties": {"disableNameSuffixHash": {"type": "boolean"}, "labels": _labels},
                "additionalProperties": False,
            },
        },
        "additionalProperties": False,
    },
    "Component": {
        "type": "object",
        "required": ["apiVersion", "kind"],
        "properties": {
            "apiVersion": {"const": "kustomize.config.k8s.io/v1alpha1"},
            "kind": {"const": "Component"},
            "resources": {"type": "array", "items": _text},
            "images": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": _text,
                        "newName": _text,
                        "newTag": _text,
                        "digest": {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"},
                    },
                    "additionalProperties": False,
                },
            },
            "patches": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["path", "target"],
                    "properties": {"path": _text, "target": _labels},
                    "additionalProperties": False,
                },
            },
        },
        "additionalProperties": False,
    },
}


def documents(file: Path) -> list[Manifest]:
    """The manifests in a file; none in a recipe or a patch."""
    return [
        doc for doc in yaml.safe_load_all(file.read_text(encoding="utf-8")) if isinstance(doc, dict) and "kind" in doc
    ]


@cache
def rendered(folder: Path) -> tuple[Manifest, ...]:
    """What `kubectl apply -k` would send; skips where there is no kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl, whose kustomize renders the overlays")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def problems(manifest: Manifest) -> list[str]:
    """What the schema of its kind says: unknown keys, missing keys, values of another type.

    Kubernetes' kinds by the schemas of kubernetes-validate; KubeRay's by those in shared/, and their pods by
    Kubernetes' too; PodMonitor and kustomize's by our own.
    """
    kind = manifest["kind"]
    if kind in RAY_KINDS:
        pods = list(pod_templates(manifest))
        found = [error for path, pod in pods for error in _errors(pod, _kubernetes("podtemplatespec-v1"), path)]
        return found + _errors(manifest, _kuberay(kind))
    if kind in _OUR_OWN:
        return _errors(manifest, _own(kind))
    if "apiVersion" not in manifest:
        return ["apiVersion is missing"]
    group, _, version = manifest["apiVersion"].rpartition("/")
    name = "-".join(filter(None, (kind.lower(), group.split(".")[0], version)))
    return _errors(manifest, _kubernetes(name))


def pod_templates(manifest: Manifest) -> Iterator[tuple[tuple[Any, ...], Manifest]]:
    """Each pod template of a manifest, at any depth, with its path."""
    for path, node in walk(manifest):
        if isinstance(node, dict) and isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
            yield path, node


def walk(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every node of a tree with its path, the root first."""
    yield path, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from walk(child, (*path, key))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    """The node at a path."""
    for key in path:
        tree = tree[key]
    return tree


def all_documents() -> list[Any]:
    """Each manifest of each file, as a test's parameter."""
    found = []
    for file in FILES:
        for doc in documents(file):
            name = doc.get("metadata", {}).get("name", "")
            found.append(pytest.param(doc, id=f"{file.relative_to(KUBERNETES)}:{doc['kind']}:{name}"))
    return found


def _errors(node: Any, schema: jsonschema_rs.Validator, path: tuple[Any, ...] = ()) -> list[str]:
    return [f"{[*path, *error.instance_path]}: {error.message}" for error in schema.iter_errors(node)]


@cache
def _own(kind: str) -> jsonschema_rs.Validator:
    return jsonschema_rs.validator_for(_OUR_OWN[kind])


@cache
def _kuberay(kind: str) -> jsonschema_rs.Validator:
    folder = SHARED / "kuberay-1.7.0"
    if not folder.is_dir():
        pytest.skip(f"needs the schemas of KubeRay in {SHARED.name}/{folder.name}")
    return jsonschema_rs.validator_for(json.loads((folder / f"{kind.lower()}.schema.json").read_text()))


@cache
def _kubernetes(name: str) -> jsonschema_rs.Validator:
    schema = json.loads((_schemas() / f"{name}.json").read_text().replace("/api/_definitions.json#", "#"))
    return jsonschema_rs.validator_for(schema | {"$defs": _definitions()})


@cache
def _definitions() -> dict[str, Any]:
    definitions: dict[str, Any] = json.loads((_schemas() / "_definitions.json").read_text())["$defs"]
    return definitions


def _schemas() -> Path:
    """Those of the newest Kubernetes in kubernetes-validate, where unknown keys are errors."""
    spec = find_spec("kubernetes_validate")
    assert spec and spec.origin, 'install the dev extra: pip install -e ".[dev]"'
    folders = (Path(spec.origin).parent / "kubernetes-json-schema").glob("v*-local-strict")
    return max(folders, key=lambda folder: [int(part) for part in re.findall(r"\d+", folder.name)])
