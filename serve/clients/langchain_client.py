"""Search texts with LangChain. Needs `pip install langchain-openai`.

Run as `BASE_URL=http://127.0.0.1:8000 API_KEY=... python serve/clients/langchain_client.py`.
"""

import os

from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings
from openai import OpenAI
from pydantic import SecretStr

TEXTS = [
    "The committee meets on the first Tuesday of each month.",
    "Mix flour, water and a ripe starter, and let the dough rise overnight.",
    "The ship ran aground between two seas.",
]


def main() -> None:
    """Print the two texts nearest to a question."""
    base_url = os.environ.get("BASE_URL", "http://127.0.0.1:8000") + "/v1"
    api_key = os.environ.get("API_KEY", "none")
    embeddings = OpenAIEmbeddings(
        base_url=base_url,
        api_key=SecretStr(api_key),
        model=os.environ.get("MODEL") or OpenAI(base_url=base_url, api_key=api_key).models.list().data[0].id,
        check_embedding_ctx_length=False,  # send texts; by default it sends ids of OpenAI's tokenizer
    )
    store = InMemoryVectorStore.from_texts(TEXTS, embeddings)
    for found, similarity in store.similarity_search_with_score("How do I bake sourdough bread?", k=2):
        print(f"{similarity:.3f}  {found.page_content}")


if __name__ == "__main__":
    main()
