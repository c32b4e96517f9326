"""Section: a part of every tree of settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of a tree: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")
