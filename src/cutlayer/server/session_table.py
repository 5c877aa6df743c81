"""Which sessions there are, in the journal: what a restarted server makes them again from."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass

from cutlayer.server.database import Journal
from cutlayer.wire import cutlayer_pb2 as pb

__all__ = ["Entry", "SessionTable"]

_TABLE = """
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    run TEXT NOT NULL,
    asked BLOB NOT NULL,        -- the OpenSessionRequest, from which the trunk is made again
    mark INTEGER NOT NULL,      -- the request after which the newest mark was written
    opened_s REAL NOT NULL,
    marked_s REAL NOT NULL,
    UNIQUE (tenant, run)
)
"""


@dataclass(frozen=True)
class Entry:
    """One session as the journal has it; times in seconds since 1970."""

    identifier: str
    tenant: str
    run: str
    asked: pb.OpenSessionRequest
    mark: int
    opened_s: float
    marked_s: float


class SessionTable:
    """The sessions that may still be called, parked ones among them."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        with journal.transaction() as sql:
            sql.execute(_TABLE)

    def add(self, identifier: str, tenant: str, asked: pb.OpenSessionRequest) -> None:
        """Write down a session that was opened; it takes the place of an older one of its run."""
        now_s = time.time()
        with self._journal.transaction() as sql:
            sql.execute("DELETE FROM sessions WHERE tenant = ? AND run = ?", (tenant, asked.run))
            sql.execute(
                "INSERT INTO sessions VALUES (?, ?, ?, ?, 0, ?, ?)",
                (identifier, tenant, asked.run, asked.SerializeToString(), now_s, now_s),
            )

    def find(self, identifier: str) -> Entry | None:
        """Return a session by its identifier."""
        with self._journal.transaction() as sql:
            row = sql.execute("SELECT * FROM sessions WHERE id = ?", (identifier,)).fetchone()
        return _entry(row) if row else None

    def all(self) -> list[Entry]:
        """Return all sessions, the oldest first."""
        with self._journal.transaction() as sql:
            rows = sql.execute("SELECT * FROM sessions ORDER BY opened_s").fetchall()
        return [_entry(row) for row in rows]

    def marked(self, identifier: str, sequence: int) -> None:
        """Write down that a mark stands on the disk."""
        with self._journal.transaction() as sql:
            sql.execute(
                "UPDATE sessions SET mark = ?, marked_s = ? WHERE id = ?",
                (sequence, time.time(), identifier),
            )

    def drop(self, identifier: str) -> None:
        """Forget a session."""
        with self._journal.transaction() as sql:
            sql.execute("DELETE FROM sessions WHERE id = ?", (identifier,))


def _entry(row: sqlite3.Row) -> Entry:
    return Entry(
        row["id"],
        row["tenant"],
        row["run"],
        pb.OpenSessionRequest.FromString(row["asked"]),
        row["mark"],
        row["opened_s"],
        row["marked_s"],
    )
