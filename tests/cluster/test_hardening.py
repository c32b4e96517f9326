"""What a platform engineer looks for first: nobody is root, nobody is public, nothing is unbounded."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.cluster.manifests import CLUSTER, Manifest, pod_templates
from tests.cluster.test_references import EVERYTHING, RAY, every_ray, named, ray_cluster, values

PODS = [
    pytest.param(pod["spec"], id=f"{doc['kind']}:{doc['metadata']['name']}:{'.'.join(map(str, path))}")
    for doc in EVERYTHING
    for path, pod in pod_templates(doc)
]
every_pod = pytest.mark.parametrize("pod", PODS)


@every_pod
def test_pods_meet_the_restricted_standard_with_a_read_only_root(pod: dict[str, Any]):
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & pod.keys()
    assert not [volume for volume in pod.get("volumes", []) if "hostPath" in volume]
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not [port for port in container.get("ports", []) if "hostPort" in port]


@every_pod
def test_containers_have_requests_and_limits(pod: dict[str, Any]):
    for container in pod["containers"]:
        resources = container["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys() & resources["limits"].keys()
        if container["name"].startswith("ray-") and container["name"] != "ray-job-submitter":
            # Ray takes the limit for what there is: memory that was not requested may not be there.
            assert resources["requests"]["memory"] == resources["limits"]["memory"]
    for volume in pod.get("volumes", []):
        if "emptyDir" in volume:
            assert "sizeLimit" in volume["emptyDir"]


@every_ray
def test_clusters_ask_for_a_token_and_keep_work_off_the_head(manifest: Manifest):
    cluster = ray_cluster(manifest)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "gist-ray-token"}
    head = cluster["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "dashboard-host" not in head["rayStartParams"]  # the operator's; who reaches it is the policies' matter
    assert cluster["enableInTreeAutoscaling"] is True and cluster["autoscalerOptions"]["version"] == "v2"
    # The API's token is in the autoscaler's container, not where jobs run.
    (mount,) = [m for m in cluster["autoscalerOptions"]["volumeMounts"] if "serviceaccount" in m["mountPath"]]
    pod = head["template"]["spec"]
    assert mount["name"] not in {m["name"] for m in pod["containers"][0]["volumeMounts"]}
    (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
    assert "projected" in volume


@every_ray
def test_groups_are_ordered_and_spot_is_an_extra(manifest: Manifest):
    groups = {group["groupName"]: group for group in ray_cluster(manifest)["workerGroupSpecs"]}
    assert list(groups) == ["on-demand", "spot"]
    for name, group in groups.items():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["labels"] == {"ray.io/market-type": name}
        assert "restartPolicy" not in group["template"]["spec"]  # the autoscaler's: Never
    assert groups["spot"]["minReplicas"] == 0 and groups["on-demand"]["minReplicas"] > 0
    assert groups["spot"]["priority"] > groups["on-demand"].get("priority", 0)


def test_manifests_run_the_ray_that_the_locks_hold():
    for machine in ("cpu", "gpu"):
        (pinned,) = re.findall(r"^ray==(\S+)", (CLUSTER / f"requirements-{machine}.txt").read_text(), re.M)
        assert {ray_cluster(manifest)["rayVersion"] for manifest in RAY} == {pinned}


def test_jobs_try_again_and_go():
    for manifest in RAY:
        if manifest["kind"] == "RayJob":
            spec = manifest["spec"]
            assert spec["backoffLimit"] >= 1 and spec["shutdownAfterJobFinishes"] is True
            assert spec["jobId"] == manifest["metadata"]["name"]


def test_serving_reads_and_does_not_start_without_keys():
    (service,) = [manifest for manifest in RAY if manifest["kind"] == "RayService"]
    for _, pod in pod_templates(service):
        (container,) = pod["spec"]["containers"]
        (keys,) = [variable for variable in container["env"] if variable["name"] == "GIST_RAY_API_KEYS"]
        assert "optional" not in keys["valueFrom"]["secretKeyRef"]
        assert [m.get("readOnly") for m in container["volumeMounts"] if m["name"] == "storage"] == [True]


def test_nothing_is_public_and_nothing_has_rights():
    assert not {"LoadBalancer", "NodePort"} & {kind for doc in EVERYTHING for kind in values(doc, "serviceType")}
    assert not {"LoadBalancer", "NodePort"} & {
        doc["spec"].get("type") for doc in EVERYTHING if doc["kind"] == "Service"
    }
    assert not named("Role") | named("ClusterRole") | named("RoleBinding") | named("ClusterRoleBinding")
    for account in (doc for doc in EVERYTHING if doc["kind"] == "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    (namespace,) = [doc for doc in EVERYTHING if doc["kind"] == "Namespace"]
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
