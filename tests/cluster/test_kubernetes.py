"""Every manifest is what its kind's schema says, and a misspelt key in it is found, wherever it stands."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.manifests import (
    KUBERNETES,
    OVERLAYS,
    Manifest,
    all_documents,
    at,
    documents,
    problems,
    rendered,
    walk,
)

every_manifest = pytest.mark.parametrize("manifest", all_documents())
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda o: "-".join(o.parts[-2:]))
# Maps whose keys are anybody's choice: no schema knows them. test_references.py holds ours against each other.
FREE = {"labels", "annotations", "matchLabels", "requests", "limits", "rayStartParams", "target"}


def misspellings(manifest: Manifest) -> list[tuple[Any, ...]]:
    """The path of every key whose spelling a schema decides."""
    found = []
    for path, node in walk(manifest):
        free = path and (path[-1] in FREE or path in (("spec", "metadata"), ("spec", "selector")))
        if manifest["kind"] != "Service" and path == ("spec", "selector"):
            free = False  # of a service it is a map of labels, elsewhere a structure
        if isinstance(node, dict) and not free:
            found += [(*path, key) for key in node if (*path, key) != ("kind",)]  # which schema to take
    return found


def misspelt(manifest: Manifest, path: tuple[Any, ...]) -> Manifest:
    wrong = copy.deepcopy(manifest)
    parent = at(wrong, path[:-1])
    parent[f"{path[-1]}s"] = parent.pop(path[-1])
    return wrong


@every_manifest
def test_it_is_valid(manifest: Manifest):
    assert problems(manifest) == []


@every_manifest
def test_every_misspelt_key_is_found(manifest: Manifest):
    paths = misspellings(manifest)
    assert len(paths) > 1
    assert [path for path in paths if not problems(misspelt(manifest, path))] == []


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("base/train/ray-job.yaml", ("spec", "backoffLimit"), "three"),
        ("base/train/ray-job.yaml", ("spec", "rayClusterSpec", "authOptions", "mode"), "tokn"),
        ("base/serving/ray-service.yaml", ("spec", "rayClusterConfig", "enableInTreeAutoscaling"), "yes"),
        ("base/serving/pod-disruption-budget.yaml", ("spec", "selector"), []),
        ("base/platform/storage.yaml", ("spec", "accessModes"), "ReadWriteMany"),
        ("base/platform/network-policies.yaml", ("spec", "policyTypes"), "Egress"),
        ("components/prometheus/pod-monitors.yaml", ("spec", "podMetricsEndpoints"), {}),
    ],
)
def test_a_wrong_value_is_found(file: str, path: tuple[str, ...], value: Any):
    manifest = documents(KUBERNETES / file)[0]
    at(manifest, path[:-1])[path[-1]] = value
    assert problems(manifest)


@every_overlay
def test_what_is_applied_is_valid(overlay: Any):
    found = rendered(overlay)
    assert found
    for manifest in found:
        assert problems(manifest) == []
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "gist-ray"


@pytest.mark.parametrize(("component", "stage"), [("prometheus", "platform"), ("ingress", "serving")])
def test_optional_components_are_valid_where_they_belong(component: str, stage: str, tmp_path: Path):
    """As the README says: the component's line added to the overlay's."""
    copied = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, copied)
    kustomization = copied / "overlays" / "cpu" / stage / "kustomization.yaml"
    tree = yaml.safe_load(kustomization.read_text())
    tree["components"] = [*tree.get("components", []), f"../../../components/{component}"]
    kustomization.write_text(yaml.safe_dump(tree))
    more = [
        doc for doc in rendered(kustomization.parent) if doc not in rendered(KUBERNETES / "overlays" / "cpu" / stage)
    ]
    assert {doc["kind"] for doc in more} == {"prometheus": {"PodMonitor", "NetworkPolicy"}, "ingress": {"Ingress"}}[
        component
    ]
    for doc in more:
        assert problems(doc) == [] and doc["metadata"]["namespace"] == "gist-ray"
