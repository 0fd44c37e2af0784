"""Hashes and seeds that are the same in every process and on every machine."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of `value`, which holds plain types, as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stable_seed(*parts: int | str) -> int:
    """Return a 31-bit seed that depends on `parts` alone."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
