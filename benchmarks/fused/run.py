"""What do small forwards of several tenants gain by company, and what does a far link cost many?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

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
    scratch,
    settings_of,
)
from benchmarks.processes import Server  # noqa: E402
from benchmarks.relay import Link  # noqa: E402
from benchmarks.tenants.run import Tenant, Window, work_together  # noqa: E402
from benchmarks.turns import SERVER_CORE  # noqa: E402

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LINK = {"mbit_s": 20.0, "rtt_ms": 50.0}


@dataclass
class Contestant:
    """Some tenants of one server, who work at the same time."""

    server: Server
    tenants: Sequence[Tenant]
    windows: list[Window] = field(default_factory=list)
    steps: dict[int, int] = field(default_factory=dict)

    def work(self, seconds: float) -> Window:
        """Let them work."""
        window = work_together(self.server, self.tenants, seconds, self.steps)
        self.windows.append(window)
        return window

    def of(self, what: Callable[[Window], float]) -> float:
        """Return a figure's median over the windows, the first left out if there are more."""
        return median([what(window) for window in self.windows[1:] or self.windows])


class Field:
    """Servers and those who call them."""

    def __init__(self, stack: ExitStack, work: Workload, certs: Certificates, folder: Path) -> None:
        self._stack, self._work, self._certs, self._folder = stack, work, certs, folder

    def server(self, name: str, **flags: Any) -> Server:
        """Start one; it shares the cores with others, so its threads do not spin."""
        folder = self._folder / name
        folder.mkdir()
        return self._stack.enter_context(
            Server(self._work, self._certs, folder, passive=True, **flags)
        )

    def tenant(
        self, name: str, at: Any, dtype: torch.dtype, *, rows: int = 1, in_flight: int = 2
    ) -> Tenant:
        """Connect somebody."""
        tenant = Tenant.of(name, at, self._certs, self._work)
        self._stack.callback(tenant.connection.close)
        generator = torch.Generator().manual_seed(len(name))
        shape = (rows, self._work.columns, self._work.width)
        tenant.smashed_BTD = torch.randn(shape, generator=generator).to(dtype)
        tenant.in_flight = in_flight
        return tenant


def fused(
    field_: Field, dtype: str, *, tenants: int, tokens: int, rounds: int, seconds: float
) -> dict[str, float]:
    """Compare tenants together, one after another, and one adapter on the same tokens."""
    of_type = DTYPES[dtype]
    flags = {"dtype": dtype, "threads": 2}
    alone = field_.server(f"alone-{dtype}", **flags)
    together = field_.server(f"together-{dtype}", fuse_tokens=tokens, **flags)
    names = [f"{dtype}-{i}" for i in range(tenants)]
    found = {
        "together": Contestant(together, [field_.tenant(n, together, of_type) for n in names]),
        "in_turn": Contestant(alone, [field_.tenant(n, alone, of_type) for n in names]),
        "one": Contestant(alone, [field_.tenant(f"{dtype}-one", alone, of_type, rows=tenants)]),
    }
    for number in range(rounds + 1):  # the first allocates, and finds who keeps company
        for name, contestant in found.items():
            window = contestant.work(seconds if number else seconds / 2)
            print(
                f"{dtype} round {number} {name:10s} {window.tokens_per_s:8.1f} tokens/s", flush=True
            )
    rates = {name: each.of(lambda window: window.tokens_per_s) for name, each in found.items()}
    cpu = {
        name: each.of(lambda window: window.server_cpu_s_per_token) for name, each in found.items()
    }
    return {
        f"fused_{tenants}x{tokens}_{dtype}": rates["together"] / rates["in_turn"],
        f"fused_{tenants}x{tokens}_{dtype}_of_one_adapter": rates["together"] / rates["one"],
        f"fused_{tenants}x{tokens}_{dtype}_cpu_ratio": cpu["together"] / cpu["in_turn"],
        **{f"tokens_per_s_{name}_{dtype}": rate for name, rate in rates.items()},
    }


def over_links(
    field_: Field, stack: ExitStack, *, tenants: int, rounds: int, seconds: float, quick: bool
) -> dict[str, float]:
    """Compare tenants behind a link each with what the trunk or the links allow at most."""
    server = field_.server("far", threads=1, cores=() if quick else (SERVER_CORE,))
    links = [stack.enter_context(Link([server.port], **LINK)) for _ in range(tenants)]
    figures = {}
    if not quick:
        probes = [link.probed() for link in links]
        figures = {f"link_{k}": median([p[k] for p in probes]) for k in probes[0]}
    at = [Port(link.ports[0]) for link in links]
    far = [field_.tenant(f"far-{i}", port, torch.float32, in_flight=1) for i, port in enumerate(at)]
    one, all_of_them = Contestant(server, far[:1]), Contestant(server, far)
    one.steps = all_of_them.steps  # the first tenant is of both
    for number in range(rounds + 1):
        for name, contestant in (("one", one), ("all", all_of_them)):
            window = contestant.work(seconds if number else seconds / 2)
            print(
                f"links round {number} {name:10s} {window.tokens_per_s:8.1f} tokens/s", flush=True
            )
    tokens_per_s = one.of(lambda window: window.tokens_per_s)
    trunk_s_per_token = one.of(lambda window: window.trunk_s_per_token)
    limit = min(tenants, 1 / (tokens_per_s * trunk_s_per_token))
    gain = all_of_them.of(lambda window: window.tokens_per_s) / tokens_per_s
    return figures | {
        f"wan_{tenants}_gain": gain,
        f"wan_{tenants}_limit": limit,
        f"wan_{tenants}_over_limit": gain / limit,
    }


@dataclass(frozen=True)
class Port:
    """Where a tenant finds its server."""

    port: int


def main() -> None:
    """Measure company in two dtypes, and then links."""
    parser = parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="of one window")
    parser.add_argument("--rounds", type=int, default=3, help="counted turns of each contestant")
    parser.add_argument("--tenants", type=int, default=8, help="who are fused")
    parser.add_argument("--tokens", type=int, default=32, help="of each one's forward")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        args.seconds, args.rounds, args.tenants, args.tokens = 0.4, 1, 3, 16
    turns = {"rounds": args.rounds, "seconds": args.seconds}
    figures: dict[str, float] = {}
    with scratch() as folder:
        certs = make_certificates(folder / "certs")
        work = make_workload(args, folder, rows=1, columns=args.tokens)
        for dtype in ("float32",) if args.quick else DTYPES:
            with ExitStack() as stack:
                field_ = Field(stack, work, certs, folder)
                company = {"tenants": args.tenants, "tokens": args.tokens}
                figures |= fused(field_, dtype, **company, **turns)
        settings = settings_of(
            work,
            args,
            **turns,
            dtype="float32 and bfloat16; float32 behind links",
            threads="2 of a server that fuses or not, 1 of the one behind links",
            link=LINK,
            in_flight="2, and 1 behind links",
            far_tokens=2 * args.tokens,
        )
        with ExitStack() as stack:
            (folder / "far-tokens").mkdir()
            work = make_workload(args, folder / "far-tokens", rows=1, columns=2 * args.tokens)
            field_ = Field(stack, work, certs, folder)
            count = 2 if args.quick else 4
            figures |= over_links(field_, stack, tenants=count, quick=args.quick, **turns)
    named = {
        "tenants.fused_8x32": "fused_8x32_bfloat16",
        "tenants.fused_8x32_of_one_adapter": "fused_8x32_bfloat16_of_one_adapter",
        "tenants.wan_4_over_limit": "wan_4_over_limit",
    }
    figures |= {name: figures[mine] for name, mine in named.items() if mine in figures}
    Result(figures, settings).write(args, HOME)


if __name__ == "__main__":
    main()
