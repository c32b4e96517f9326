"""Page: a person types texts and sees similarities and timings. Needs nothing from the internet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files
from string import Template

CONTENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page loads nothing and talks to this server alone."""


def page(model_id: str, prompts: Sequence[str]) -> str:
    """The page, for one model."""
    options = "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in prompts)
    return _template().substitute(model=escape(model_id), prompts=options)


@cache
def _template() -> Template:
    return Template(files("gist_ray.serving").joinpath("page.html").read_text(encoding="utf-8"))
