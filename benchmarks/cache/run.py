"""What does a run upload after its first epoch if rows are sent once, and is it the same run?"""

from __future__ import annotations

import contextlib
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

from benchmarks.bytes.run import CountingProxy  # noqa: E402
from benchmarks.common import (  # noqa: E402
    Result,
    make_certificates,
    make_workload,
    median,
    parser_of,
    scratch,
    settings_of,
)
from benchmarks.processes import Child, Server, start_worker  # noqa: E402

FROZEN = ["trunk", "top"]


class Contestant:
    """A client behind a counting proxy, and what each of its steps took."""

    def __init__(self, client: Child, proxy: CountingProxy) -> None:
        self.client, self.proxy = client, proxy
        self.steps: list[dict[str, Any]] = []

    def step(self) -> None:
        """Do one step and write down its bytes."""
        up, down = self.proxy.up_bytes, self.proxy.down_bytes
        told = self.client.ask("step")
        told |= {"up": self.proxy.up_bytes - up, "down": self.proxy.down_bytes - down}
        self.steps.append(told)

    def over(self, steps: slice, what: str) -> list[float]:
        """Return one figure of some steps."""
        return [float(step[what]) for step in self.steps[steps]]


def main() -> None:
    """Train the same epochs with and without sending rows once, step by step in turn."""
    parser = parser_of(__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batches", type=int, default=4, help="of an epoch")
    parser.add_argument("--chunks", type=int, default=4)
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        workload = make_workload(args, folder, batches=args.batches)
        settings = settings_of(
            workload,
            args,
            epochs=args.epochs,
            batches=args.batches,
            chunks=args.chunks,
            trained=FROZEN,
            codec="raw",
            cut=[2, workload.num_layers - 2],
            counted="payload of the TCP socket, TLS records included; two processes on loopback",
        )
        certificates = make_certificates(folder / "certs")
        server = stack.enter_context(
            Server(workload, certificates, folder, passive=True, send_once_ttl_s=3600)
        )
        runs = {}
        for name, once in (("plain", False), ("once", True)):
            proxy = stack.enter_context(contextlib.closing(CountingProxy(server.port)))
            client = start_worker(
                "split",
                workload,
                port=proxy.port,
                certificates=certificates,
                passive=True,
                bottom_layers=2,
                top_layers=2,
                chunks=args.chunks,
                train=FROZEN,
                send_once=once,
                shuffled=True,
            )
            runs[name] = Contestant(stack.enter_context(client), proxy)
        first = {}
        for number in range(args.epochs * args.batches):
            for run in runs.values():
                run.step()
            if number == args.batches - 1:
                first = runs["once"].client.ask("rows")
        figures = figures_of(runs["plain"], runs["once"], first, workload.rows, args.batches)
    Result(figures, settings).write(args, HOME)


def figures_of(
    plain: Contestant, once: Contestant, first: dict[str, Any], rows: int, batches: int
) -> dict[str, float]:
    """Return the figures.

    Args:
        plain: The run that sends activations in each epoch.
        once: The one that does not.
        first: What the latter had sent when its first epoch was over.
        rows: Rows of a batch.
        batches: Batches of an epoch.
    """
    last = once.client.ask("rows")
    early, late = slice(1, batches), slice(batches, None)  # the first step names the parameters
    losses = zip(plain.over(slice(None), "loss"), once.over(slice(None), "loss"), strict=True)
    return {
        "later_epoch_upload": float(last["sent_bytes"] - first["sent_bytes"]),
        "gradient_down": float(last["gradient_bytes"]),
        "reference_bytes_per_row": float(last["bytes_per_name"]),
        "rows_sent": float(last["sent"]),
        "rows_named": float(last["named"]),
        "epoch_1_upload_of_rows": float(first["sent_bytes"]),
        "socket_up_per_step_plain": median(plain.over(late, "up")),
        "socket_up_per_step_first_epoch": median(once.over(early, "up")),
        "socket_up_per_step_later": median(once.over(late, "up")),
        "socket_up_later_over_plain": median(once.over(late, "up"))
        / median(plain.over(late, "up")),
        "socket_down_later_over_plain": median(once.over(late, "down"))
        / median(plain.over(late, "down")),
        "step_later_over_first": median(once.over(late, "seconds"))
        / median(once.over(early, "seconds")),
        "step_first_over_plain": median(once.over(early, "seconds"))
        / median(plain.over(early, "seconds")),
        "step_later_over_plain": median(once.over(late, "seconds"))
        / median(plain.over(late, "seconds")),
        "client_cpu_later_over_plain": median(once.over(late, "cpu_s"))
        / median(plain.over(late, "cpu_s")),
        "loss_largest_difference": max(abs(a - b) for a, b in losses),
    }


if __name__ == "__main__":
    main()
