"""huggingface_hub's InferenceClient, and LangChain's class on top of it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tests.conformance.served import KEY, MODEL_ID, PROMPTS, TEXTS

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests keep huggingface_hub off the network; an endpoint on this machine is asked all the same."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("route", ["", "/", "/embed"])
def test_feature_extraction(served, route):
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=served.url + route, token=KEY)
    served.agrees(client.feature_extraction(TEXTS))
    served.agrees(client.feature_extraction(TEXTS[0]), TEXTS[:1])


def test_arguments_of_feature_extraction(served):
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError

    client = InferenceClient(model=served.url, token=KEY)
    served.agrees(client.feature_extraction(TEXTS, prompt_name="query"), TEXTS, prompt=PROMPTS["query"])
    served.agrees(client.feature_extraction(TEXTS, normalize=True, truncate=True, truncation_direction="right"))
    cut = client.feature_extraction(TEXTS, dimensions=32, normalize=False)
    np.testing.assert_allclose(cut, served.vectors[:, :32], atol=1e-5)
    with pytest.raises(HfHubHTTPError, match="422"):  # a text of TEXTS is too long
        client.feature_extraction(TEXTS, truncate=False)
    with pytest.raises(HfHubHTTPError, match="422"):
        client.feature_extraction(TEXTS, prompt_name="no such prompt")
    with pytest.raises(HfHubHTTPError, match="401"):
        InferenceClient(model=served.url, token="wrong").feature_extraction("x")


def test_sentence_similarity(served):
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=f"{served.url}/similarity", token=KEY)
    found = client.sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:])
    np.testing.assert_allclose(found, served.vectors[1:] @ served.vectors[0], atol=1e-5)


def test_langchain_huggingface(served):
    from huggingface_hub import AsyncInferenceClient, InferenceClient

    reason = "langchain-huggingface is not in the dev extra: it holds huggingface-hub below 2"
    langchain_huggingface = pytest.importorskip("langchain_huggingface", reason=reason)
    embeddings = langchain_huggingface.HuggingFaceEndpointEmbeddings(model=MODEL_ID)
    # Its `model` may be no URL any more; the clients it made of it are fields that can be set.
    embeddings.client = InferenceClient(model=served.url, token=KEY)
    embeddings.async_client = AsyncInferenceClient(model=served.url, token=KEY)
    served.agrees(embeddings.embed_documents(TEXTS))
    served.agrees([embeddings.embed_query(TEXTS[0])], TEXTS[:1])
    served.agrees(asyncio.run(embeddings.aembed_documents(TEXTS)))


def test_asynchronous(served):
    from huggingface_hub import AsyncInferenceClient

    client = AsyncInferenceClient(model=f"{served.url}/embed", token=KEY)
    served.agrees(asyncio.run(client.feature_extraction(TEXTS)))
