"""LangChain's OpenAIEmbeddings, and the example of it in serve/clients."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance.served import KEY, MODEL_ID, TEXTS, Served

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parent.parent.parent / "serve" / "clients" / "langchain_client.py"


def test_texts(served: Served):
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(
        model=MODEL_ID, base_url=f"{served.url}/v1", api_key=KEY, check_embedding_ctx_length=False
    )
    served.agrees(embeddings.embed_documents(TEXTS))
    served.agrees([embeddings.embed_query(TEXTS[0])], TEXTS[:1])
    served.agrees(asyncio.run(embeddings.aembed_documents(TEXTS)))


def test_token_ids_are_refused_with_the_setting_to_change(served: Served, monkeypatch: pytest.MonkeyPatch):
    """By default it sends ids of OpenAI's tokenizer, which other models read as other words."""
    import tiktoken
    from langchain_openai import OpenAIEmbeddings
    from openai import BadRequestError

    # The real vocabulary would be downloaded; one of single bytes sends ids as well.
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    embeddings = OpenAIEmbeddings(model=MODEL_ID, base_url=f"{served.url}/v1", api_key=KEY)
    with pytest.raises(BadRequestError, match="check_embedding_ctx_length=False") as refused:
        embeddings.embed_documents(TEXTS)
    assert refused.value.code == "token_ids"


def test_the_example(served: Served):
    environment = {**os.environ, "BASE_URL": served.url, "API_KEY": KEY}
    done = subprocess.run([sys.executable, EXAMPLE], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    best, other = done.stdout.splitlines()
    assert best.endswith("let the dough rise overnight.") and float(best.split()[0]) > float(other.split()[0])
