"""The operator's port, off the data port: `/metrics`, the status page, probes. It only tells."""

from __future__ import annotations

import ipaddress
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client.exposition import choose_encoder

from cutlayer.errors import ConfigError
from cutlayer.server.status_page import Status, rendered

__all__ = ["MetricsPort"]

log = logging.getLogger(__name__)

_AT_ONCE = 16
_TIMEOUT_S = 10.0
_MAX_PATH = 256
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class MetricsPort:
    """A small HTTP server of its own threads."""

    def __init__(self, status: Status, host: str, port: int) -> None:
        """Listen.

        Raises:
            ConfigError: If the port is taken.
        """
        try:
            self._server = _Server((host, port), status)
        except OSError as error:
            raise ConfigError(
                f"--metrics_port: cannot listen at {host}:{port} ({error.strerror or error})"
            ) from error
        self.host, self.port = host, self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], status: Status) -> None:
        self.status = status
        self.is_local = _is_loopback(address[0])
        self._room = threading.BoundedSemaphore(_AT_ONCE)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        # Callers beyond these wait in the kernel's queue, and cost no thread.
        self._room.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a caller of the metrics port went away", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _TIMEOUT_S
    server_version = "cutlayer"
    sys_version = ""

    def do_GET(self) -> None:  # http.server's name
        """Answer one of the known paths."""
        if self.server.is_local and not _is_loopback(_host_in(self.headers.get("Host", ""))):
            # A page elsewhere whose name was pointed at this machine must not read this one.
            return self._answer(421, "text/plain", b"ask for 127.0.0.1 or localhost\n")
        path, _, query = self.path[:_MAX_PATH].partition("?")
        status = self.server.status
        if path == "/metrics":
            encode, kind = choose_encoder(self.headers.get("Accept", ""))
            return self._answer(200, kind, encode(status.metrics.registry))
        if path == "/":
            page = rendered(status.facts(), again=query == "again").encode()
            return self._answer(200, "text/html; charset=utf-8", page)
        if path == "/status.json":
            return self._answer(200, "application/json", json.dumps(status.facts()).encode())
        if path == "/healthz":
            return self._answer(200, "text/plain", b"alive\n")
        if path == "/readyz":
            serving = status.is_serving()
            text = b"serving\n" if serving else b"stopping\n"
            return self._answer(200 if serving else 503, "text/plain", text)
        return self._answer(404, "text/plain", b"there are / and /metrics\n")

    do_HEAD = do_GET

    def _answer(self, code: int, kind: str, body: bytes) -> None:
        self.send_response(code)
        for name, value in {**_HEADERS, "Content-Type": kind}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # http.server's name
        """Say nothing of each scrape."""


def _host_in(header: str) -> str:
    host = header.rsplit(":", 1)[0] if not header.endswith("]") else header
    return host.strip("[]")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
