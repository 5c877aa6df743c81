"""Where a server is and how to trust it."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from cutlayer.errors import ConfigError
from cutlayer.privacy.attestation import Policy
from cutlayer.wire.frames import FRAME_BYTES, MAX_HEAD_BYTES

__all__ = ["Address", "plain_token", "read_token", "refuse_readable_by_others"]


@dataclass(frozen=True)
class Address:
    """Where a server is and how to trust it."""

    server: str
    """`host:port`."""
    ca: Path | None = None
    """The authority that signed the server's certificate; the system's authorities if `None`."""
    cert: Path | None = None
    """The client's own certificate, for mutual TLS."""
    key: Path | None = None
    """The key of that certificate."""
    plaintext: bool = False
    """No TLS at all: everybody on the way reads the activations, which are the text."""
    policy: Policy | None = None
    """What the server must prove before anything is sent to it."""
    token: str | None = field(default=None, repr=False)
    """The bearer token by which the server knows us; it is sent over TLS only."""

    @classmethod
    def of(
        cls,
        server: str,
        ca: str | Path | None = None,
        cert: str | Path | None = None,
        key: str | Path | None = None,
        token_file: str | Path | None = None,
        token: str | None = None,
        plaintext: bool = False,
        attestation_policy: str | Path | None = None,
    ) -> Address:
        """Return an address, its files named, its token and its policy read.

        Raises:
            ConfigError: If the token's file is missing, can be read by others or holds none; if
                the policy cannot be read, or asks for what a connection without TLS cannot prove.
        """
        if token is not None:
            token = plain_token(token, "the token")
        elif token_file is not None:
            token = read_token(Path(token_file))
        authority, ours, secret = (Path(given) if given else None for given in (ca, cert, key))
        policy = Policy.load(attestation_policy) if attestation_policy else None
        if policy is not None and plaintext:
            raise ConfigError(
                "evidence is bound to the server's TLS certificate: leave out split_plaintext, or "
                "split_attestation_policy"
            )
        return cls(server, authority, ours, secret, plaintext, policy, token)

    def host_and_port(self) -> tuple[str, int]:
        """Return the two parts.

        Raises:
            ConfigError: If it is not `host:port`.
        """
        host, _, port = self.server.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"server '{self.server}' is not an address: write host:port")
        return host.strip("[]"), int(port)

    def credentials(
        self, pinned: bytes | None = None, *, anonymous: bool = False
    ) -> grpc.ChannelCredentials | None:
        """Return the channel's credentials, `None` for plaintext.

        Args:
            pinned: The only certificate to trust, in PEM, in place of the authority.
            anonymous: Show no token.

        Raises:
            ConfigError: If a file is missing, only one of certificate and key is given, others can
                read the key, or a token would be sent in plaintext.
        """
        if self.plaintext:
            if self.token:
                raise ConfigError(
                    "a token is sent over TLS only: leave out split_plaintext, or the token "
                    "(split_token_file, CUTLAYER_TOKEN)"
                )
            return None
        if (self.cert is None) != (self.key is None):
            raise ConfigError("split_cert and split_key go together: give both or neither")
        for name, path in (("ca", self.ca), ("cert", self.cert), ("key", self.key)):
            if path is not None and not path.is_file():
                raise ConfigError(f"split_{name} '{path}' does not exist: check the path")
        if self.key is not None:
            refuse_readable_by_others("split_key", self.key)
        secured = grpc.ssl_channel_credentials(
            pinned or (self.ca.read_bytes() if self.ca else None),
            *(path.read_bytes() if path else None for path in (self.key, self.cert)),
        )
        if not self.token or anonymous:
            return secured
        # gRPC puts it in the metadata of every call, and of none that is not over TLS.
        return grpc.composite_channel_credentials(
            secured, grpc.access_token_call_credentials(self.token)
        )

    def open_channel(self, pinned: bytes | None = None, *, anonymous: bool = False) -> grpc.Channel:
        """Return a channel with `credentials` of these arguments; nothing is sent yet.

        Raises:
            ConfigError: If the address or a file of it is wrong.
        """
        host, port = self.host_and_port()
        credentials = self.credentials(pinned, anonymous=anonymous)
        options = [
            ("grpc.max_receive_message_length", FRAME_BYTES + MAX_HEAD_BYTES + 16),
            ("grpc.max_send_message_length", FRAME_BYTES + MAX_HEAD_BYTES + 16),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.enable_http_proxy", 0),
        ]
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if credentials is None:
            return grpc.insecure_channel(target, options=options)
        return grpc.secure_channel(target, credentials, options=options)


def read_token(path: Path) -> str:
    """Return the token in a file.

    Raises:
        ConfigError: If the file is missing, others can read it, or it holds no token.
    """
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"split_token_file '{path}' cannot be read: check the path") from None
    refuse_readable_by_others("split_token_file", path)
    return plain_token(text, f"split_token_file '{path}'")


def plain_token(text: str, where: str) -> str:
    """Return a token as it is sent.

    Raises:
        ConfigError: If it cannot be one.
    """
    if not text.isascii() or not text.isprintable() or not text or " " in text:
        raise ConfigError(f"{where} holds no token: it is one line, as 'cutlayer tenants add' says")
    return text


def refuse_readable_by_others(name: str, path: Path) -> None:
    """Refuse a secret that other accounts of this machine can read.

    Raises:
        ConfigError: Saying how to close it.
    """
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{name} '{path}' can be read by others: run 'chmod 600 {path}'")
