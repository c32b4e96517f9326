"""Outcomes: how a request to the scheduler can end, well or not."""

from __future__ import annotations

from dataclasses import dataclass

from gist_ray.serving.engine import Vectors


class Overloaded(Exception):
    """The queue is full for now. Nothing of the request was queued."""

    def __init__(self, queued_tokens: int, limit: int, retry_after_s: int) -> None:
        super().__init__(f"{queued_tokens} tokens wait, the limit is {limit}; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class RequestTooLarge(Exception):
    """More tokens in one request than the queue may ever hold."""


class TextTooLong(Exception):
    """A text is over `max_tokens` and may not be cut."""

    def __init__(self, index: int, tokens: int, limit: int) -> None:
        super().__init__(
            f"text {index} has {tokens} tokens and the model reads {limit}; "
            "shorten it, or set `truncate` to true to have it cut"
        )
        self.index = index


class ForwardFailed(Exception):
    """The engine failed on a batch that held a text of this request."""


class Closed(Exception):
    """The scheduler is not running, or no model is loaded."""


class UnknownModel(Exception):
    """No model of that name is served here."""


@dataclass(frozen=True)
class Embeddings:
    """The answer to one request.

    Attributes:
        vectors: float32 `[n, dim]`, unit norm, in the order of the texts.
        num_tokens: tokens the model read, special tokens included; equal texts count each time.
        tokenize_s: seconds until its token ids were there.
        queue_s: seconds that the text which waited longest was queued.
        forward_s: seconds from then until all vectors were there.
    """

    vectors: Vectors
    num_tokens: int
    tokenize_s: float = 0.0
    queue_s: float = 0.0
    forward_s: float = 0.0
