"""Cache: vectors of texts that were asked for lately, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from gist_ray.serving.engine import Vectors

_OVERHEAD_BYTES = 250
"""Of an entry beside its key and numbers: two Python objects and a place in the table."""


class VectorCache:
    """The vectors used last, by the bytes of their token ids. Of one model: another model has its own cache.

    What is returned is what was put in, bit for bit, and may not be written to.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._vectors: OrderedDict[bytes, Vectors] = OrderedDict()

    def __len__(self) -> int:
        return len(self._vectors)

    def get(self, key: bytes) -> Vectors | None:
        """The vector `[dim]` of a text, or None; it is now the one used last."""
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
        return vector

    def put(self, key: bytes, vector: Vectors) -> None:
        """Keep a vector `[dim]`; those used longest ago make room. One that is larger than the cache is not kept."""
        size = _entry_bytes(key, vector)
        if size > self.max_bytes:
            return
        if key in self._vectors:
            self.bytes -= _entry_bytes(key, self._vectors.pop(key))
        own = np.array(vector)  # not a view, which would keep its whole batch
        own.flags.writeable = False
        self._vectors[key] = own
        self.bytes += size
        while self.bytes > self.max_bytes:
            oldest, dropped = self._vectors.popitem(last=False)
            self.bytes -= _entry_bytes(oldest, dropped)


def _entry_bytes(key: bytes, vector: Vectors) -> int:
    return len(key) + vector.nbytes + _OVERHEAD_BYTES
