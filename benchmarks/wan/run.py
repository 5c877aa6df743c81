"""How long is a training step over the link that a clinic has?"""

from __future__ import annotations

import re
import sys
from contextlib import ExitStack
from dataclasses import asdict
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
    parser_of,
    scratch,
    settings_of,
)
from benchmarks.processes import Child, Server, start_worker  # noqa: E402
from benchmarks.relay import Link  # noqa: E402
from benchmarks.turns import CLIENT_CORE, SERVER_CORE, Contestant, take_turns  # noqa: E402
from benchmarks.wan.peers import SPLITLORA_LAYERS  # noqa: E402

LINKS = {"loopback": (0.0, 0.0), "20mbit_50ms": (20.0, 50.0), "100mbit_50ms": (100.0, 50.0)}
PEERS_LINK = "20mbit_50ms"


class Field:
    """Everybody who takes part: one unsplit model, one server a cut, a client a link."""

    def __init__(self, stack: ExitStack, workload: Workload, folder: Path, args: Any) -> None:
        self._stack, self._workload, self._folder = stack, workload, folder
        self._chunks, self._codec, self._quick = args.chunks, args.codec, args.quick
        self._lean_head, self._send_once = args.lean_head, args.send_once
        self.lora = lora_of(args.frozen)
        self.found: dict[str, Contestant] = {}
        self.links: dict[str, dict[str, float]] = {}
        self._certificates: Certificates = make_certificates(folder / "certs")
        # A client may have a cut within the server's, so one server does for all cuts.
        self._server = stack.enter_context(
            Server(
                workload,
                self._certificates,
                folder,
                cores=(SERVER_CORE,),
                send_once_ttl_s=3600,
            )
        )

    def unsplit(self) -> None:
        """Add peft on the unsplit model, with one thread on one core and with two on both."""
        for threads, cores in ((2, (0, 1)), (1, (CLIENT_CORE,))):
            worker = self._stack.enter_context(
                start_worker(
                    "unsplit",
                    self._workload,
                    threads=threads,
                    passive=self._quick,  # two threads that spin do not end on a busy machine
                    cores=cores,
                    lora=self.lora,
                )
            )
            self.found[f"unsplit_{threads}"] = Contestant(worker)

    def split(self, cut: tuple[int, int], links: list[str]) -> None:
        """Add a client with this cut behind each link."""
        name = f"{cut[0]}+{cut[1]}" + ("_send_once" if self._send_once else "")
        for link_name in links:
            link = self._link(link_name, self._server.port)
            client = self._stack.enter_context(
                start_worker(
                    "split",
                    self._workload,
                    port=link.ports[0],
                    certificates=self._certificates,
                    cores=(CLIENT_CORE,),
                    bottom_layers=cut[0],
                    top_layers=cut[1],
                    train=("trunk", "top"),
                    lora=self.lora,
                    codec=self._codec,
                    lean_head=self._lean_head,
                    send_once=self._send_once,
                    chunks=self._chunks,
                )
            )
            self.found[f"{name}_{link_name}"] = Contestant(client, {}, self._server, link)

    def peer(self, kind: str, cut: tuple[int, int]) -> None:
        """Add a peer, whose client and server have one core each, behind its link."""
        layers = self._workload.num_layers
        lower, upper = (
            (cut[0], layers - cut[1]) if kind == "sequential" else (SPLITLORA_LAYERS, layers)
        )
        spec = {
            "kind": kind,
            "workload": asdict(self._workload),
            "lora": self.lora,
            "lower": lower,
            "upper": upper,
            "threads": 1,
        }
        module = "benchmarks.wan.peers"
        server = self._stack.enter_context(
            Child(module, {**spec, "side": "server"}, threads=1, cores=(SERVER_CORE,))
        )
        link = self._link(PEERS_LINK, server.hello["port"])
        client = self._stack.enter_context(
            Child(
                module,
                {**spec, "side": "client", "port": link.ports[0]},
                threads=1,
                cores=(CLIENT_CORE,),
            )
        )
        self.found[f"{kind}_{PEERS_LINK}"] = Contestant(client, {}, server, link)

    def _link(self, name: str, port: int) -> Link:
        mbit_s, rtt_ms = LINKS[name]
        link = self._stack.enter_context(Link([port], mbit_s=mbit_s, rtt_ms=rtt_ms))
        self.links[name] = link.probed()
        return link


def lora_of(frozen: int) -> dict[str, Any]:
    """Return a LoRA on all linear modules of all layers but the first ones."""
    without = "|".join(map(str, range(frozen)))
    return {"target_modules": "all-linear", "exclude_modules": rf".*\.layers\.({without})\..*"}


def figures_of(found: dict[str, Contestant]) -> dict[str, float]:
    """Return the figures, by name."""
    two, one = found["unsplit_2"], found["unsplit_1"]
    two_s, one_s = two.of("seconds"), one.of("seconds")
    e2 = one_s / (2 * two_s)
    figures = {"unsplit_two_thread_efficiency": e2}
    for name, contestant in found.items():
        figures[f"seconds_{name}"] = contestant.of("seconds")
        if contestant.server is None:
            continue
        parts = contestant.parts()
        figures |= {f"{part}_{name}": value for part, value in parts.items() if part != "T"}
        figures[f"ratio_{name}"] = parts["T"] / two_s
        figures[f"cpu_ratio_{name}"] = contestant.of("cpu_s") / one.of("cpu_s")
        share = max(parts["C"], parts["S"]) / (parts["C"] + parts["S"])
        figures[f"over_floor_{name}"] = figures[f"ratio_{name}"] / (2 * share * e2)
    return figures


def named(figures: dict[str, float], balanced: str, rtt_s: float) -> dict[str, float]:
    """Return the figures that have goals, of a run over all links."""
    found: dict[str, float] = {}
    home = f"{balanced}_loopback"
    if f"ratio_{home}" in figures:
        over = [v for n, v in figures.items() if re.match(r"over_floor_.*_loopback$", n)]
        found |= {
            "step_overhead.balanced_ratio": figures[f"ratio_{home}"],
            "step_overhead.balanced_floor": figures[f"ratio_{home}"]
            / figures[f"over_floor_{home}"],
            "step_overhead.balanced_cpu_ratio": figures[f"cpu_ratio_{home}"],
            "step_overhead.worst_over_floor": max(over),
        }
    links = [n for n in LINKS if f"ratio_{balanced}_{n}" in figures and n != "loopback"]
    found |= {f"wan.ratio_{link}": figures[f"ratio_{balanced}_{link}"] for link in links}
    if links:
        busy = [figures[f"utilisation_{balanced}_{link}"] for link in links]
        trunk = [figures[f"S_{balanced}_{link}"] for link in links]
        found |= {"wan.utilisation": min(busy), "wan.trunk_over_rtt": min(trunk) / rtt_s}
    return found


def of_peers(figures: dict[str, float], ours: str) -> dict[str, float]:
    """Return how long the peers take, over the unsplit model and over us on the same link."""
    found: dict[str, float] = {}
    for kind in ("sequential", "splitlora"):
        theirs = f"{kind}_{PEERS_LINK}"
        if f"ratio_{theirs}" in figures:
            found[f"wan.ratio_{theirs}"] = figures[f"ratio_{theirs}"]
            mine_s = figures[f"seconds_{ours}_{PEERS_LINK}"]
            found[f"wan.{kind}_over_ours_{PEERS_LINK}"] = figures[f"seconds_{theirs}"] / mine_s
    return found


def main() -> None:
    """Take turns: unsplit, split over loopback and over links, and the peers' ways."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=1, help="counted steps of a turn")
    parser.add_argument("--rows", type=int, default=8, help="sequences of a batch")
    parser.add_argument("--columns", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--chunks", type=int, default=8, help="micro-chunks of a batch")
    parser.add_argument("--codec", default="bf16", help="how tensors are written")
    parser.add_argument("--balanced", type=int, nargs=2, default=(8, 5), help="the even cut")
    parser.add_argument("--frozen", type=int, default=8, help="first layers without a LoRA")
    parser.add_argument(
        "--peers", nargs="*", default=["sequential", "splitlora"], help="whose loops take part"
    )
    parser.add_argument("--links", nargs="+", default=list(LINKS), help="that ours run over")
    parser.add_argument("--lean_head", action="store_true", help="run our clients with it")
    parser.add_argument("--send_once", action="store_true", help="run our clients with it")
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    balanced = tuple(args.balanced)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        workload = make_workload(args, folder, rows=args.rows, columns=args.columns)
        if args.quick:
            args.frozen, args.chunks, balanced = 3, 4, (3, 2)
        settings = settings_of(workload, args, rounds=rounds)
        field = Field(stack, workload, folder, args)
        field.unsplit()
        links = args.links[: 2 if args.quick else None]
        field.split(balanced, links)
        if "loopback" in links:
            field.split((2, 2), ["loopback"])
        for kind in args.peers[: 1 if args.quick else None]:
            field.peer(kind, balanced)
        take_turns(field.found, rounds=rounds, steps=args.steps)
        name = f"{balanced[0]}+{balanced[1]}" + ("_send_once" if args.send_once else "")
        figures = figures_of(field.found)
        with_goals = named(figures, name, LINKS["20mbit_50ms"][1] / 1e3)
    if args.send_once:
        # Another way of training: what has a goal keeps its name for the ordinary one.
        with_goals = {f"{key}_send_once": value for key, value in with_goals.items()}
    elif args.links != list(LINKS):
        with_goals = {}  # a figure with a goal is of a run that has all
    figures |= with_goals | of_peers(figures, name)
    losses = {n: c.rounds[0]["first_loss"] for n, c in field.found.items()}
    settings |= {
        "balanced": name,
        "chunks": args.chunks,
        "codec": args.codec,
        "lean_head": args.lean_head,
        "send_once": args.send_once,
        "peers": "loops in the form of FDU-INC/Split_LoRA a549b60 (splitlora) and of "
        "TAP-LLM/SplitFedLLM 2025-11 and VFLAIR-LLM 2026-01 (sequential), fp32, written anew",
        "counted_steps_of_a_turn": args.steps,
        "layers_without_lora": args.frozen,
        "cores": "client 1, server 0, one thread each; unsplit on both, two threads",
        "links_as_probed": field.links,
        "first_loss": {n: round(loss, 5) for n, loss in losses.items()},
        "ratio_by_round": {
            n: [
                round(mine["seconds"] / theirs["seconds"], 4)
                for mine, theirs in zip(
                    c.rounds, field.found["unsplit_2"].rounds, strict=True
                )
            ]
            for n, c in field.found.items()
        },
    }  # fmt: skip
    Result(figures, settings).write(args, HOME)


if __name__ == "__main__":
    main()
