"""The endpoint as people run it: Ray Serve, a real model, real clients."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from gist_ray.cluster import free_port
from gist_ray.config import ClusterConfig
from gist_ray.encoder import Encoder
from gist_ray.errors import InputError
from gist_ray.serving.app import Endpoint, build_app, serve_model
from gist_ray.serving.grpc_messages import SERVICER_FUNCTION, EmbedRequest, stub
from gist_ray.serving.serve_args import ServeArgs, UserConfig
from gist_ray.serving_config import ServingConfig

SERVE = Path(__file__).parent.parent.parent / "serve"
KEY = "a-key-for-tests"
TEXTS = [f"text {i}: " + "the quick brown fox jumps over the lazy dog " * (i % 9) for i in range(60)]


@pytest.fixture(scope="module")
def endpoint(minilm: Path, ray_session: None) -> Iterator[Endpoint]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIST_RAY_API_KEYS", f"another, {KEY}")
        config = ServingConfig(port=0, grpc_port=free_port(), batch_tokens=512)
        with serve_model(minilm, config, model_id="org/minilm") as running:
            yield running


@pytest.fixture(scope="module")
def client(endpoint: Endpoint) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=endpoint.url, headers=headers, timeout=60, trust_env=False) as running:
        yield running


@pytest.fixture(scope="module")
def encoder(minilm: Path) -> Encoder:
    return Encoder.load(minilm)


def test_openai_client(endpoint, encoder):
    import openai

    client = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=KEY, http_client=httpx.Client(trust_env=False))
    assert [model.id for model in client.models.list().data] == ["org/minilm"]
    answer = client.embeddings.create(model="org/minilm", input=TEXTS)  # base64, the client's own default
    vectors = np.array([item.embedding for item in answer.data])
    np.testing.assert_allclose(vectors, encoder.encode(TEXTS), atol=1e-5)
    assert answer.usage.total_tokens == sum(map(len, encoder.tokenize(TEXTS)))
    short = client.embeddings.create(model="org/minilm", input="a", dimensions=32, encoding_format="float")
    assert abs(np.linalg.norm(short.data[0].embedding) - 1) < 1e-6
    with pytest.raises(openai.NotFoundError, match="org/minilm"):
        client.embeddings.create(model="gpt", input="x")
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length"):
        client.embeddings.create(model="org/minilm", input=[1, 2, 3])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").embeddings.create(model="org/minilm", input="x")
    client.close()


def test_vectors_do_not_depend_on_who_else_asks(client, encoder):
    def ask(text: str) -> Any:
        return client.post("/embed", json={"inputs": text}).raise_for_status().json()[0]

    with ThreadPoolExecutor(16) as pool:
        vectors = np.array(list(pool.map(ask, TEXTS)))
    np.testing.assert_allclose(vectors, encoder.encode(TEXTS), atol=1e-5)
    metrics = client.get("/metrics").text
    assert 'route="/embed",status="200"} 60' in metrics


def test_grpc_client(endpoint, encoder):
    with grpc.insecure_channel(f"127.0.0.1:{endpoint.grpc_port}") as channel:
        embed, key = stub(channel), ("authorization", f"Bearer {KEY}")
        application = ("application", "gist-ray")
        answer = embed(EmbedRequest(texts=TEXTS), metadata=[application, key], timeout=60)
        vectors = np.frombuffer(answer.vectors, "<f4").reshape(-1, answer.dim)
        np.testing.assert_allclose(vectors, encoder.encode(TEXTS), atol=1e-5)
        for request, metadata, code in (
            (EmbedRequest(texts=["a"]), [application], grpc.StatusCode.UNAUTHENTICATED),
            (EmbedRequest(texts=[""]), [application, key], grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                embed(request, metadata=metadata, timeout=60)
            assert caught.value.code() == code


def test_bad_input_over_the_wire(client):
    headers = {"content-type": "application/json"}
    body = b'{"input": "' + b"a" * (9 << 20) + b'"}'
    for content, status in ((b"{", 400), (b'{"input": NaN}', 400), (b'{"input": ""}', 400), (body, 413)):
        answer = client.post("/v1/embeddings", content=content, headers=headers)
        assert answer.status_code == status and answer.json()["error"]["message"]
    assert client.get("/health", headers={"authorization": ""}).status_code == 200
    assert client.get("/v1/models", headers={"authorization": ""}).status_code == 401


def test_one_serve_per_cluster(endpoint, minilm):
    with pytest.raises(InputError, match="already runs on this cluster"):
        with serve_model(minilm, ServingConfig(port=0)):
            pass
    assert httpx.get(f"{endpoint.url}/ready", trust_env=False).status_code == 200


def test_examples(endpoint):
    environment = {**os.environ, "BASE_URL": endpoint.url, "API_KEY": KEY, "no_proxy": "*"}
    clients = SERVE / "clients"
    for command in ([sys.executable, clients / "openai_client.py"], ["bash", clients / "curl.sh"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "0." in done.stdout


def test_bad_models_are_refused_before_ray_starts(tmp_path, minilm):
    (tmp_path / "config.json").write_text("{}")
    for model in (tmp_path / "absent" / "folder", tmp_path):
        with pytest.raises(InputError):
            with serve_model(model, ServingConfig(port=0), ClusterConfig(address="no-such-cluster:1")):
                pass
        with pytest.raises(InputError):
            build_app(ServeArgs(models={"m": str(model)}))


def test_a_port_in_use_is_refused_before_ray_starts(minilm):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = f"port {port} on 127.0.0.1 is in use; choose another with --port"
        with pytest.raises(InputError, match=message):
            with serve_model(minilm, ServingConfig(port=port), ClusterConfig(address="no-such-cluster:1")):
                pass
        with pytest.raises(InputError, match=r"cannot listen on 203\.0\.113\.1"):
            with serve_model(minilm, ServingConfig(host="203.0.113.1"), ClusterConfig(address="none:1")):
                pass


def test_serve_args():
    with pytest.raises(ValidationError, match="threds"):
        ServeArgs.model_validate({"serving": {"threds": 2}})
    for field in ("port", "grpc_port"):
        with pytest.raises(ValidationError, match="http_options"):
            ServeArgs.model_validate({"serving": {field: 9000}})
    for models in ({}, {"": "a"}, {"a": ""}, ["a"]):
        with pytest.raises(ValidationError, match="models"):
            UserConfig.model_validate({"models": models})
    assert UserConfig.model_validate({"models": {"b": "x", "a": "y"}}).models == {"b": "x", "a": "y"}


@pytest.mark.parametrize("name", ["config.yaml", "several-models.yaml", "canary.yaml"])
def test_the_shipped_configs_are_valid(name: str):
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((SERVE / name).read_text())
    schema = ServeDeploySchema.model_validate(config)
    assert schema.http_options.host == "127.0.0.1"
    assert set(config) <= set(ServeDeploySchema.model_fields)
    assert set(schema.grpc_options.grpc_servicer_functions) <= {SERVICER_FUNCTION}
    for application, given in zip(schema.applications, config["applications"], strict=True):
        assert application.import_path == "gist_ray.serving.app:build_app"
        assert set(given) <= set(type(application).model_fields)
        ServeArgs.model_validate(application.args)
        (deployment,) = application.deployments
        assert deployment.name == "embedder"
        assert UserConfig.model_validate(deployment.user_config).models


def test_serve_ends_cleanly_on_a_signal(minilm):
    """A Ray of its own, in a process of its own: what `gist-ray serve` does."""
    port = free_port()
    code = (
        "import sys\n"
        "from gist_ray.config import ClusterConfig\n"
        "from gist_ray.serving_config import ServingConfig\n"
        "from gist_ray.serving.app import serve\n"
        "config, cluster = ServingConfig(port=int(sys.argv[2])), ClusterConfig(data_workers=1)\n"
        "serve(sys.argv[1], config, cluster, lambda endpoint: print(endpoint.url, flush=True))\n"
        "print('ended', flush=True)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", code, minilm, str(port)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    try:
        url = process.stdout.readline().strip()
        assert url == f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/ready", trust_env=False).status_code == 200
        children = descendants(process.pid)
        assert children
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.stdout.read() == "ended\n"
        assert process.wait() == 0
        assert time.monotonic() - started < 30
    finally:
        watchdog.cancel()
        process.kill()
    deadline = time.monotonic() + 10
    while (left := alive(children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def descendants(pid: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]
