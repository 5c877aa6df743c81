"""A TCP proxy between client and server that can be cut, held and slowed."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading


class Proxy:
    """Pass bytes on from a port of its own to another, until told otherwise."""

    def __init__(self, port: int) -> None:
        self.target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._flowing = threading.Event()
        self._flowing.set()
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target), timeout=5)
            except OSError:
                with contextlib.suppress(OSError, UnboundLocalError):
                    near.close()
                continue
            far.settimeout(None)
            self._open += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                self._flowing.wait()
                other.sendall(data)
        for each in (one, other):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Reset all connections, what is in them is lost."""
        for each in self._open:
            with contextlib.suppress(OSError):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                each.shutdown(socket.SHUT_RDWR)
                each.close()
        self._open.clear()

    def hold(self) -> None:
        """Let no byte through, and say nothing: a partition."""
        self._flowing.clear()

    def release(self) -> None:
        """End the partition."""
        self._flowing.set()

    def close(self) -> None:
        """Stop."""
        self._closed = True
        self.release()
        self.cut()
        self._listener.close()
