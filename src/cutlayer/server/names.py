"""Which names may stand for a folder at the server."""

from __future__ import annotations

import re

__all__ = ["is_plain_name"]

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OURS = frozenset(
    {"journal.sqlite", "journal.sqlite-shm", "journal.sqlite-wal", "audit.jsonl", "server.json"}
)
"""The server's own files, which lie beside the tenants' folders."""


def is_plain_name(name: str) -> bool:
    """Say whether a name can stand for a folder: letters, digits, `.`, `_`, `-`, at most 64."""
    return _PLAIN.fullmatch(name) is not None and name not in _OURS
