"""How many bytes cross the wire for each token of a training step, beyond the tensors' own?"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

from benchmarks.common import (  # noqa: E402
    Certificates,
    Result,
    Workload,
    make_certificates,
    make_workload,
    parser_of,
    scratch,
    settings_of,
)
from benchmarks.processes import (  # noqa: E402
    Server,
    start_worker,
)

BYTES_PER_VALUE = {"raw": 4, "bf16": 2}
_READ_BYTES = 1 << 18


class CountingProxy:
    """Pass TCP connections on to a port and count what passes, in each direction."""

    def __init__(self, port: int) -> None:
        self.up_bytes = 0
        self.down_bytes = 0
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _address = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            for source, sink, up in ((client, server, True), (server, client, False)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pass, args=(source, sink, up), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_READ_BYTES):
                if up:
                    self.up_bytes += len(data)
                else:
                    self.down_bytes += len(data)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Accept no more."""
        self._listener.close()


def measure(
    workload: Workload,
    certificates: Certificates,
    server: Server,
    codec: str,
    chunks: int,
    steps: int,
) -> tuple[float, float]:
    """Return the bytes up and down per token of a step, over `steps` steps after the first."""
    with contextlib.closing(CountingProxy(server.port)) as proxy:
        client = start_worker(
            "split",
            workload,
            port=proxy.port,
            certificates=certificates,
            bottom_layers=2,
            top_layers=2,
            codec=codec,
            chunks=chunks,
        )
        with client:
            client.ask("step")  # names parameters for the trunk's optimizer, once a run
            up, down = proxy.up_bytes, proxy.down_bytes
            for _ in range(steps):
                client.ask("step")
            tokens = steps * workload.rows * workload.columns
            return (proxy.up_bytes - up) / tokens, (proxy.down_bytes - down) / tokens


def main() -> None:
    """Measure each codec, in one piece and in chunks, and batches from large to small."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=3, help="steps that are counted")
    args = parser.parse_args()
    figures: dict[str, float] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        workload = make_workload(args, folder)
        settings = settings_of(workload, args, steps=args.steps)
        certificates = make_certificates(folder / "certs")
        server = stack.enter_context(Server(workload, certificates, folder))
        (folder / "small").mkdir()
        small = make_workload(args, folder / "small", rows=1, columns=64)
        runs = [
            ("raw", 1, workload, ""),
            ("bf16", 1, workload, ""),
            ("raw", 4, workload, "_chunks_4"),
            ("raw", 1, small, f"_batch_{small.rows}x{small.columns}"),
            ("bf16", 1, small, f"_batch_{small.rows}x{small.columns}"),
        ]
        for codec, chunks, work, suffix in runs:
            up, down = measure(work, certificates, server, codec, chunks, args.steps)
            tensor = 4 * work.width * BYTES_PER_VALUE[codec]
            figures[f"wire_over_tensor_{codec}{suffix}"] = (up + down) / tensor
            figures[f"bytes_per_token_up_{codec}{suffix}"] = up
            figures[f"bytes_per_token_down_{codec}{suffix}"] = down
    worst = max(figures["wire_over_tensor_raw"], figures["wire_over_tensor_bf16"])
    settings |= {
        "wire_over_tensor_is_of": "the worse of raw (4 bytes a value) and bf16 (2), in one piece",
        "counted": "payload of the TCP socket in both directions, TLS records included",
    }
    Result({"wire_over_tensor": worst, **figures}, settings).write(args, HOME)


if __name__ == "__main__":
    main()
