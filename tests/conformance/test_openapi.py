"""The API against its own description, /openapi.json: thousands of generated requests, none of which may break it."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.generated import DIM, MODEL_ID, PROMPT_NAME, Api, contract_kept, executed_cases
from tests.conformance.served import KEY, Served
from tests.serving.served import POSTS

pytestmark = pytest.mark.slow

CASES = {"positive": 1_300, "negative": 700}
"""Of each route that takes a body: bodies as described, and others, which take longer to make."""
ACCEPTED_CASES = 100


def test_ten_thousand_generated_requests_are_answered_as_described():
    """No 5xx, no status and no body but those described; and what is not as described is refused."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        asked = [(path, mode, count) for mode, count in CASES.items() for path in POSTS]
        runs = [pool.submit(contract_kept, *each) for each in asked]
        executed = [run.result() for run in runs]
    print(dict(zip(asked, executed, strict=True)))
    assert all(done >= count for done, (_, _, count) in zip(executed, asked, strict=True))
    assert sum(executed) >= 10_000


def test_its_own_command_line_finds_nothing_amiss(served: Served, tmp_path: Path):
    """Over HTTP, with keys: each limit of each field, keys left out and wrong, methods that are not there."""
    settings = tmp_path / "schemathesis.toml"
    settings.write_text(
        # Among others 413 for too many texts. A random name of a model or prompt is right to be refused.
        "[checks.negative_data_rejection]\nexpected-statuses = [400, 401, 404, 405, 413, 422]\n"
        "[checks.positive_data_acceptance]\nenabled = false\n"
    )
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", settings, "--no-color", "run"]
    command += [f"{served.url}/openapi.json", "--header", f"Authorization: Bearer {KEY}", "--phases", "coverage"]
    command += ["--seed", "1", "--generation-database", "none", "--suppress-health-check", "all", "--warnings", "off"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    cases, passed = re.search(r"(\d+) generated, (\d+) passed", done.stdout).groups()
    assert int(cases) >= 300 and int(passed) >= 300, done.stdout


@pytest.mark.parametrize("path", POSTS)
def test_what_this_server_has_is_answered(path: str):
    """With the names and sizes of this model, every body that fits the description is answered with vectors."""
    known = {
        "model": {"const": MODEL_ID},
        "prompt_name": {"const": PROMPT_NAME},
        "dimensions": {"type": "integer", "minimum": 1, "maximum": DIM},
    }
    with Api() as api:

        def check(case: Any) -> None:
            answer = api.answer(case)
            assert answer.status_code == 200, answer.text
            case.validate_response(answer)

        narrowed = with_properties(api.description, known)
        assert narrowed != api.description
        assert executed_cases(narrowed, path, "positive", ACCEPTED_CASES, check) >= ACCEPTED_CASES


def with_properties(tree: Any, known: dict[str, Any]) -> Any:
    """A description in which these fields take these values, wherever a request has them."""
    if isinstance(tree, list):
        return [with_properties(item, known) for item in tree]
    if not isinstance(tree, dict):
        return tree
    narrowed = {key: with_properties(value, known) for key, value in tree.items()}
    if isinstance(fields := narrowed.get("properties"), dict):
        narrowed["properties"] = {name: known.get(name, field) for name, field in fields.items()}
    return narrowed
