"""Derives a separate seed for each use of hashes and random numbers from the user's one seed."""

from __future__ import annotations

import hashlib


def hash_seed(seed: int, purpose: str, num_bytes: int = 8) -> int:
    """A number of so many bytes that no other purpose gets from the same seed."""
    digest = hashlib.blake2b(f"megatron_hammer {purpose} {seed}".encode(), digest_size=num_bytes).digest()
    return int.from_bytes(digest, "little")
