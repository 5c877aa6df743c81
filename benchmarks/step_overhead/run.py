"""How much longer does a training step take when the model is split over two processes?"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

from benchmarks.common import (  # noqa: E402
    MIB,
    Result,
    Workload,
    make_certificates,
    make_workload,
    median,
    parser_of,
    scratch,
    settings_of,
)
from benchmarks.processes import (  # noqa: E402
    Child,
    Server,
    cpu_seconds,
    start_worker,
)

PARTS = ("bottom", "top", "sending", "waiting", "optimizer")


@dataclass
class Contestant:
    """One way to do the step, and what its steps took."""

    worker: Child
    server: Server | None
    asked: dict[str, int]
    """What `step` is asked with: `threads` of the unsplit model, `chunks` of a split one."""
    steps: list[dict[str, Any]] = field(default_factory=list)

    def turn(self) -> None:
        """Do two steps and count the second, with the memory of the first still warm.

        In training step follows step. Here the others' turns lie between two of ours, and a server
        that idles for seconds gives its free memory back to the system.
        """
        self.worker.ask("step", **self.asked)
        self.step()

    def step(self) -> None:
        """Do one step; CPU seconds are those of both processes."""
        before_s = cpu_seconds(self.server.pid) if self.server else 0.0
        step = self.worker.ask("step", **self.asked)
        if self.server:
            step["cpu_s"] += cpu_seconds(self.server.pid) - before_s
        self.steps.append(step)

    def seconds(self) -> float:
        """Return the median step."""
        return median([step["seconds"] for step in self.steps])

    def cpu_s(self) -> float:
        """Return the median step's CPU seconds, of both processes."""
        return median([step["cpu_s"] for step in self.steps])

    def parts(self) -> dict[str, float]:
        """Return the medians of where the step's seconds went."""
        parts = {
            name: median([step["parts"].get(name, 0.0) for step in self.steps]) for name in PARTS
        }
        traffic = [step["traffic"] for step in self.steps]
        parts["trunk"] = median([t["trunk_s"] for t in traffic])
        # The last wait is for the trunk's optimizer step, whose time is in `trunk_s` too.
        parts["link"] = median([t["waited_s"] - t["trunk_s"] - t["queued_s"] for t in traffic])
        return parts


def contestants(
    stack: ExitStack, workload: Workload, folder: Path, cuts: list[tuple[int, int]]
) -> dict[str, Contestant]:
    """Start every process. Names are `unsplit_THREADS` and `BOTTOM+TOP_CHUNKS[_two_each]`."""
    certificates = make_certificates(folder / "certs")
    unsplit = stack.enter_context(start_worker("unsplit", workload, threads=2))
    found = {
        f"unsplit_{threads}": Contestant(unsplit, None, {"threads": threads}) for threads in (2, 1)
    }
    first = cuts[0]
    for threads in (1, 2):
        server = stack.enter_context(
            Server(
                workload,
                certificates,
                folder / str(threads),
                bottom_layers=first[0],
                top_layers=first[1],
                threads=threads,
                passive=threads > 1,
            )
        )
        for bottom_layers, top_layers in cuts if threads == 1 else cuts[:1]:
            client = stack.enter_context(
                start_worker(
                    "split",
                    workload,
                    port=server.port,
                    certificates=certificates,
                    threads=threads,
                    passive=threads > 1,
                    bottom_layers=bottom_layers,
                    top_layers=top_layers,
                    breakdown=True,
                )
            )
            every = (1, 2, 4) if (bottom_layers, top_layers) == first else (4,)
            for chunks in every if threads == 1 else (1,):
                suffix = "" if threads == 1 else "_two_each"
                name = f"{bottom_layers}+{top_layers}_{chunks}{suffix}"
                found[name] = Contestant(client, server, {"chunks": chunks})
    return found


def figures_of(found: dict[str, Contestant], cuts: list[tuple[int, int]]) -> dict[str, float]:
    """Return all figures but `ratio`."""
    two, one = found["unsplit_2"], found["unsplit_1"]
    cut = f"{cuts[0][0]}+{cuts[0][1]}"
    sequential = found[f"{cut}_1"]
    figures = {
        "ratio_one_thread": sequential.seconds() / one.seconds(),
        "ratio_chunks_1": sequential.seconds() / two.seconds(),
        "ratio_chunks_2": found[f"{cut}_2"].seconds() / two.seconds(),
        "ratio_chunks_4": found[f"{cut}_4"].seconds() / two.seconds(),
        "ratio_two_threads_each": found[f"{cut}_1_two_each"].seconds() / two.seconds(),
        "cpu_ratio": sequential.cpu_s() / one.cpu_s(),
        "cpu_ratio_chunks_4": found[f"{cut}_4"].cpu_s() / one.cpu_s(),
        "cpu_ratio_two_threads": sequential.cpu_s() / two.cpu_s(),
        "unsplit_speedup_of_two_threads": one.seconds() / two.seconds(),
    }
    for bottom_layers, top_layers in cuts[1:]:
        balanced = found[f"{bottom_layers}+{top_layers}_4"]
        name = f"cut_{bottom_layers}_{top_layers}_chunks_4"
        figures[f"ratio_{name}"] = balanced.seconds() / two.seconds()
        figures[f"cpu_ratio_{name}"] = balanced.cpu_s() / one.cpu_s()
    figures |= {f"seconds_{name}": c.seconds() for name, c in found.items()}
    for name, contestant in found.items():
        if contestant.server:
            parts = contestant.parts()
            if name.rpartition("_")[2] in ("2", "4"):
                del parts["link"]  # with chunks, waits and the trunk overlap
            figures |= {f"{part}_s_{name}": seconds for part, seconds in parts.items()}
    first = abs(sequential.steps[0]["loss"] - two.steps[0]["loss"])
    return {**figures, "first_loss_difference": first}


def main() -> None:
    """Take turns, step by step, so that a busy moment of the machine meets all of them."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each contestant")
    parser.add_argument(
        "--cuts",
        nargs="+",
        default=["2+2", "6+5", "7+4"],
        help="layers below and above the trunk, the server's own cut first",
    )
    args = parser.parse_args()
    rounds = 2 if args.quick else args.rounds
    cuts = [(int(lower), int(upper)) for lower, _, upper in (c.partition("+") for c in args.cuts)]
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        workload = make_workload(args, folder)
        settings = settings_of(workload, args, rounds=rounds)
        found = contestants(stack, workload, folder, cuts)
        for number in range(rounds + 1):
            # Every other round goes backwards, so that nobody always follows the same one.
            turns = list(found.items())[:: -1 if number % 2 else 1]
            for name, contestant in turns:
                contestant.turn()
                took_s = contestant.steps[-1]["seconds"]
                print(f"round {number} {name:20s} {took_s:8.3f} s", file=sys.stderr)
        first_losses = figures_of(found, cuts)["first_loss_difference"]
        for contestant in found.values():
            del contestant.steps[0]  # the warm-up
        figures = figures_of(found, cuts) | {"first_loss_difference": first_losses}
        two_s = found["unsplit_2"].seconds()
        strict = {n: c for n, c in found.items() if c.server and not n.endswith("_two_each")}
        best = min(strict, key=lambda name: strict[name].seconds())
        memory = {
            "client_mib": found[best].worker.ask("memory")["peak"] / MIB,
            "unsplit_mib": found["unsplit_2"].worker.ask("memory")["peak"] / MIB,
        }
    cut, _, chunks = best.partition("_")
    ratios = [
        step["seconds"] / other["seconds"]
        for step, other in zip(strict[best].steps, found["unsplit_2"].steps, strict=True)
    ]
    settings |= {
        "ratio_is_of": {"cut": cut, "chunks": int(chunks), "threads": "1 + 1 against 2"},
        "ratio_by_round": [round(ratio, 4) for ratio in ratios],
        "seconds_by_round": {
            name: [round(step["seconds"], 4) for step in c.steps] for name, c in found.items()
        },
    }
    figures = {"ratio": strict[best].seconds() / two_s, **figures, **memory}
    Result(figures, settings).write(args, HOME)


if __name__ == "__main__":
    main()
