"""The audit log: who opened, saved, exported and was refused what. Sizes, never contents.

One JSON object a line. Each line has the hash of the one before it, and its own: SHA-256 over that
hash and the line without it, keys sorted. So nothing in the middle can be changed, taken out or
moved without the chain breaking; that lines at the end were cut off shows only against a head that
was noted elsewhere. The chain has no key: who can write the file can write all of it anew, and only
a head noted elsewhere gives that away too.

The server and `cutlayer tenants` append to the same file, each event under a lock on it and synced.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cutlayer.errors import ConfigError, StorageError, Tampered

__all__ = ["AUDIT_LOG", "AuditLog", "Head", "verify"]

AUDIT_LOG = "audit.jsonl"
"""Its name in the server's folder."""

_BEGINNING = "0" * 64
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Head:
    """Where a log ends."""

    lines: int = 0
    hash: str = _BEGINNING


class AuditLog:
    """A log that is being written."""

    def __init__(self, path: Path) -> None:
        """Open a log, or begin one.

        Raises:
            StorageError: If the file cannot be written.
            Tampered: If its last line does not hold; nothing is appended to such a log.
        """
        self.path = path
        self._lock = threading.Lock()
        self._head = Head()
        self._size_bytes = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = _opened(path)
        except OSError as error:
            raise _unwritable(path, error) from error
        with self._alone():
            pass

    @property
    def head(self) -> Head:
        """How many lines there are, and the last one's hash: what to note elsewhere."""
        return self._head

    def write(self, event: str, **facts: str | int | float) -> None:
        """Append an event; it is on the disk when this returns.

        Raises:
            StorageError: If it cannot be written; the log is then as it was.
        """
        with self._lock, self._alone():
            self._append(event, facts)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the file against other processes, caught up with what they wrote."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            while not _is_at(self._file, self.path):
                self._begin_anew()
            self._catch_up()
        except OSError as error:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            if isinstance(error, StorageError):
                raise
            raise _unwritable(self.path, error) from error
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _begin_anew(self) -> None:
        """Go on in a new file, after somebody moved the old one away; the new one names its end."""
        file, ended = _opened(self.path), self._head
        self._file.close()
        self._file, self._head, self._size_bytes = file, Head(), 0
        fcntl.flock(file, fcntl.LOCK_EX)
        self._catch_up()
        if not self._head.lines and ended.lines:
            self._append("continues", {"after_lines": ended.lines, "after_hash": ended.hash})

    def _append(self, event: str, facts: dict[str, str | int | float]) -> None:
        line: dict[str, Any] = {
            "n": self._head.lines + 1,
            "time": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
            "event": event,
            **facts,
            "previous": self._head.hash,
        }
        line["hash"] = _hash_of(line)
        written = (_canonical(line) + "\n").encode()
        try:
            self._file.seek(self._size_bytes)
            if self._file.write(written) != len(written):
                raise OSError("no space left")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._size_bytes)
            raise _unwritable(self.path, error) from error
        self._head = Head(line["n"], line["hash"])
        self._size_bytes += len(written)

    def _catch_up(self) -> None:
        """Find the end as others left it; take away a line that a crash tore, and note that."""
        size_bytes = os.fstat(self._file.fileno()).st_size
        if size_bytes == self._size_bytes:
            return
        self._file.seek(max(0, size_bytes - _TAIL_BYTES))
        tail = self._file.read()
        whole, newline, torn = tail.rpartition(b"\n")
        if newline or size_bytes > len(tail):
            self._head = _head_of(whole.rpartition(b"\n")[2], self.path)
        else:
            self._head = Head()
        self._size_bytes = size_bytes - len(torn)
        if torn:
            # Nobody was told that this event is written: `write` had not returned.
            self._file.truncate(self._size_bytes)
            self._append("repaired", {"torn_bytes": len(torn)})


def _opened(path: Path) -> BinaryIO:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    return os.fdopen(handle, "r+b", buffering=0)


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def verify(path: Path, head: str | None = None) -> Head:
    """Check a whole log and return where it ends.

    Args:
        path: The log.
        head: A hash that was noted earlier: the log must still have a line with it.

    Raises:
        ConfigError: If there is no such file.
        Tampered: Naming the first line that was changed, moved, taken out or torn.
    """
    found, known = Head(), head in (None, _BEGINNING)
    for number, line in enumerate(_lines(path), 1):
        found = _next(found, number, line, path)
        known = known or found.hash == head
    if not known:
        raise Tampered(
            f"{path} ends at line {found.lines} and has no line with the hash {head}: lines were "
            "cut off at its end, or all of it was written anew"
        )
    return found


def _next(before: Head, number: int, line: dict[str, Any], path: Path) -> Head:
    if line["n"] != before.lines + 1:
        what = "were taken out before it" if line["n"] > before.lines + 1 else "were moved"
        raise Tampered(
            f"{path} line {number} has the number {line['n']} where {before.lines + 1} is due: "
            f"lines {what}"
        )
    if line["previous"] != before.hash:
        raise Tampered(
            f"{path} line {number} does not continue line {number - 1}: one of them was changed, "
            "or others stood between them"
        )
    if line["hash"] != _hash_of(line):
        raise Tampered(f"{path} line {number} was changed: its hash does not fit what it says")
    return Head(line["n"], line["hash"])


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    raise Tampered(
                        f"{path} line {number} is torn: a crash or a hand cut it; the server "
                        "repairs what a crash tore when it starts, and notes it"
                    )
                line = _parsed(raw)
                if line is None:
                    raise Tampered(f"{path} line {number} is no event: it was changed")
                # One way to write a line: else spaces could be slipped in unseen.
                if _canonical(line).encode() + b"\n" != raw:
                    raise Tampered(
                        f"{path} line {number} was changed: it is written in another way"
                    )
                yield line
    except OSError as error:
        if isinstance(error, Tampered):
            raise
        raise ConfigError(f"'{path}' cannot be read ({error.strerror}): check the path") from error


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except ValueError:
        return None
    kinds = {"n": int, "hash": str, "previous": str, "event": str, "time": str}
    if not isinstance(line, dict):
        return None
    return line if all(type(line.get(key)) is kind for key, kind in kinds.items()) else None


def _head_of(raw: bytes, path: Path) -> Head:
    line = _parsed(raw)
    if line is None or line["hash"] != _hash_of(line):
        raise Tampered(
            f"the last line of the audit log {path.name} does not hold: run 'cutlayer audit-log "
            "verify' on it, keep it as evidence, and name another file in --audit_log"
        )
    return Head(line["n"], line["hash"])


def _canonical(line: dict[str, Any]) -> str:
    return json.dumps(line, sort_keys=True, separators=(",", ":"))


def _hash_of(line: dict[str, Any]) -> str:
    content = {key: value for key, value in line.items() if key != "hash"}
    return hashlib.sha256((line["previous"] + _canonical(content)).encode()).hexdigest()


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"the audit log {path.name} cannot be written ({error.strerror or error}): the server's "
        "operator must free space, or name another file in --audit_log"
    )
