"""Who may come in: TLS credentials, the tenant behind a call, and who must leave."""

from __future__ import annotations

import contextlib
import logging
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from cutlayer.errors import ConfigError, CutlayerError, Refused, StorageError, Unauthorized
from cutlayer.server.names import is_plain_name
from cutlayer.server.tenants import LOOK_EVERY_S, Register

__all__ = ["ANYONE", "AUTH", "Gate", "Limits", "server_credentials"]

log = logging.getLogger(__name__)

ANYONE = "default"
"""The tenant of every caller when the server asks for neither certificate nor token."""

AUTH = ("none", "tls", "token", "both")
"""Ways to know a tenant: none, by certificate, by bearer token, by both."""

_SCHEME = "bearer "


@dataclass(frozen=True)
class Limits:
    """What one tenant may ask of the server."""

    max_message_bytes: int = 1 << 30
    """Bytes of tensors in one message."""
    max_pending: int = 64
    """Forwards of one session that may wait for their backward."""
    max_rank: int = 512
    """Rank of a LoRA."""
    max_sessions: int = 256
    """Sessions open at once, of all tenants."""
    idle_timeout_s: float = 120.0
    """Seconds without a byte after which a client takes the link for dead."""
    lease_s: float = 300.0
    """Seconds of a tenant's silence after which its session is parked."""


def server_credentials(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """Return the credentials of a server; with `client_ca`, only its clients come in.

    Raises:
        ConfigError: If a file is missing, or the private key can be read by others.
    """
    for flag, path in (("--tls_cert", cert), ("--tls_key", key), ("--tls_client_ca", client_ca)):
        if path is not None and not path.is_file():
            raise ConfigError(
                f"{flag} '{path}' does not exist: make certificates with 'cutlayer certs init'"
            )
    if key.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"--tls_key '{key}' can be read by others: run 'chmod 600 {key}'")
    return grpc.ssl_server_credentials(
        [(key.read_bytes(), cert.read_bytes())],
        root_certificates=client_ca.read_bytes() if client_ca else None,
        require_client_auth=client_ca is not None,
    )


class Gate:
    """Know the tenant behind a call, and show those out who are let in no more."""

    def __init__(self, register: Register, auth: str = "none") -> None:
        """Stand at the door.

        Args:
            register: The tenants, with the hashes of their tokens.
            auth: One of AUTH.
        """
        self.register = register
        self.auth = auth
        self._guests: dict[object, _Guest] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._watch = threading.Thread(target=self._look, name="gate", daemon=True)
        self._watch.start()

    def tenant_of(self, context: grpc.ServicerContext) -> str:
        """Return the tenant's name.

        Raises:
            Unauthorized: If it has no valid token or certificate; unknown, rotated and revoked are
                told alike.
            Refused: If the certificate's common name is not plain.
            StorageError: If the register cannot be read.
        """
        return self._admit(_certified(context), _token(context))

    def name_of(self, context: grpc.ServicerContext) -> str:
        """Return the tenant's name, empty if it is not let in."""
        try:
            return self.tenant_of(context)
        except CutlayerError:
            return ""

    def _admit(self, certified: str | None, token: str | None) -> str:
        name = certified or ANYONE
        if certified is None and self.auth in ("tls", "both"):
            raise Unauthorized("the server asks for a client certificate: give one in split_cert")
        if self.auth in ("token", "both"):
            holder = self.register.holder_of(token) if token else None
            if holder is None or (self.auth == "both" and holder.name != certified):
                raise Unauthorized(
                    "the server does not accept this token: it is missing, unknown, of another "
                    "certificate, replaced or revoked; name a file with a valid one in "
                    "split_token_file"
                )
            name = holder.name
        known = self.register.get(name)
        if known is not None and known.revoked_s is not None:
            raise Unauthorized(
                f"the server does not let '{name}' in: ask its operator for access, or give the "
                "certificate of another tenant"
            )
        return name

    @contextlib.contextmanager
    def watching(
        self, context: grpc.ServicerContext, say: Callable[[CutlayerError], None]
    ) -> Iterator[None]:
        """While open, show the caller out within a second of losing its right to be here.

        Args:
            context: The call of an open stream.
            say: Told why, so that the client hears it; the call is cut at the next look.
        """
        guest = _Guest(_certified(context), _token(context), say, context.cancel)
        key = object()
        with self._lock:
            self._guests[key] = guest
        try:
            yield
        finally:
            with self._lock:
                self._guests.pop(key, None)

    def stop(self) -> None:
        """Stop looking."""
        self._stopped.set()
        self._watch.join()
        self.register.close()

    def _look(self) -> None:
        while not self._stopped.wait(LOOK_EVERY_S):
            with self._lock:
                guests = list(self._guests.values())
            if guests:
                with contextlib.suppress(StorageError):  # told below, of each guest
                    self.register.look(at_once=True)
            for guest in guests:
                try:
                    self._admit(guest.certified, guest.token)
                except StorageError as error:
                    log.error("open streams cannot be checked: %s", error)
                except CutlayerError as error:
                    guest.leave(error)


@dataclass
class _Guest:
    """The caller of one open stream."""

    certified: str | None
    token: str | None
    say: Callable[[CutlayerError], None]
    cut: Callable[[], None]
    was_told: bool = False

    def leave(self, error: CutlayerError) -> None:
        """Say why once; who is still here at the next look is cut off."""
        if self.was_told:
            self.cut()
        else:
            self.was_told = True
            self.say(error)


def _token(context: grpc.ServicerContext) -> str | None:
    found = [value for key, value in context.invocation_metadata() if key == "authorization"]
    if len(found) != 1 or not isinstance(found[0], str):
        return None
    value: str = found[0]
    return value[len(_SCHEME) :] if value.lower().startswith(_SCHEME) else None


def _certified(context: grpc.ServicerContext) -> str | None:
    """Return the common name of the client's certificate, `None` without mutual TLS."""
    auth = context.auth_context()
    if "x509_pem_cert" not in auth:
        return None
    name = b"".join(auth.get("x509_common_name", [])[:1]).decode(errors="replace")
    if not is_plain_name(name):
        raise Refused(
            f"the common name '{name}' of the client's certificate is not plain: use letters, "
            "digits, '.', '_' and '-', at most 64"
        )
    return name
