"""The stock app: our engine in a deployment with FastAPI, pydantic and `@serve.batch`, behind Serve's default proxy.

python tests/benchmarks/serving_stock.py MODEL BACKEND     prints its URL, serves until SIGTERM

Annotations are objects here, not strings: FastAPI could not find `Request` from inside a replica.
"""

import os
import signal
import sys
import tempfile
import threading
from typing import Any

os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = "benchmark" * 8

import ray
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve

from gist_ray.cluster import free_port
from gist_ray.serving.engine import load_engine

app = FastAPI()


class Request(BaseModel):
    input: list[str]
    model: str | None = None
    encoding_format: str | None = None


@serve.deployment(max_ongoing_requests=512, ray_actor_options={"num_cpus": 1})
@serve.ingress(app)
class Embedder:
    def __init__(self, model: str, backend: Any) -> None:
        self._engine = load_engine(model, backend=backend, threads=1)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002)
    async def embed(self, texts: list[str]) -> list[list[float]]:
        engine = self._engine
        vectors: list[list[float]] = engine.finish(engine.forward(engine.tokenize(texts))).tolist()
        return vectors

    @app.post("/v1/embeddings")
    async def embeddings(self, request: Request) -> dict[str, Any]:
        import asyncio

        vectors = await asyncio.gather(*(self.embed(text) for text in request.input))
        data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
        return {"object": "list", "data": data, "model": "model"}


def main() -> None:
    stop = threading.Event()
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="stock-") as folder:
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
        serve.run(Embedder.bind(sys.argv[1], sys.argv[2]), route_prefix="/")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        print(f"http://127.0.0.1:{port}", flush=True)
        stop.wait()
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
