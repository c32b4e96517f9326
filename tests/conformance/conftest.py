"""One endpoint for all real clients: a real model on Ray Serve, behind HAProxy, with API keys and a short queue."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gist_ray.encoder import Encoder
from gist_ray.serving.app import serve_model
from gist_ray.serving_config import ServingConfig
from tests.conformance.served import KEY, MAX_QUEUE_TOKENS, MODEL_ID, PROMPTS, TEXTS, Served


@pytest.fixture(scope="package")
def model(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2 with a prompt."""
    folder = tmp_path_factory.mktemp("models") / "minilm"
    folder.mkdir()
    for file in minilm.iterdir():
        (folder / file.name).symlink_to(file)
    settings = folder / "config_sentence_transformers.json"
    settings.unlink()
    settings.write_text(json.dumps({"prompts": PROMPTS}))
    return folder


@pytest.fixture(scope="package")
def served(model: Path, ray_session: None) -> Iterator[Served]:
    config = ServingConfig(port=0, batch_tokens=1024, max_queue_tokens=MAX_QUEUE_TOKENS)
    encoder = Encoder.load(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIST_RAY_API_KEYS", f"another, {KEY}")
        patch.setenv("NO_PROXY", "*")  # no client is told anything else about proxies
        with serve_model(model, config, model_id=MODEL_ID) as endpoint:
            yield Served(endpoint.url, encoder, encoder.encode(TEXTS))
