"""Embed three texts with the official OpenAI client and compare them.

Run as `BASE_URL=http://127.0.0.1:8000 API_KEY=... python serve/clients/openai_client.py`.
"""

import os

import numpy as np
from openai import OpenAI

TEXTS = [
    "How do I bake sourdough bread?",
    "Mix flour, water and a ripe starter, and let the dough rise overnight.",
    "The committee meets on the first Tuesday of each month.",
]


def main() -> None:
    """Print the similarities of the first text to the others."""
    client = OpenAI(
        base_url=os.environ.get("BASE_URL", "http://127.0.0.1:8000") + "/v1",
        api_key=os.environ.get("API_KEY", "none"),
    )
    model = os.environ.get("MODEL") or client.models.list().data[0].id
    answer = client.embeddings.create(model=model, input=TEXTS)
    vectors = np.array([item.embedding for item in answer.data])
    for text, similarity in zip(TEXTS[1:], vectors[1:] @ vectors[0], strict=True):
        print(f"{similarity:.3f}  {text}")


if __name__ == "__main__":
    main()
