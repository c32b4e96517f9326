"""Guide vectors on disk, kept for every later run: the guide is frozen, so a text's vector never changes.

A store belongs to one guide with its settings; segments are added whole and never changed. A second student, a grown
data set or a mining run on the same texts finds what an earlier run computed.
"""

from __future__ import annotations

import uuid
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gist_ray.data.texts import KEY_BYTES, Keys, guide_matrix, key_column, keys_to_numpy, read_arrow, write_arrow
from gist_ray.errors import InputError
from gist_ray.manifest import digest_of, write_json

_LEAD = 8  # bytes of a key that a segment's name tells of its range


class GuideVectors:
    """The vectors of one guide. What is found is as it was when this object was made, and what it added itself."""

    def __init__(self, root: Path, guide: dict[str, Any]) -> None:
        """`guide` is the guide's fingerprint, with `dtype`: another model or setting is another store."""
        self.folder = root / digest_of(guide)[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        about = self.folder / "guide.txt"  # JSON, by a suffix that no source has: the folder may lie in a source
        if not about.is_file():
            write_json(about, guide)
        self._segments = sorted((*_key_range(file), file) for file in self.folder.glob("*.arrow"))
        self._lows = [low for low, _, _ in self._segments]

    def find(self, keys: Keys) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float16] | None]:
        """Which of some ascending keys are here `[n]`, and the vectors of those `[found, guide_dim]`.

        None for the vectors if none is here. Costs one look at each segment whose range meets that of `keys`.

        Raises:
            InputError: a segment is damaged.
        """
        found = np.zeros(len(keys), dtype=bool)
        vectors: npt.NDArray[np.float16] | None = None
        for file in self._meeting(keys):
            try:
                columns = read_arrow(file)
                here, matrix = keys_to_numpy(columns["key"]), guide_matrix(columns)
            except (pa.ArrowException, OSError, KeyError) as error:
                raise InputError(f"{file} is damaged ({error}); remove it: its vectors are computed again") from error
            place = np.minimum(np.searchsorted(here, keys), len(here) - 1)
            new = here[place] == keys
            if new.any():
                if vectors is None:
                    vectors = np.empty((len(keys), matrix.shape[1]), dtype=np.float16)
                vectors[new] = matrix[place[new]]
                found |= new
        return found, None if vectors is None else vectors[found]

    def add(self, keys: Keys, vectors: npt.NDArray[np.float16]) -> None:
        """Keep the vectors `[n, guide_dim]` of ascending keys `[n]`, whole or not at all."""
        content = keys.tobytes()
        low, high = content[:_LEAD].hex(), content[-KEY_BYTES:][:_LEAD].hex()
        # A name of its own: two runs, maybe on two machines, may add the same texts at once.
        file = self.folder / f"{low}-{high}-{uuid.uuid4().hex}.arrow"
        guide = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        write_arrow(file, {"key": key_column(keys), "guide": guide})

    def _meeting(self, keys: Keys) -> list[Path]:
        if not len(keys):
            return []
        content = keys.tobytes()
        low, high = content[:_LEAD].hex(), content[-KEY_BYTES:][:_LEAD].hex()
        return [file for _, end, file in self._segments[: bisect_right(self._lows, high)] if end >= low]


def _key_range(segment: Path) -> tuple[str, str]:
    """Leading bytes of the first and of the last key of a segment, as its name tells them."""
    low, high, _ = segment.name.split("-")
    return low, high
