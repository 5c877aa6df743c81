"""What do many tenants on one trunk cost each other?"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

from benchmarks.common import (  # noqa: E402
    MIB,
    Certificates,
    Result,
    Workload,
    make_certificates,
    make_workload,
    median,
    parser_of,
    scratch,
    settings_of,
)
from benchmarks.processes import Server, cpu_seconds, memory_bytes  # noqa: E402
from cutlayer.cli.certs import issue  # noqa: E402
from cutlayer.client.address import Address  # noqa: E402
from cutlayer.client.connection import Connection  # noqa: E402
from cutlayer.client.handshake import spec_of  # noqa: E402
from cutlayer.client.link import TrunkLink  # noqa: E402
from cutlayer.client.remote_trunk import Question  # noqa: E402
from cutlayer.split.adapters import plan_adapter  # noqa: E402
from cutlayer.split.cut import Cut  # noqa: E402
from cutlayer.split.loading import open_checkpoint, skeleton_of  # noqa: E402
from cutlayer.wire import cutlayer_pb2 as pb  # noqa: E402

IN_FLIGHT = 2
GREEDY = 10


@dataclass
class Tenant:
    """A client that is nothing but its side of the wire: it sends as fast as it is answered."""

    connection: Connection
    smashed_BTD: torch.Tensor
    in_flight: int = IN_FLIGHT
    done_tokens: int = 0
    waits_s: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, server: Server, certs: Certificates, work: Workload) -> Tenant:
        """Connect under a certificate of its own and open a run."""
        from peft import LoraConfig

        issue(Path(certs.folder), name, again=True)
        address = Address(
            f"127.0.0.1:{server.port}",
            Path(certs.ca),
            Path(certs.folder) / f"{name}.pem",
            Path(certs.folder) / f"{name}.key",
        )
        connection = Connection(address, connect_timeout_s=60.0)
        skeleton = skeleton_of(open_checkpoint(work.model).config, "causal-lm")
        lora = LoraConfig(
            r=work.rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        agreement = connection.offer.agreement
        cut = Cut(agreement.lower, agreement.upper)
        plan = plan_adapter(skeleton, lora, cut, train=("trunk",), seed=0)
        asked = pb.OpenSessionRequest(
            agreement=agreement, lora=spec_of(plan), run="tenants", codecs={}
        )
        connection.open(asked)
        generator = torch.Generator().manual_seed(len(name))
        shape = (1, work.columns, work.width)
        return cls(connection, torch.randn(shape, generator=generator))

    def step(self, number: int) -> None:
        """Forward and backward of each micro-chunk, and an optimizer step."""
        link, queued_s = TrunkLink(self.connection), self.connection.traffic.queued_s
        question = Question(training=True, keep_graph=True, wants_gradient=True)
        on_way = [link.forward(self.smashed_BTD, question) for _ in range(self.in_flight)]
        answers = []
        for forward, output in on_way:
            out_BTD = output.wait()
            assert out_BTD is not None
            answers.append(link.backward(forward, out_BTD * 1e-4))
        for answer in answers:
            answer.wait()
        group = pb.ParamGroup(
            numbers={"lr": 1e-4, "weight_decay": 0.0, "eps": 1e-8},
            betas=(0.9, 0.999),
            names=list(self.connection.parameters) if number == 1 else [],
        )
        step = pb.OptimStep(step=number, optimizer="AdamW", groups=[group], clip_factor=1.0)
        self.connection.request(pb.Head(optim_step=step)).wait()
        rows, tokens, _ = self.smashed_BTD.shape
        self.done_tokens += self.in_flight * rows * tokens
        requests = 2 * self.in_flight + 1
        self.waits_s.append((self.connection.traffic.queued_s - queued_s) / requests)


@dataclass
class Window:
    """What some tenants did in a stretch of time, and what it took of the server's cores."""

    tokens_per_s: float
    server_cpu_s_per_token: float
    trunk_s_per_token: float
    trunk_s: list[float]
    waits_s: list[float]


def work_together(
    server: Server, tenants: Sequence[Tenant], seconds: float, steps: dict[int, int]
) -> Window:
    """Let tenants work at the same time; count what was finished in between."""
    until_s = time.monotonic() + seconds
    before = [(t.done_tokens, t.connection.traffic.trunk_s, len(t.waits_s)) for t in tenants]
    cpu_s = cpu_seconds(server.pid)

    def work(index: int) -> None:
        tenant = tenants[index]
        while time.monotonic() < until_s:
            steps[id(tenant)] = steps.get(id(tenant), 0) + 1
            tenant.step(steps[id(tenant)])

    started_s = time.monotonic()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(tenants))]
    for thread in threads:
        thread.start()
    time.sleep(max(until_s - time.monotonic(), 0.0))
    # While all are still busy, in whatever step.
    busy = [t.connection.traffic.trunk_s - b[1] for t, b in zip(tenants, before, strict=True)]
    for thread in threads:
        thread.join()
    took_s, cpu_s = time.monotonic() - started_s, cpu_seconds(server.pid) - cpu_s
    tokens = sum(t.done_tokens - b[0] for t, b in zip(tenants, before, strict=True))
    waits = [w for t, b in zip(tenants, before, strict=True) for w in t.waits_s[b[2] :]]
    trunk_s = sum(t.connection.traffic.trunk_s - b[1] for t, b in zip(tenants, before, strict=True))
    return Window(tokens / took_s, cpu_s / tokens, trunk_s / tokens, busy, waits)


def jain(shares: Sequence[float]) -> float:
    """Return Jain's fairness index: 1 if all have the same, 1/n if one has all."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares))


def quantile(values: Sequence[float], at: float) -> float:
    """Return a quantile."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(at))


def measure(
    work: Workload, certs: Certificates, folder: Path, counts: Sequence[int], seconds: float
) -> dict[str, Any]:
    """Serve one model to more and more tenants."""
    figures: dict[str, Any] = {}
    steps: dict[int, int] = {}
    with Server(work, certs, folder, passive=True) as server:
        tenants: list[Tenant] = []
        ratios = []
        for count in counts:
            tenants += [
                Tenant.of(f"tenant-{i}", server, certs, work) for i in range(len(tenants), count)
            ]
            for tenant in tenants:  # the first step allocates
                steps[id(tenant)] = steps.get(id(tenant), 0) + 1
                tenant.step(steps[id(tenant)])
            resident = memory_bytes(server.pid)["rss"] / MIB
            # One, many, one: what the machine does meanwhile weighs on both.
            windows = [
                work_together(server, tenants[:n], seconds * (1 if n == 1 else 2), steps)
                for n in (1, count, 1)
            ]
            alone = median([windows[0].tokens_per_s, windows[2].tokens_per_s])
            ratio = windows[1].tokens_per_s / alone
            ratios += [ratio] if count > 1 else []  # of one to itself it says how steady we are
            cpu_alone = median(
                [windows[0].server_cpu_s_per_token, windows[2].server_cpu_s_per_token]
            )
            figures |= {
                f"aggregate_ratio_{count}": ratio,
                f"server_cpu_ratio_{count}": windows[1].server_cpu_s_per_token / cpu_alone,
                f"queue_wait_p50_s_{count}": quantile(windows[1].waits_s, 0.5),
                f"queue_wait_p99_s_{count}": quantile(windows[1].waits_s, 0.99),
                f"server_rss_mib_{count}": resident,
            }
            print(figures, file=sys.stderr)
        figures["aggregate_ratio_worst"] = min(ratios)
        grown = figures[f"server_rss_mib_{counts[-1]}"] - figures[f"server_rss_mib_{counts[0]}"]
        figures["mib_per_tenant"] = grown / (counts[-1] - counts[0])
        few = tenants[: min(8, counts[-1])]
        few[0].in_flight = GREEDY * IN_FLIGHT
        greedy = work_together(server, few, 6 * seconds, steps)
        figures["jain"] = jain(greedy.trunk_s)
        figures["greedy_share_over_fair"] = greedy.trunk_s[0] * len(few) / sum(greedy.trunk_s)
        for tenant in tenants:
            tenant.connection.close()
    return figures


def main() -> None:
    """Measure a real trunk and a tiny one."""
    parser = parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one window")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    args = parser.parse_args()
    quick = args.quick
    torch.set_num_threads(1)
    counts = [1, 2, 4] if quick else args.counts
    seconds = 1.0 if quick else args.seconds
    with scratch() as folder:
        certs = make_certificates(folder / "certs")
        args.quick = True
        (folder / "tiny").mkdir()
        tiny = make_workload(args, folder / "tiny")
        figures = {f"tiny_{k}": v for k, v in measure(tiny, certs, folder, counts, seconds).items()}
        args.quick, work = quick, tiny
        if not quick:
            work = make_workload(args, folder, rows=1, columns=64)
            figures |= measure(work, certs, folder, counts, seconds)
        else:
            figures |= {k.removeprefix("tiny_"): v for k, v in figures.items()}
        greedy = f"{GREEDY} times as many micro-chunks in flight as the others"
        settings = settings_of(
            work, args, counts=list(counts), seconds=seconds, in_flight=IN_FLIGHT, greedy=greedy
        )
    Result(figures, settings).write(args, HOME)


if __name__ == "__main__":
    main()
