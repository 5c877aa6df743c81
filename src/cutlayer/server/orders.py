"""What an operator's commands ask of a running server, through the journal."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable

from cutlayer.errors import CutlayerError
from cutlayer.server.database import Journal

__all__ = ["Orders", "order_stop"]

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_TABLE = "CREATE TABLE IF NOT EXISTS stops (session TEXT PRIMARY KEY, tenant TEXT NOT NULL)"


def order_stop(journal: Journal, session: str, tenant: str) -> None:
    """Ask the server to end a session."""
    with journal.transaction() as rows:
        rows.execute(_TABLE)
        rows.execute("INSERT OR IGNORE INTO stops VALUES (?, ?)", (session, tenant))


class Orders:
    """Looks for orders and carries them out."""

    def __init__(self, journal: Journal, stop: Callable[[str, str], None]) -> None:
        """Begin to look.

        Args:
            journal: Where orders are written.
            stop: Ends a session, by tenant and id.
        """
        self._journal = journal
        self._stop = stop
        with journal.transaction() as rows:
            rows.execute(_TABLE)
        self._reader = sqlite3.connect(journal.path, check_same_thread=False, isolation_level=None)
        self._version = -1
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="orders", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._ended.set()
        self._thread.join()
        self._reader.close()

    def _look(self) -> None:
        while not self._ended.wait(_LOOK_EVERY_S):
            try:
                (version,) = self._reader.execute("PRAGMA data_version").fetchone()
                if version != self._version:
                    self._version = version
                    for session, tenant in self._reader.execute("SELECT * FROM stops").fetchall():
                        self._carry_out(session, tenant)
            except (sqlite3.Error, CutlayerError) as error:
                log.error("orders cannot be read or carried out: %s", error)

    def _carry_out(self, session: str, tenant: str) -> None:
        try:
            self._stop(tenant, session)
            log.info("the operator stopped a session of tenant %s", tenant)
        except CutlayerError as error:
            log.info("a session that was to be stopped is gone: %s", error)
        with self._journal.transaction() as rows:
            rows.execute("DELETE FROM stops WHERE session = ?", (session,))
