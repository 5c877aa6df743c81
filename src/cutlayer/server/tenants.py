"""The register of tenants, in the journal: their tokens as hashes, their quotas, who was revoked.

A token is 256 random bits, so a plain SHA-256 of it is enough: there is no dictionary to try. The
register is read by the server and written by `cutlayer tenants`, which is another process; the
server looks for changes every `LOOK_EVERY_S` seconds.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
import sqlite3
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from cutlayer.errors import ConfigError, StorageError
from cutlayer.server.database import Journal
from cutlayer.server.names import is_plain_name

__all__ = ["LOOK_EVERY_S", "TOKEN_PREFIX", "Register", "Tenant"]

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2
"""How old the server's knowledge of the register may be: a revoked token must stop within 1 s."""

TOKEN_PREFIX = "cutlayer_"  # noqa: S105  # lets scanners for leaked secrets know one
_TABLE = """
CREATE TABLE IF NOT EXISTS tenants (
    name TEXT PRIMARY KEY,
    token_hash BLOB,
    old_hash BLOB,
    old_until_s REAL,
    quotas TEXT NOT NULL DEFAULT '{}',
    created_s REAL NOT NULL,
    rotated_s REAL,
    revoked_s REAL
)"""


@dataclass(frozen=True)
class Tenant:
    """One line of the register."""

    name: str
    quotas: Mapping[str, int] = field(default_factory=dict)
    """What this tenant may use, where it is not the server's default."""
    created_s: float = 0.0
    rotated_s: float | None = None
    revoked_s: float | None = None
    token_hash: bytes | None = field(default=None, repr=False)
    old_hash: bytes | None = field(default=None, repr=False)
    old_until_s: float | None = None

    def has(self, token_hash: bytes, now_s: float) -> bool:
        """Say whether a token of this hash is this tenant's now, in time that tells nothing."""
        current = hmac.compare_digest(self.token_hash or b"", token_hash)
        old = hmac.compare_digest(self.old_hash or b"", token_hash)
        return self.revoked_s is None and (current or (old and now_s < (self.old_until_s or 0.0)))

    def facts(self) -> dict[str, object]:
        """Return what an operator may see of it: all but the hashes."""
        return {
            "name": self.name,
            "state": "revoked" if self.revoked_s is not None else "active",
            "has_token": self.token_hash is not None,
            "quotas": dict(self.quotas),
            "created_s": self.created_s,
            "rotated_s": self.rotated_s,
            "revoked_s": self.revoked_s,
            "old_token_until_s": self.old_until_s,
        }


class Register:
    """The tenants of one journal."""

    def __init__(self, journal: Journal) -> None:
        """Read the register, making its table if it is not there.

        Raises:
            StorageError: If the journal cannot be read.
        """
        self._journal = journal
        self._lock = threading.Lock()
        with journal.transaction() as rows:
            rows.execute(_TABLE)
        # Its own connection: `data_version` counts the commits of all others, and looking must
        # never wait for a step that is being written.
        self._reader = sqlite3.connect(
            journal.path, check_same_thread=False, isolation_level=None, timeout=1.0
        )
        self._reader.row_factory = sqlite3.Row
        self._version = -1
        self._tenants: dict[str, Tenant] = {}
        self._seen_s = 0.0
        self.look(at_once=True)

    def look(self, *, at_once: bool = False) -> None:
        """Read the register again if another process changed it.

        Raises:
            StorageError: If it cannot be read: who is let in is then unknown, so nobody is.
        """
        with self._lock:
            now_s = time.monotonic()
            if not at_once and now_s - self._seen_s < LOOK_EVERY_S:
                return
            try:
                (version,) = self._reader.execute("PRAGMA data_version").fetchone()
                if version != self._version:
                    found = self._reader.execute("SELECT * FROM tenants ORDER BY name").fetchall()
                    self._tenants = {row["name"]: _tenant_of(row) for row in found}
                    self._version = version
            except sqlite3.Error as error:
                self._version = -1
                raise StorageError(
                    f"the server's register of tenants cannot be read ({error}): nobody is let in "
                    "until its operator has looked at the disk"
                ) from error
            self._seen_s = now_s

    def tenants(self) -> list[Tenant]:
        """Return all tenants by name, the revoked ones too."""
        self.look()
        return list(self._tenants.values())

    def get(self, name: str) -> Tenant | None:
        """Return one tenant, `None` if it was never added."""
        self.look()
        return self._tenants.get(name)

    def holder_of(self, token: str) -> Tenant | None:
        """Return the tenant whose token this is, `None` if it is nobody's or was revoked.

        Every tenant is compared with, in constant time, so that the time taken tells nothing.
        """
        self.look()
        token_hash, now_s = _hash(token), time.time()
        found = None
        for tenant in self._tenants.values():
            if tenant.has(token_hash, now_s):
                found = tenant
        return found

    def add(
        self, name: str, quotas: Mapping[str, int] | None = None, *, with_token: bool = True
    ) -> str:
        """Add a tenant and return its token, which is kept nowhere else; empty without one.

        Raises:
            ConfigError: If the name is not plain, or is taken.
        """
        if not is_plain_name(name):
            raise ConfigError(
                f"tenant '{name}' is no plain name: use letters, digits, '.', '_' and '-', at most "
                "64"
            )
        token = TOKEN_PREFIX + secrets.token_urlsafe(32) if with_token else ""
        with self._journal.transaction() as rows:
            known = rows.execute("SELECT revoked_s FROM tenants WHERE name = ?", (name,)).fetchone()
            if known is not None:
                raise ConfigError(
                    f"tenant '{name}' is there already"
                    + ("" if known["revoked_s"] is None else " and was revoked")
                    + f": 'cutlayer tenants rotate {name}' gives it a new token"
                )
            rows.execute(
                "INSERT INTO tenants (name, token_hash, quotas, created_s) VALUES (?, ?, ?, ?)",
                (name, _hash(token) if token else None, json.dumps(quotas or {}), time.time()),
            )
        self.look(at_once=True)
        return token

    def limit(self, name: str, quotas: Mapping[str, int]) -> dict[str, int]:
        """Change some of a tenant's quotas, and return all that are its own.

        Raises:
            ConfigError: If there is no such tenant.
        """
        with self._journal.transaction() as rows:
            _known(rows, name)
            query = "SELECT quotas FROM tenants WHERE name = ?"
            held = json.loads(rows.execute(query, (name,)).fetchone()["quotas"])
            changed: dict[str, int] = {**held, **quotas}
            rows.execute(
                "UPDATE tenants SET quotas = ? WHERE name = ?", (json.dumps(changed), name)
            )
        self.look(at_once=True)
        return changed

    def quotas_of(self, name: str) -> Mapping[str, int]:
        """Return a tenant's own quotas; of one that was never added, none."""
        tenant = self.get(name)
        return tenant.quotas if tenant is not None else {}

    def rotate(self, name: str, *, overlap_s: float = 0.0) -> str:
        """Give a tenant a new token, revoked or not, and return it.

        Args:
            name: The tenant.
            overlap_s: Seconds for which the old token goes on working beside the new one.

        Raises:
            ConfigError: If there is no such tenant.
        """
        token = TOKEN_PREFIX + secrets.token_urlsafe(32)
        now_s = time.time()
        with self._journal.transaction() as rows:
            _known(rows, name)
            # Of one that was revoked no old token comes to life again: `revoke` took it away.
            rows.execute(
                "UPDATE tenants SET rotated_s = ?, revoked_s = NULL, token_hash = ?,"
                " old_hash = token_hash, old_until_s = ?"
                " WHERE name = ?",
                (now_s, _hash(token), now_s + overlap_s if overlap_s > 0 else None, name),
            )
        self.look(at_once=True)
        return token

    def revoke(self, name: str) -> None:
        """Let a tenant in no more: not its token, and not its certificate.

        A name that was never added is taken down as revoked, for tenants that have certificates.

        Raises:
            ConfigError: If the name is not plain.
        """
        if not is_plain_name(name):
            raise ConfigError(f"tenant '{name}' is no plain name")
        now_s = time.time()
        with self._journal.transaction() as rows:
            rows.execute(
                "INSERT INTO tenants (name, created_s, revoked_s) VALUES (?, ?, ?) ON CONFLICT"
                "(name) DO UPDATE SET revoked_s = ?, token_hash = NULL, old_hash = NULL",
                (name, now_s, now_s, now_s),
            )
        self.look(at_once=True)

    def close(self) -> None:
        """Close the reading connection; the journal stays open."""
        with self._lock:
            self._reader.close()


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


def _known(rows: sqlite3.Connection, name: str) -> None:
    if rows.execute("SELECT 1 FROM tenants WHERE name = ?", (name,)).fetchone() is None:
        raise ConfigError(f"there is no tenant '{name}': 'cutlayer tenants list' names them")


def _tenant_of(row: sqlite3.Row) -> Tenant:
    return Tenant(**{**dict(row), "quotas": json.loads(row["quotas"])})
