"""Endpoint: a served model where MTEB expects one, over the OpenAI route; ours, or anybody's."""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urldefrag

import numpy as np
import numpy.typing as npt

from gist_ray.errors import InputError
from gist_ray.evaluation.cost import Cost
from gist_ray.evaluation.encoder_actor import ModelFacts, distinct, nearest
from gist_ray.manifest import digest_of

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]

KEY_VARIABLES = ("GIST_RAY_API_KEY", "OPENAI_API_KEY")
"""Environment variables that may hold the key, the first one set."""
_TEXTS_PER_REQUEST = 32
_REQUESTS_AT_ONCE = 8
_PART_TEXTS = 8192
"""Documents whose vectors are in memory at a time, in a search."""
_TRIES, _TIMEOUT_S = 8, 120.0
_BUSY = (429, 503)
_PROBES = ["A probe of which model this is.", "numbers 0123456789 and punctuation?!"]


@dataclass(frozen=True)
class EndpointPool:
    """Used as an `EncoderPool`; texts travel to the server, with a few requests at once from each caller."""

    url: str
    model: str
    facts: ModelFacts
    """Prompts are known by name only: a prompt here is its name, and the server puts the text before."""
    revision: str
    """Of the vectors of some probe texts: a server does not say what it serves."""
    key: str | None = field(repr=False)
    actors: tuple[None, ...] = (None, None)
    """As many units as with two actors, and more, are at work at once."""
    spent: Cost = field(default_factory=Cost, compare=False)
    """For this process. Seconds are those of the requests, each as long as it took."""

    def encode(self, texts: Sequence[str], prompt: str = "") -> Vectors:
        """Vectors of texts, `[n, dim]` float32 of unit norm, in order. Equal texts are sent once.

        Raises:
            RuntimeError: the server refuses, or stays busy or away.
        """
        unique, places = distinct(texts)
        order = sorted(range(len(unique)), key=lambda i: -len(unique[i]))
        parts = [order[i : i + _TEXTS_PER_REQUEST] for i in range(0, len(order), _TEXTS_PER_REQUEST)]
        vectors = np.empty((len(unique), self.facts.dim), dtype=np.float32)
        with _client(self.url, self.key) as client, ThreadPoolExecutor(_REQUESTS_AT_ONCE) as threads:
            answers = threads.map(lambda part: _timed(client, self.model, [unique[i] for i in part], prompt), parts)
            for part, (answer, seconds) in zip(parts, answers, strict=True):
                vectors[part] = answer
                self.spent.add(Cost(encode_s=seconds))
        self.spent.add(Cost(texts=len(texts), distinct=len(unique)))
        return vectors[places]

    def nearest(self, queries: Vectors, texts: Sequence[str], prompt: str, most: int) -> Iterator[tuple[Ids, Vectors]]:
        """As `EncoderPool.nearest`; the vectors come here, a part of the texts at a time."""
        for start in range(0, len(texts), _PART_TEXTS):
            places, scores = nearest(queries, self.encode(texts[start : start + _PART_TEXTS], prompt), most)
            yield start + places, scores


def endpoint_pool(address: str) -> EndpointPool:
    """Connect to a server, `http://host:port` or `http://host:port#model` where it serves several.

    Raises:
        InputError: nobody answers there, or not as an embedding server; or it wants a key.
    """
    import httpx

    url, model = urldefrag(address)
    url = url.rstrip("/").removesuffix("/v1")
    key = next((value for name in KEY_VARIABLES if (value := os.environ.get(name))), None)
    try:
        with _client(url, key) as client:
            listed = client.get("/v1/models")
            if listed.status_code == 401:
                raise InputError(f"{url} wants an API key; set {KEY_VARIABLES[0]}")
            names = [item["id"] for item in listed.raise_for_status().json()["data"]]
            if model and model not in names:
                raise InputError(f"{url} does not serve {model}; it serves {', '.join(names)}")
            model = model or names[0]
            info = _info(client)
            prompts = {name: name for name in info.get("prompts", [])}
            probes = embedded(client, model, _PROBES, "")
    except (httpx.HTTPError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise InputError(f"{url} is no embedding server that can be used: {error}") from error
    revision = digest_of([model, np.round(probes, 3).tolist()])[:40]
    facts = ModelFacts(probes.shape[1], int(info.get("max_input_length", 0)) or 512, prompts)
    return EndpointPool(url, model, facts, revision, key)


def embedded(client: Any, model: str, texts: list[str], prompt_name: str) -> Vectors:
    """Vectors of some texts, `[n, dim]`, at unit length; waits where the server says so.

    Raises:
        RuntimeError: the server refuses, or stays busy or away.
    """
    import httpx

    body = {"model": model, "input": texts, "encoding_format": "base64"}
    body |= {"prompt_name": prompt_name} if prompt_name else {}
    last = "no answer"
    for attempt in range(_TRIES):
        try:
            answer = client.post("/v1/embeddings", json=body)
        except httpx.TransportError as error:
            last = str(error) or type(error).__name__
        else:
            if answer.status_code == 200:
                return _vectors(answer.json()["data"])
            last = f"{answer.status_code}: {answer.text[:200]}"
            if answer.status_code not in _BUSY:
                break
            if seconds := answer.headers.get("retry-after"):
                time.sleep(min(30.0, float(seconds)))
                continue
        time.sleep(min(10.0, 0.25 * 2**attempt))
    raise RuntimeError(f"the endpoint does not embed {len(texts)} texts: {last}")


def _timed(client: Any, model: str, texts: list[str], prompt_name: str) -> tuple[Vectors, float]:
    """As `embedded`, with the seconds that it took."""
    started = time.perf_counter()
    return embedded(client, model, texts, prompt_name), time.perf_counter() - started


def _vectors(data: list[dict[str, Any]]) -> Vectors:
    rows = [item["embedding"] for item in sorted(data, key=lambda item: item["index"])]
    vectors = np.array([np.frombuffer(base64.b64decode(row), "<f4") if isinstance(row, str) else row for row in rows])
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vectors = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return unit


def _info(client: Any) -> dict[str, Any]:
    """What a server of the text-embeddings-inference kind says of its model, or nothing."""
    answer = client.get("/info")
    found: Any = answer.json() if answer.status_code == 200 else {}
    return found if isinstance(found, dict) else {}


def _client(url: str, key: str | None) -> Any:
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=url, timeout=_TIMEOUT_S, trust_env=False, headers=headers)
