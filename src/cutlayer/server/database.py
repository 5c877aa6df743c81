"""The server's journal: one SQLite file beside the tenants' states.

Each module that keeps something here makes its own table when it opens the journal. What a crash
must not take is written with `synchronous=FULL`; readers never wait for the writer (WAL).
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cutlayer.errors import StorageError

__all__ = ["Journal"]

_FILE = "journal.sqlite"


class Journal:
    """One connection to the journal, for all threads of the server."""

    def __init__(self, state_dir: Path) -> None:
        """Open the journal of a folder, making both if they are not there.

        Raises:
            StorageError: If the folder cannot be written or the file is no journal.
        """
        self.path = state_dir / _FILE
        self._lock = threading.RLock()
        try:
            state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._connection = sqlite3.connect(
                self.path, check_same_thread=False, isolation_level=None, timeout=10.0
            )
            self.path.chmod(0o600)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
        except (OSError, sqlite3.Error) as error:
            raise _unwritable(self.path, error) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run statements of which all take effect or none.

        Raises:
            StorageError: If the disk is full, or the file is damaged or locked by another server.
        """
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise _unwritable(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()


def _unwritable(path: Path, error: Exception) -> StorageError:
    return StorageError(
        f"the server's journal {path.name} cannot be read or written ({error}): its operator must "
        "free space, or check that no other server uses the same --state_dir"
    )
