"""What does the wire cost: CPU over plain sockets, bytes over payload, a long link's width?"""

from __future__ import annotations

import json
import os
import socket
import ssl
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

from benchmarks.common import (  # noqa: E402
    Certificates,
    Result,
    Workload,
    make_certificates,
    make_workload,
    median,
    parser_of,
    plain_settings,
    scratch,
)
from benchmarks.processes import Child, Server, cpu_seconds, start_worker  # noqa: E402
from benchmarks.relay import Link  # noqa: E402

SIZES = {"64KiB": 1 << 16, "1MiB": 1 << 20, "16MiB": 16 << 20}
WIDE = {"100mbit_50ms": (100.0, 50.0), "400mbit_50ms": (400.0, 50.0)}
_PIECE = 1 << 18


# ---------------------------------------------------------------------- plain sockets with TLS


def _context(spec: dict[str, str], *, is_server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    side = "server" if is_server else "client"
    folder = Path(spec["folder"])
    context.load_cert_chain(folder / f"{side}.pem", folder / f"{side}.key")
    context.load_verify_locations(spec["ca"])
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def serve_echoes(spec: dict[str, str]) -> None:
    """Send back what comes, message by message; the size of each stands before it."""
    context = _context(spec, is_server=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        end, _ = listener.accept()
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(end, server_side=True) as secured:
            while told := secured.recv(8):
                size = int.from_bytes(told, "little")
                body = bytearray(size)
                _fill(secured, body)
                _send(secured, body)


def _fill(end: ssl.SSLSocket, body: bytearray) -> None:
    view, filled = memoryview(body), 0
    while filled < len(body):
        read = end.recv_into(view[filled : filled + _PIECE])
        if not read:
            sys.exit("the other side has gone")
        filled += read


def _send(end: ssl.SSLSocket, body: bytearray) -> None:
    view = memoryview(body)
    for at in range(0, len(body), _PIECE):
        end.sendall(view[at : at + _PIECE])


class Sockets:
    """Echoes over TCP and TLS of Python's own modules, `recv_into` and no copies."""

    def __init__(self, stack: ExitStack, certificates: Certificates) -> None:
        spec = {"folder": certificates.folder, "ca": certificates.ca}
        self._child = stack.enter_context(Child("benchmarks.transport.run", spec, threads=1))
        self.pid = self._child.pid
        context = _context(spec, is_server=False)
        raw = socket.create_connection(("127.0.0.1", self._child.hello["port"]))
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._end = stack.enter_context(context.wrap_socket(raw, server_hostname="localhost"))

    def echo(self, size: int) -> None:
        """Send so many bytes and wait for them."""
        body = bytearray(size)
        self._end.sendall(size.to_bytes(8, "little"))
        _send(self._end, body)
        _fill(self._end, body)


# ---------------------------------------------------------------------- ours


class Ours:
    """Echoes through the product's own connection, to its own server."""

    def __init__(
        self, stack: ExitStack, workload: Workload, certificates: Certificates, port: int, pid: int
    ) -> None:
        import cutlayer

        self.pid = pid
        self.model = cutlayer.connect(
            workload.model,
            server=f"127.0.0.1:{port}",
            ca=certificates.ca,
            cert=certificates.cert,
            key=certificates.key,
            bottom_layers=2,
            top_layers=2,
        )
        stack.callback(self.model.close)

    def echo(self, size: int) -> None:
        """Send so many bytes and wait for them."""
        import torch

        from cutlayer.wire import cutlayer_pb2 as pb

        payload = torch.zeros(size, dtype=torch.uint8)
        self.model.connection.request(pb.Head(echo=pb.Echo()), {"payload": payload}).wait()


def measured(end: Any, size: int, total: int) -> dict[str, float]:
    """Echo `total` bytes by `size`; return CPU seconds of both ends a GB, and a trip's seconds."""
    end.echo(size)
    count = max(total // size, 3)
    before_s = cpu_seconds() + cpu_seconds(end.pid)
    trips = []
    for _ in range(count):
        started_s = time.perf_counter()
        end.echo(size)
        trips.append(time.perf_counter() - started_s)
    cpu_s = cpu_seconds() + cpu_seconds(end.pid) - before_s
    return {"cpu_s_per_gb": cpu_s / (2 * size * count / 1e9), "trip_s": median(trips)}


def cost(stack: ExitStack, ours: Ours, certificates: Certificates, args: Any) -> dict[str, float]:
    """Take turns with plain sockets; return the figures of G7."""
    sockets = Sockets(stack, certificates)
    rounds, total = (1, 4 << 20) if args.quick else (args.rounds, 512 << 20)
    figures: dict[str, float] = {}
    for size_name, size in SIZES.items():
        found: dict[str, list[dict[str, float]]] = {"ours": [], "tcp_tls": []}
        for _ in range(rounds):
            for name, end in (("ours", ours), ("tcp_tls", sockets)):
                found[name].append(measured(end, size, total))
        for name, of_rounds in found.items():
            for what in ("cpu_s_per_gb", "trip_s"):
                value = median([each[what] for each in of_rounds])
                figures[f"{what}_{name}_{size_name}"] = value
        for what in ("cpu_s_per_gb", "trip_s"):
            ratio = figures[f"{what}_ours_{size_name}"] / max(
                figures[f"{what}_tcp_tls_{size_name}"], 1e-9
            )
            figures[f"transport.{what}_over_tcp_tls_{size_name}"] = ratio
    return figures


def width(
    stack: ExitStack, workload: Workload, certificates: Certificates, server: Server, args: Any
) -> dict[str, float]:
    """Return which share of a long link's bandwidth a message of a step's size gets."""
    figures: dict[str, float] = {}
    for name, (mbit_s, rtt_ms) in WIDE.items():
        link = stack.enter_context(Link([server.port], mbit_s=mbit_s, rtt_ms=rtt_ms))
        if not args.quick:
            link.probed()
        ours = Ours(stack, workload, certificates, link.ports[0], server.pid)
        size = (1 << 20) if args.quick else (8 << 20)
        trips = []
        for _ in range(2 if args.quick else 6):
            started_s = time.perf_counter()
            ours.echo(size)
            trips.append(time.perf_counter() - started_s)
        ideal_s = 2 * 8 * size / (mbit_s * 1e6) + rtt_ms / 1e3
        figures[f"transport.first_message_share_{name}"] = ideal_s / trips[0]
        figures[f"transport.later_message_share_{name}"] = ideal_s / median(trips[1:])
    return figures


def overhead(
    stack: ExitStack, workload: Workload, certificates: Certificates, server: Server, args: Any
) -> dict[str, float]:
    """Return the bytes on the socket over those of tensors, for the steps of a training run."""
    figures: dict[str, float] = {}
    link = stack.enter_context(Link([server.port]))
    for codec in args.codecs:
        client = stack.enter_context(
            start_worker(
                "split",
                workload,
                port=link.ports[0],
                certificates=certificates,
                bottom_layers=2,
                top_layers=2,
                train=("trunk", "top"),
                codec=codec,
                chunks=workload.rows,
            )
        )
        client.ask("run", warm=1, steps=1)
        before = link.passed_bytes()
        payload = client.ask("payload", steps=2)["payload_bytes"]
        after = link.passed_bytes()
        wire = sum(after[way] - before[way] for way in ("up", "down"))
        figures[f"wire_over_payload_{codec}"] = wire / payload
        figures[f"payload_bytes_of_a_message_{codec}"] = payload / (2 * 3 * workload.rows)
    figures["bytes.wire_over_payload"] = figures[f"wire_over_payload_{args.codecs[0]}"]
    return figures


def main() -> None:
    """Measure the three on one server."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each transport")
    parser.add_argument("--codecs", nargs="+", default=["raw", "bf16"], help="to count bytes of")
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        workload = make_workload(args, folder, rows=4, columns=256)
        certificates = make_certificates(folder / "certs")
        server = stack.enter_context(Server(workload, certificates, folder))
        settings = plain_settings(args, model=workload.name, sizes=list(SIZES))
        settings["load_average"] = [round(load, 2) for load in os.getloadavg()]
        ours = Ours(stack, workload, certificates, server.port, server.pid)
        figures = cost(stack, ours, certificates, args)
        figures |= width(stack, workload, certificates, server, args)
        figures |= overhead(stack, workload, certificates, server, args)
    Result(figures, settings).write(args, HOME)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        serve_echoes(json.loads(sys.argv[1]))
    else:
        main()
