"""A link between two processes: so many bits a second, so long a way, both directions at once.

The kernels of most test machines cannot delay packets (netem is a module that they lack), so the
link is made here: a process between client and server that passes every byte on when it would
have arrived. A byte waits for the bytes before it (a token bucket without a burst), then travels
for half a round trip. All connections through one relay share the link. TCP ends here on both
sides, so congestion control and loss are not part of it; the windows of HTTP/2 are, because they
are told from end to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import median
from benchmarks.processes import Child

__all__ = ["Direction", "Link", "Relay", "probe"]

_PIECE_BYTES = 16 << 10
_HELD_PIECES = 256
_TOLERANCE = 0.05


@dataclass
class Direction:
    """One way of a link.

    Attributes:
        bytes_per_s: How fast bytes enter it.
        delay_s: How long a byte travels after that.
        passed_bytes: What has left it so far.
    """

    bytes_per_s: float
    delay_s: float
    passed_bytes: int = 0
    _free_s: float = 0.0

    def due_s(self, nbytes: int, now_s: float) -> float:
        """Take bytes in, and return when the last of them arrives."""
        self._free_s = max(now_s, self._free_s) + nbytes / self.bytes_per_s
        return self._free_s + self.delay_s


@dataclass
class Relay:
    """Pass bytes between ports of its own and others, at the pace of one link.

    Attributes:
        targets: Ports of this machine that are behind the link.
        mbit_s: Megabits a second, each direction; 0 is as fast as it goes.
        rtt_ms: Milliseconds there and back.
        ports: Where to connect instead, one for each target.
    """

    targets: Sequence[int]
    mbit_s: float = 0.0
    rtt_ms: float = 0.0
    ports: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        rate = self.mbit_s * 1e6 / 8 if self.mbit_s else float("inf")
        self.up, self.down = (Direction(rate, self.rtt_ms / 2e3) for _ in range(2))
        self._running: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Listen on the ports."""
        for target in self.targets:
            server = await asyncio.start_server(
                lambda reader, writer, target=target: self._joined(reader, writer, target),
                "127.0.0.1",
                0,
            )
            self.ports.append(server.sockets[0].getsockname()[1])

    async def _joined(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: int
    ) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            writer.close()
            return
        for a, b, way in ((reader, far_writer, self.up), (far_reader, writer, self.down)):
            pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_HELD_PIECES)
            for passing in (self._take(a, pieces, way), self._give(b, pieces, way)):
                task = asyncio.create_task(passing)
                self._running.add(task)
                task.add_done_callback(self._running.discard)

    async def _take(
        self, reader: asyncio.StreamReader, pieces: asyncio.Queue[Any], way: Direction
    ) -> None:
        data = b"-"
        while data:
            try:
                data = await reader.read(_PIECE_BYTES)
            except OSError:
                data = b""
            await pieces.put((way.due_s(len(data), time.monotonic()), data))

    async def _give(
        self, writer: asyncio.StreamWriter, pieces: asyncio.Queue[Any], way: Direction
    ) -> None:
        try:
            while True:
                due_s, data = await pieces.get()
                pause_s = due_s - time.monotonic()
                if pause_s > 0:
                    await asyncio.sleep(pause_s)
                if not data:
                    break
                writer.write(data)
                way.passed_bytes += len(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


class Link:
    """A relay as a process of its own."""

    def __init__(self, targets: Sequence[int], *, mbit_s: float = 0.0, rtt_ms: float = 0.0) -> None:
        self.mbit_s, self.rtt_ms = mbit_s, rtt_ms
        sink = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=_answer_probes, args=(sink,), daemon=True).start()
        spec = {
            "targets": [*targets, sink.getsockname()[1]],
            "mbit_s": mbit_s,
            "rtt_ms": rtt_ms,
        }
        self._child = Child("benchmarks.relay", spec, threads=1)
        *self.ports, self._probe_port = self._child.hello["ports"]

    def passed_bytes(self) -> dict[str, int]:
        """Return what has passed so far: `up` and `down`."""
        return self._child.ask("passed")

    def measured(self) -> dict[str, float]:
        """Probe the link: `mbit_s_up`, `mbit_s_down`, `rtt_ms`."""
        return probe(self._probe_port, mbit_s=self.mbit_s or 1000.0)

    def probed(self) -> dict[str, float]:
        """Probe the link, three times at most, until it is found as it should be.

        Raises:
            SystemExit: If bandwidth or round trip are off by more than 5%.
        """
        told = {"mbit_s_up": self.mbit_s, "mbit_s_down": self.mbit_s, "rtt_ms": self.rtt_ms}
        for _ in range(3):
            found = self.measured()
            off = [n for n, v in told.items() if v and abs(found[n] / v - 1) > _TOLERANCE]
            if not off:
                return found
        name = off[0]
        unit = "ms" if name == "rtt_ms" else "Mbit/s"
        sys.exit(f"the link was to have {told[name]} {unit} and has {found[name]:.2f} ({name})")

    def close(self) -> None:
        """End the process."""
        self._child.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def probe(port: int, *, mbit_s: float) -> dict[str, float]:
    """Measure the link behind a port by messages: half a second's bytes there, then back.

    Returns:
        `mbit_s_up`, `mbit_s_down`, and `rtt_ms`, the median of nine one-byte echoes.
    """
    nbytes = int(mbit_s * 1e6 / 8 / 2)
    with socket.create_connection(("127.0.0.1", port)) as end:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips = []
        for _ in range(9):
            started_s = time.perf_counter()
            _say(end, 1, 1)
            trips.append(time.perf_counter() - started_s)
        rtt_s = median(trips)
        # What is left of such an exchange after the round trip is the bytes' own time.
        started_s = time.perf_counter()
        _say(end, nbytes, 1)
        up_s = time.perf_counter() - started_s - rtt_s
        started_s = time.perf_counter()
        _say(end, 1, nbytes)
        down_s = time.perf_counter() - started_s - rtt_s
    megabits = 8 * nbytes / 1e6
    return {
        "mbit_s_up": megabits / up_s,
        "mbit_s_down": megabits / down_s,
        "rtt_ms": 1e3 * rtt_s,
    }


_ORDER_BYTES = 16


def _say(end: socket.socket, up: int, down: int) -> None:
    order = f"{up:<8d}{down:<8d}".encode()
    end.sendall(order + bytes(max(up - len(order), 0)))
    _read(end, down)


def _answer_probes(listener: socket.socket) -> None:
    while True:
        end, _ = listener.accept()
        with end:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while order := _read(end, _ORDER_BYTES):
                up, down = int(order[:8]), int(order[8:])
                _read(end, max(up - _ORDER_BYTES, 0))
                end.sendall(bytes(down))


def _read(end: socket.socket, nbytes: int) -> bytes:
    """Return so many bytes, nothing if the other side has ended."""
    read = bytearray()
    while len(read) < nbytes:
        data = end.recv(min(nbytes - len(read), 1 << 16))
        if not data:
            return b""
        read += data
    return bytes(read)


async def _serve(relay: Relay) -> None:
    await relay.open()
    print(json.dumps({"ports": relay.ports}), flush=True)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        told = {"up": relay.up.passed_bytes, "down": relay.down.passed_bytes}
        print(json.dumps(told), flush=True)


def main() -> None:
    """Be a relay until standard input ends."""
    # A link's hardware waits for nobody's turn.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    asyncio.run(_serve(Relay(**json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
