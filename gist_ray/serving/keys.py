"""API keys: several, known by their hashes, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence


def admits(authorization: bytes, api_key_sha256: Sequence[str]) -> bool:
    """Whether `Bearer KEY` has one of the accepted keys, given as hex digests. Without any, all are admitted."""
    if not api_key_sha256:
        return True
    scheme, _, key = authorization.partition(b" ")
    if scheme.lower() != b"bearer":
        return False
    digest = hashlib.sha256(key.strip()).hexdigest()
    # Every digest is compared, each in constant time: the time taken says nothing about the keys.
    return any([hmac.compare_digest(digest, known) for known in api_key_sha256])
