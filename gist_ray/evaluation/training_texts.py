"""TrainingTexts: which of a task's texts a model was trained on, to the letter. What names do not tell, texts do."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from gist_ray.config import Recipe
from gist_ray.data.shards import KIND
from gist_ray.data.texts import KEY_BYTES, Keys, TextTable, text_key
from gist_ray.int8 import PROVENANCE
from gist_ray.manifest import digest_of, read_manifest

_log = logging.getLogger(__name__)

Seen = dict[str, tuple[int, int]]
"""Of each part of a task's data (a split, or its documents): texts that were embedded, and those trained on."""


@dataclass(frozen=True)
class TrainingTexts:
    """Hashes of the texts of a model's triplets: 16 bytes for each distinct one."""

    keys: Keys
    """`[texts]` S16, ascending."""

    @classmethod
    def of(cls, model: str | Path) -> TrainingTexts | None:
        """Those of a folder that gist-ray exported; None where they are not known.

        They are read from the shards that the model was trained on, while those are where the recipe put them: a list
        of hashes inside the model would tell everybody who has it which texts it was made from.
        """
        try:
            provenance = json.loads((Path(model).expanduser() / PROVENANCE).read_text(encoding="utf-8"))
            folder = Recipe.model_validate(provenance["recipe"]).shards_dir()
            made_from = provenance["fingerprint"]["shards"]
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None
        manifest = read_manifest(folder)
        if manifest is None or manifest.get("kind") != KIND or digest_of(manifest["fingerprint"]) != made_from:
            _log.info(
                "evaluate: the texts of training are no longer in %s; contamination is told by names only", folder
            )
            return None
        return cls(TextTable(folder / "texts", in_place=False).keys())

    def known(self, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Whether each of `texts` is one of them, `[len(texts)]`."""
        if not len(self.keys):
            return np.zeros(len(texts), np.bool_)
        asked = np.array([text_key(text) for text in texts], dtype=f"S{KEY_BYTES}")
        places = np.minimum(np.searchsorted(self.keys, asked), len(self.keys) - 1)
        found: npt.NDArray[np.bool_] = self.keys[places] == asked
        return found

    def count(self, seen: Seen, part: str, texts: Sequence[str]) -> None:
        """Add a part's texts to what was seen; equal ones of one call count once."""
        distinct = list(dict.fromkeys(texts))
        asked, trained = seen.get(part, (0, 0))
        seen[part] = asked + len(distinct), trained + int(self.known(distinct).sum())
