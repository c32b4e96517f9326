"""RayEncoder: the encoder pool as MTEB sees a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from mteb.models.abs_encoder import get_prompt_name
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.similarity_functions import cos_sim, pairwise_cos_sim

from gist_ray.evaluation.pool import EncoderPool


class RayEncoder:
    """Conforms to mteb's `EncoderProtocol`; encoding happens on the actors of an `EncoderPool`."""

    def __init__(self, pool: EncoderPool, name: str, revision: str) -> None:
        """Wrap a pool.

        Args:
            pool: where texts are encoded.
            name: `org/model`, the model's name in the results.
            revision: content hash of the model. MTEB finds earlier results by name and revision alone, so two
                checkpoints with one revision would share scores.
        """
        self._pool = pool
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": revision,
                # The enum: `create_empty` does not validate, and a string fails every similarity task.
                "similarity_fn_name": ScoringFunction.COSINE,
                "embed_dim": pool.dim,
                "max_tokens": pool.max_tokens,
                "modalities": ["text"],
            }
        )

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> npt.NDArray[np.float32]:
        """Vectors of all texts of a data loader, `[n, dim]` float32 of unit norm.

        The split, the subset and mteb's encode arguments (batch size, progress bar) do not change a vector.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        return self._pool.encode(texts, self.prompt(task_metadata, prompt_type))

    def prompt(self, task_metadata: Any, prompt_type: Any) -> str:
        """The folder's prompt for a task: by task name, task type, then query or document; else none."""
        prompts = self._pool.prompts
        name = get_prompt_name(prompts, task_metadata, prompt_type)
        return prompts[name] if name else ""

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of every pair, `[n, dim]` and `[m, dim]` to `[n, m]`."""
        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosine of corresponding rows, `[n, dim]` twice to `[n]`."""
        return pairwise_cos_sim(embeddings1, embeddings2)
