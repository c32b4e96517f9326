"""What a verb writes to stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CODE = """
import logging
from gist_ray.log_lines import name_run, start_lines

start_lines("train", verbose=False)
log = logging.getLogger("gist_ray.some.module")
log.info("step %d\\nof many", 7)
name_run("mine")
log.debug("not shown")
logging.getLogger("other").info("not shown")
try:
    raise ValueError("ä")
except ValueError:
    log.exception("failed")
"""


def stderr(**environment: str) -> list[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIST_RAY_")}
    root = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(
        command, env={**clean, **environment}, cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stderr.splitlines()


def test_json_lines_hold_the_run():
    first, second = [json.loads(line) for line in stderr(GIST_RAY_LOG_FORMAT="json")]
    assert first["time"].endswith("+00:00") and first["level"] == "INFO" and first["verb"] == "train"
    assert first["logger"] == "gist_ray.some.module" and first["message"] == "step 7\nof many"
    assert (first["run"], second["run"]) == (None, "mine")
    assert "error" not in first and second["error"].endswith("ValueError: ä")
    lines = stderr(GIST_RAY_LOG_FORMAT="json", GIST_RAY_RUN_ID="job-7")
    assert [json.loads(line)["run"] for line in lines] == ["job-7", "job-7"]


def test_without_it_they_are_text_for_people():
    lines = stderr()
    assert lines[:3] == ["step 7", "of many", "failed"] and lines[-1] == "ValueError: ä"
