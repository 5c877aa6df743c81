"""Who may come in, and for how much: TLS credentials, the tenant behind a call, limits."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

import grpc

from cutlayer.errors import ConfigError, Refused
from cutlayer.server.store import is_plain_name

__all__ = ["ANYONE", "Limits", "server_credentials", "tenant_of"]

ANYONE = "default"
"""The tenant of every caller when the server asks for no client certificates."""


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
    """Seconds without a byte after which a client takes the server for dead."""


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


def tenant_of(context: grpc.ServicerContext) -> str:
    """Return the tenant's name: the common name of its certificate, or ANYONE without mutual TLS.

    Raises:
        Refused: If the certificate's common name is not plain.
    """
    auth = context.auth_context()
    if "x509_pem_cert" not in auth:
        return ANYONE
    name = b"".join(auth.get("x509_common_name", [])[:1]).decode(errors="replace")
    if not is_plain_name(name):
        raise Refused(
            f"the common name '{name}' of the client's certificate is not plain: use letters, "
            "digits, '.', '_' and '-', at most 64"
        )
    return name
