"""The files of `ray up`: Ray's own schema, and what it leaves open."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.manifests import CLUSTER, at, walk

FOLDER = CLUSTER / "ray-up"
FILES = sorted(FOLDER.glob("*.yaml"))
CLOUDS = [FOLDER / "aws.yaml", FOLDER / "gcp.yaml"]
every_file = pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
every_cloud = pytest.mark.parametrize("file", CLOUDS, ids=lambda f: f.stem)
# What the schema says nothing of: the cloud's own names of a machine's parts, and what the provider may hold. Written
# down from the clouds' references, as far as we use them.
PROVIDER = {
    "aws": {"type", "region", "availability_zone", "use_internal_ips", "cache_stopped_nodes"},
    "gcp": {"type", "region", "availability_zone", "project_id", "use_internal_ips", "cache_stopped_nodes"},
    "local": {"type", "head_ip", "worker_ips"},
}
NODE = {
    "aws": {"InstanceType", "ImageId", "SubnetIds", "SecurityGroupIds", "IamInstanceProfile", "Name", "MetadataOptions",
            "HttpTokens", "HttpPutResponseHopLimit", "BlockDeviceMappings", "DeviceName", "Ebs", "VolumeSize",
            "VolumeType", "Encrypted", "DeleteOnTermination", "InstanceMarketOptions", "MarketType"},
    "gcp": {"machineType", "disks", "boot", "autoDelete", "type", "initializeParams", "diskSizeGb", "sourceImage",
            "networkInterfaces", "subnetwork", "serviceAccounts", "email", "scopes", "scheduling",
            "onHostMaintenance", "provisioningModel", "instanceTerminationAction"},
}  # fmt: skip


def tree_of(file: Path) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(file.read_text())
    return tree


def problems(tree: dict[str, Any]) -> list[str]:
    kind = tree.get("provider", {}).get("type")
    found = [f"provider.{key}" for key in set(tree.get("provider", {})) - PROVIDER.get(kind, set())]
    for node_type in tree.get("available_node_types", {}).values():
        config = node_type.get("node_config", {})
        found += [
            key for _, node in walk(config) if isinstance(node, dict) for key in set(node) - NODE.get(kind, set())
        ]
        found += [key for key in node_type.get("resources", {}) if key not in ("CPU", "GPU")]
    try:
        validate_config(prepare_config(copy.deepcopy(tree)))
    except Exception as error:  # of many types
        found.append(str(error).splitlines()[0])
    return found


@every_file
def test_it_is_valid(file: Path):
    assert problems(tree_of(file)) == []


@every_file
def test_every_misspelt_key_is_found(file: Path):
    tree = tree_of(file)
    paths = [(*path, key) for path, node in walk(tree) if isinstance(node, dict) for key in node]
    free = [path for path in paths if path[-2:-1] == ("file_mounts",) or path[:-1] == ("available_node_types",)]
    assert len(paths) > 20
    missed = []
    for path in paths:
        wrong = copy.deepcopy(tree)
        parent = at(wrong, path[:-1])
        parent[f"{path[-1]}s"] = parent.pop(path[-1])
        if path not in free and not problems(wrong):
            missed.append(path)
    assert missed == []


@every_file
def test_nodes_ask_for_a_token_and_the_dashboard_stays_on_loopback(file: Path):
    tree = tree_of(file)
    options = dict(
        option.split(" ", 1)[1].split("=", 1) for option in tree["docker"]["run_options"] if "--env" in option
    )
    assert options["RAY_AUTH_MODE"] == "token"
    assert options["RAY_AUTH_TOKEN_PATH"] in tree["file_mounts"]
    head, worker = (" ".join(tree[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert "--dashboard-host=127.0.0.1" in head and "--num-cpus=0" in head
    assert "--dashboard-host" not in worker and "$RAY_HEAD_IP:6379" in worker and "--port=6379" in head
    for command in (head, worker):
        assert "/home/ray/api-keys" in command and "/home/ray/api-keys" in tree["file_mounts"]
    assert f"chmod 600 {' '.join(tree['file_mounts'])}" in tree["setup_commands"]


@every_file
def test_images_are_the_launchers_of_the_dockerfile(file: Path):
    docker = tree_of(file)["docker"]
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert " AS launcher\n" in dockerfile
    for image in (docker["head_image"], docker["worker_image"]):
        name, _, tag = image.rpartition(":")
        assert name == "registry.example.com/gist-ray" and tag.endswith("-launcher")
        assert f"gist-ray:{tag.removesuffix('-launcher')}" in dockerfile
    assert "--volume /mnt/gist-ray:/mnt/gist-ray" in docker["run_options"]


@every_cloud
def test_no_node_is_public_and_no_role_is_ray_s_own(file: Path):
    tree = tree_of(file)
    assert tree["provider"]["use_internal_ips"] is True and tree["provider"]["cache_stopped_nodes"] is False
    for name, node_type in tree["available_node_types"].items():
        config = node_type["node_config"]
        role = "head" if name == "head" else "worker"
        if file.stem == "aws":
            assert config["IamInstanceProfile"] == {"Name": f"gist-ray-{role}"}
            assert config["MetadataOptions"]["HttpTokens"] == "required"
            assert config["SecurityGroupIds"] and config["SubnetIds"]
            assert all(disk["Ebs"]["Encrypted"] for disk in config["BlockDeviceMappings"])
        else:
            assert config["serviceAccounts"][0]["email"].startswith(f"gist-ray-{role}@")
            assert "accessConfigs" not in config["networkInterfaces"][0]  # what gives a public address


@every_cloud
def test_spot_is_an_extra(file: Path):
    types = tree_of(file)["available_node_types"]
    assert types["spot"]["min_workers"] == 0 < types["on-demand"]["min_workers"]
    assert types["spot"]["priority"] > types["on-demand"].get("priority", 0)
    spot, demand = (json.dumps(types[name]["node_config"]).lower() for name in ("spot", "on-demand"))
    assert '"spot"' in spot and '"spot"' not in demand
    assert sum(types[name]["max_workers"] for name in ("spot", "on-demand")) == tree_of(file)["max_workers"]


def test_the_policy_passes_the_workers_role_alone_and_ends_its_own_machines_alone():
    policy = json.loads((FOLDER / "aws-head-policy.json").read_text())
    actions = {action: statement for statement in policy["Statement"] for action in statement["Action"]}
    assert not [action for action in actions if "*" in action]
    assert actions["iam:PassRole"]["Resource"].endswith("role/gist-ray-worker")
    cluster = tree_of(FOLDER / "aws.yaml")["cluster_name"]
    assert actions["ec2:TerminateInstances"]["Condition"] == {
        "StringEquals": {"ec2:ResourceTag/ray-cluster-name": cluster}
    }
    assert {action for action, statement in actions.items() if statement["Resource"] == "*"} == {
        action for action in actions if action.startswith("ec2:Describe")
    }
