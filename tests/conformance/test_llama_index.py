"""LlamaIndex, with its OpenAI-like class and with that for text-embeddings-inference."""

from __future__ import annotations

import asyncio

import pytest

from tests.conformance.served import KEY, MODEL_ID, TEXTS, Served

pytestmark = pytest.mark.slow


def test_openai_like(served: Served):
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    embedding = OpenAILikeEmbedding(model_name=MODEL_ID, api_base=f"{served.url}/v1", api_key=KEY, embed_batch_size=16)
    served.agrees(embedding.get_text_embedding_batch(TEXTS))
    served.agrees([embedding.get_query_embedding(TEXTS[0])], TEXTS[:1])
    served.agrees(asyncio.run(embedding.aget_text_embedding_batch(TEXTS)))


def test_text_embeddings_inference(served: Served):
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    embedding = TextEmbeddingsInference(model_name=MODEL_ID, base_url=served.url, auth_token=KEY)
    served.agrees(embedding.get_text_embedding_batch(TEXTS))
    served.agrees([embedding.get_query_embedding(TEXTS[0])], TEXTS[:1])
    served.agrees(asyncio.run(embedding.aget_text_embedding_batch(TEXTS)))
