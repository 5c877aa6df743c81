"""A file of JSON lines that only grows, each chained to all before it and synced to the disk."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cutlayer.errors import StorageError

__all__ = ["append", "chained", "locked", "sync_folder", "taken_up", "whole_lines"]


def append(file: int, chain: str, lines: Sequence[dict[str, Any]]) -> str:
    """Write lines, sync them, and return the chain after them.

    Raises:
        OSError: If they may not all be on the disk. They were taken back; where even that fails,
            opening the file again counts them, which is safe.
    """
    texts = []
    for line in lines:
        chain = chained(chain, line)
        texts.append(json.dumps({**line, "chain": chain}, sort_keys=True) + "\n")
    size = os.fstat(file).st_size
    try:
        view = memoryview("".join(texts).encode())
        while view:
            view = view[os.write(file, view) :]
        os.fsync(file)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file, size)
        raise
    return chain


def taken_up(file: int) -> list[dict[str, Any]]:
    """Return the lines that are there; a last one that a crash tore is cut off."""
    size = os.fstat(file).st_size
    whole, lines = whole_lines(os.pread(file, size, 0))
    if whole < size:
        os.ftruncate(file, whole)
        os.fsync(file)
    return lines


def chained(chain: str, line: dict[str, Any]) -> str:
    """Return the chain after a line."""
    return hashlib.sha256((chain + json.dumps(line, sort_keys=True)).encode()).hexdigest()


def whole_lines(body: bytes) -> tuple[int, list[dict[str, Any]]]:
    """Return how many bytes are whole lines, and the lines; only the last one may be torn."""
    texts = body.split(b"\n")[:-1]
    lines: list[dict[str, Any]] = []
    whole = 0
    for number, text in enumerate(texts):
        try:
            line = json.loads(text)
        except ValueError:
            if number + 1 < len(texts):
                line = {}  # refused when it is read: this was no crash
            else:
                break
        lines.append(line if isinstance(line, dict) else {})
        whole += len(text) + 1
    return whole, lines


def locked(path: Path) -> int:
    """Return the file, opened for this process alone.

    Raises:
        StorageError: If it cannot be opened, or another process has it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(
            f"the ledger '{path}' cannot be opened ({error.strerror}): nothing is sent without one"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise StorageError(
            f"the ledger '{path}' is in use by another process: two runs on the same data take "
            "turns"
        ) from error
    return file


def sync_folder(folder: Path) -> None:
    """Have the disk know the names in a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
