"""LiteLLM, with the endpoint as an OpenAI-compatible one."""

from __future__ import annotations

import asyncio
from types import ModuleType

import pytest

from tests.conformance.served import KEY, MODEL_ID, TEXTS, Served

pytestmark = pytest.mark.slow


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the internet for prices when imported
    import litellm

    return litellm


def test_embedding(served: Served, litellm: ModuleType):
    where = {"model": f"openai/{MODEL_ID}", "api_base": f"{served.url}/v1"}
    answer = litellm.embedding(**where, api_key=KEY, input=TEXTS)
    served.agrees([item["embedding"] for item in answer.data])
    assert answer.usage.prompt_tokens == sum(map(len, served.encoder.tokenize(TEXTS)))
    also = asyncio.run(litellm.aembedding(**where, api_key=KEY, input=TEXTS))
    served.agrees([item["embedding"] for item in also.data])
    with pytest.raises(litellm.AuthenticationError):
        litellm.embedding(**where, api_key="wrong", input=TEXTS)
