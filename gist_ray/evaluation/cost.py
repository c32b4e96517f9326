"""Cost: what it took to score a task, in texts and seconds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass
class Cost:
    """What was done; adds up."""

    texts: int = 0
    """That vectors were asked for."""
    distinct: int = 0
    """Texts that encoders were given. Equal texts of one call are given once, or once a chunk in a search."""
    cached: int = 0
    """Of the distinct ones, whose vectors were kept from an earlier call or run. 0 of a server, which does not say."""
    encode_s: float = 0.0
    """Seconds of all encoders together, as if they had worked one after another; search at the encoders included."""
    score_s: float = 0.0
    """CPU seconds of the task's own process: data, classifiers, clusters, rankings, metrics. Not what it waits."""

    def add(self, more: Cost) -> None:
        """Count what else was done."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(more, field.name))

    def since(self, earlier: Cost) -> Cost:
        """What was done after there was `earlier`."""
        return Cost(**{field.name: getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)})

    def copy(self) -> Cost:
        """As it is now, to be given to `since` later."""
        return replace(self)

    def to_json(self) -> dict[str, Any]:
        """By name; seconds are rounded to milliseconds."""
        return {name: round(value, 3) for name, value in asdict(self).items()}
