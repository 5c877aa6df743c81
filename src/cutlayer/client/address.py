"""Where a server is and how to trust it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from cutlayer.errors import ConfigError
from cutlayer.wire.frames import FRAME_BYTES, MAX_HEAD_BYTES

__all__ = ["Address"]


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

    def host_and_port(self) -> tuple[str, int]:
        """Return the two parts.

        Raises:
            ConfigError: If it is not `host:port`.
        """
        host, _, port = self.server.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"server '{self.server}' is not an address: write host:port")
        return host.strip("[]"), int(port)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Return the channel's credentials, `None` for plaintext.

        Raises:
            ConfigError: If a file is missing, or only one of certificate and key is given.
        """
        if self.plaintext:
            return None
        if (self.cert is None) != (self.key is None):
            raise ConfigError("split_cert and split_key go together: give both or neither")
        for name, path in (("ca", self.ca), ("cert", self.cert), ("key", self.key)):
            if path is not None and not path.is_file():
                raise ConfigError(f"split_{name} '{path}' does not exist: check the path")
        return grpc.ssl_channel_credentials(
            *(path.read_bytes() if path else None for path in (self.ca, self.key, self.cert))
        )

    def open_channel(self) -> grpc.Channel:
        """Return a channel to the server; nothing is sent yet.

        Raises:
            ConfigError: If the address or a file of it is wrong.
        """
        host, port = self.host_and_port()
        credentials = self.credentials()
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
