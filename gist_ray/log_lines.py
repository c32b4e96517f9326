"""Log lines of a verb: text for people, or one JSON object a line for what collects logs."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import datetime, timezone

FORMAT_VARIABLE = "GIST_RAY_LOG_FORMAT"
"""Environment variable: `json`, or `text` (the default)."""
RUN_VARIABLE = "GIST_RAY_RUN_ID"
"""Environment variable with the id of this run in JSON lines; unset: the name of its recipe, where it has one."""


def start_lines(verb: str, *, verbose: bool) -> None:
    """Send this process's log to stderr: gist-ray's from INFO on (`verbose`: DEBUG), others' from WARNING on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if os.environ.get(FORMAT_VARIABLE) == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonLines(verb, os.environ.get(RUN_VARIABLE)))
    logging.getLogger("gist_ray").setLevel(logging.DEBUG if verbose else logging.INFO)


def name_run(run: str) -> None:
    """Put the run's name into the lines from now on, unless the environment has named it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, JsonLines) and handler.formatter.run is None:
            handler.formatter.run = run


class JsonLines(logging.Formatter):
    """`{"time", "level", "logger", "verb", "run", "message"}`, and `error` with the traceback where there is one."""

    def __init__(self, verb: str, run: str | None) -> None:
        super().__init__()
        self.verb, self.run = verb, run

    def format(self, record: logging.LogRecord) -> str:
        """A line without line breaks."""
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "verb": self.verb,
            "run": self.run,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line)
