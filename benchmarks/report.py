"""Write docs/performance.md and its pictures from the committed results of the benchmarks.

    python benchmarks/report.py            # after a benchmark's JSON was committed
    python benchmarks/report.py --check    # says whether the page is what this would write
    python benchmarks/report.py --quick out/bench    # prints the table of a `make bench`

A figure `room.name` is `room.name` in any result file, or `name` in one of benchmarks/room. Of
several the newest counts, by its own date. What nobody has measured yet is said to be so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
PICTURES = ROOT / "docs" / "performance"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Found:
    """A figure, and the run that it is of."""

    value: float
    run: dict[str, Any]
    path: Path


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        goal: Its letter and number.
        what: What is measured, in words.
        figure: Its name, or two names `a / b` of which the quotient is meant.
        least: The least that it may be, if there is one.
        most: The most that it may be, if there is one.
        why: Where the time or the bytes go if it falls short.
    """

    goal: str
    what: str
    figure: str
    least: float | None = None
    most: float | None = None
    why: str = ""

    def is_met(self, value: float) -> bool:
        """Say whether a value is within the goal."""
        is_enough = self.least is None or value >= self.least
        return is_enough and (self.most is None or value <= self.most)

    def words(self) -> str:
        """Return the goal in signs."""
        if self.least == self.most:
            return f"{self.most:g}"
        told = [f"≥ {self.least:g}"] if self.least is not None else []
        return " and ".join([*told, *([f"≤ {self.most:g}"] if self.most is not None else [])])


_BALANCE = (
    "what is left is the first chunk's way up and the last one's way down, and CPU seconds that "
    "two processes spend more because they stream different weights over one memory bus"
)
_TLS = (
    "TLS alone adds 22 bytes to every 16 KiB (1.0013), and each message has about 400 bytes of "
    "head, HTTP/2 and window updates: messages of 64 KiB cannot be within 1.002 over TLS"
)
_GRPC = (
    "each message costs gRPC and Python some 0.4 ms on either side, whatever its size; a step has "
    "three a chunk. At 16 MiB it is 1.27"
)
_CLIENT = (
    "PyTorch, transformers, peft and gRPC alone take 10% of what full fine-tuning does, and the "
    "client's weights (the embedding most of all) 4%. Nothing of a step stands out any more: the "
    "peak is that of loading the weights"
)
_COMPANY = (
    "one adapter on the same tokens, which fusing cannot beat, is itself 2.84 times as fast as "
    "eight tenants in turn; what is missing to that are mostly eight optimizer steps in place of "
    "one (decision 0018)"
)

GOALS = (
    Goal("G1", "step over loopback and TLS, balanced cut / unsplit peft on both cores",
         "step_overhead.balanced_ratio", most=0.92, why=_BALANCE),
    Goal("G1", "the same over its own floor, the worse of two cuts",
         "step_overhead.worst_over_floor", most=1.06, why=_BALANCE),
    Goal("G1", "CPU seconds of both sides / unsplit on one thread",
         "step_overhead.balanced_cpu_ratio", most=1.03, why=_BALANCE),
    Goal("G2", "step at 20 Mbit/s, 50 ms", "wan.ratio_20mbit_50ms", most=0.95, why=_BALANCE),
    Goal("G2", "step at 100 Mbit/s, 50 ms", "wan.ratio_100mbit_50ms", most=0.95, why=_BALANCE),
    Goal("G2", "the same over that of loopback",
         "wan.ratio_100mbit_50ms / step_overhead.balanced_ratio", least=0.98, most=1.02,
         why="the round trip and one chunk's transfer stand at the beginning of every step: an "
         "optimizer's step must be done before the next forward is computed"),
    Goal("G3", "the busiest resource's share of the step, the worse of two links",
         "wan.utilisation", least=0.97,
         why="what is left is the round trip and one chunk's transfer at each end of a step; see "
         "the next line"),
    Goal("G3", "the same at 20 Mbit/s with rows sent once, a batch early",
         "wan.utilisation_send_once", least=0.97,
         why="the trunk computes 8.94 of 9.24 s; a round trip and one chunk's transfer are left"),
    Goal("G4", "bytes per token over 8 x width, three epochs, at equal loss",
         "codecs.bytes_ratio_equal_loss", most=0.055,
         why="three seeds of 90 steps, each within 0.5% (0.33% at worst): what comes down takes "
         "0.047 of it at three bits, the gradient 0.039 at two and a half, spent where it is, what "
         "goes up 0.026 at five, once. At two bits of gradient it is 0.8% above; four bits of what "
         "goes up cost 0.4% alone (docs/log.md, 2026-11-28)"),
    Goal("G4", "the same with 30% loss tokens and a head-only client",
         "codecs.bytes_ratio_instruct", most=0.03,
         why="three seeds of 90 steps, each within 0.5%: of it what comes down at loss positions "
         "takes 0.028 at six bits, what goes up 0.021 at four, once, the gradient there 0.014 at "
         "three, spent where it is; two bits of it ended 0.6% above at one seed, four bits down "
         "1.2% at the first"),
    Goal("G5", "upload of activations in later epochs", "cache.later_epoch_upload", 0.0, 0.0),
    Goal("G6", "bytes on the socket over bytes of tensors, raw, 590 KB messages",
         "bytes.wire_over_payload", most=1.002, why=_TLS),
    Goal("G6", "the same with bf16, 295 KB messages", "transport.wire_over_payload_bf16",
         most=1.002, why=_TLS),
    Goal("G7", "CPU seconds a GB over TCP and TLS of plain sockets, 1 MiB messages",
         "transport.cpu_s_per_gb_over_tcp_tls_1MiB", most=1.5, why=_GRPC),
    Goal("G7", "the same with 64 KiB messages", "transport.cpu_s_per_gb_over_tcp_tls_64KiB",
         most=1.5, why=_GRPC),
    Goal("G8", "8 tenants x 32 tokens, fused / one after another, bf16", "tenants.fused_8x32",
         least=3.1, why=_COMPANY),
    Goal("G8", "the same / one adapter on the same tokens", "tenants.fused_8x32_of_one_adapter",
         least=0.95,
         why="0.80 in float32; eight tenants' optimizer steps, which one thread does, are the "
         "largest part that is not shared (decision 0018)"),
    Goal("G8", "4 tenants over 50 ms / the limit", "tenants.wan_4_over_limit", least=0.95),
    Goal("G9", "server memory per further tenant over its state (1.2, and one micro-batch's "
         "activations, which are 0.07 of it here)", "memory.tenant_over_state", most=1.27,
         why="47 MiB a tenant, of which 32 are adapter, gradients and moments and 6 its tree of "
         "modules; the rest was not found. It was 1.26 at e996b0a, on a machine "
         "less busy; 368d722 gives the same 47 on this one"),
    Goal("G10", "client's peak memory over full fine-tuning, fp32, at the least (lean head, frozen "
         "bottom, memory given back at once)",
         "memory.client_least_over_full_finetuning", most=0.06, why=_CLIENT),
    Goal("G10", "the same without what both import",
         "memory.client_least_over_full_finetuning_without_imports", most=0.06, why=_CLIENT),
    Goal("G11", "client's operations over those of unsplit LoRA, cached bottom",
         "plan.client_flops_share", most=0.28),
    Goal("G11", "the same with 30% loss tokens", "plan.client_flops_share_instruct", most=0.13),
    Goal("G11", "the same with a head-only client", "plan.client_flops_share_head_only",
         most=0.07),
    Goal("G12", "codec speed, encode and decode, GB/s a core, rotated 4-bit", "codecs.gb_per_s",
         least=4.0,
         why="with numba, one pass over a token: 1.9 nanoseconds a value both ways, where 4 GB/s "
         "are four copies of the bytes; 0.22 without (docs/log.md). The four tensors of a step of "
         "benchmarks/wan, 2.4 MB each, take 9 ms of 8.9 s at this speed"),
    Goal("G13", "decoded tokens that changed with a later one", "codecs.causality_violations",
         0.0, 0.0),
    Goal("G13", "first loss, fp32 wire against unsplit, difference",
         "step_overhead.first_loss_difference", most=1e-5),
    Goal("plan", "error of the predicted memory", "plan.memory_error", most=0.05),
    Goal("plan", "error of the predicted time", "plan.time_error", most=0.15),
)  # fmt: skip


def results(
    root: Path = ROOT / "benchmarks", *, quick: bool = False
) -> list[tuple[Path, dict[str, Any]]]:
    """Return all results below a folder that were taken at full size, the newest first.

    Args:
        root: Where each room's `results/` are; the committed ones by default.
        quick: Those of the quick form instead.
    """
    found = [(path, json.loads(path.read_text())) for path in root.glob("*/results/*.json")]
    wanted = [
        (path, run)
        for path, run in found
        if "figures" in run and bool(run.get("settings", {}).get("quick")) is quick
    ]
    return sorted(wanted, key=lambda item: str(item[1].get("date", "")), reverse=True)


def lookup(runs: list[tuple[Path, dict[str, Any]]]) -> Callable[[str], Found | None]:
    """Return what finds a figure by its name."""

    def one(name: str) -> Found | None:
        room, _, rest = name.partition(".")
        for path, run in runs:
            in_room = path.parts[-3] == room
            for key in (name, *((rest,) if in_room else ())):
                if key in run["figures"]:
                    return Found(float(run["figures"][key]), run, path)
        return None

    def find(name: str) -> Found | None:
        above, _, below = name.partition(" / ")
        found = one(above)
        if not below or found is None:
            return found
        under = one(below)
        return Found(found.value / under.value, found.run, found.path) if under else None

    return find


def row_of(goal: Goal, found: Found | None) -> str:
    """Return a goal's line of the table."""
    if found is None:
        return f"| {goal.goal} | {goal.what} | {goal.words()} | {NOT_MEASURED} | |"
    is_met = goal.is_met(found.value)
    verdict = "met" if is_met else f"short: {goal.why}" if goal.why else "short"
    value = _number(found.value)
    return f"| {goal.goal} | {goal.what} | {goal.words()} | {value} | {verdict} |"


def _number(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.4f}".rstrip("0").rstrip(".")


def steps_table(find: Callable[[str], Found | None]) -> list[str]:
    """Return the table of who took how long, where it was measured."""
    lines = [
        "| who, over what | step s | of unsplit on both cores | C | S | U | D | busiest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    seen = False
    for name, run in _contestants():
        figures = run["figures"]
        seen = True
        parts = [f"{figures[f'{part}_{name}']:.2f}" for part in "CSUD"]
        lines.append(
            f"| {_told(name)} | {figures[f'seconds_{name}']:.2f} "
            f"| {figures[f'ratio_{name}']:.3f} | "
            + " | ".join(parts)
            + f" | {figures[f'utilisation_{name}']:.3f} |"
        )
    return lines if seen else []


def _contestants() -> list[tuple[str, dict[str, Any]]]:
    """Return everybody who had a turn at a step in benchmarks/wan, each from its largest run."""
    of: dict[str, dict[str, Any]] = {}
    runs = [run for path, run in results() if path.parts[-3] == "wan"]
    took_part = lambda run: [k for k in run["figures"] if k.startswith("utilisation_")]
    for run in sorted(runs, key=lambda run: -len(took_part(run))):
        for key in took_part(run):
            of.setdefault(key.removeprefix("utilisation_"), run)
    order = ("loopback", "100mbit_50ms", "20mbit_50ms")
    place = lambda name: next(i for i, link in enumerate(order) if name.endswith(link))
    return sorted(of.items(), key=lambda item: (not item[0][0].isdigit(), place(item[0]), item[0]))


def _told(name: str) -> str:
    links = {
        "loopback": "loopback",
        "20mbit_50ms": "20 Mbit/s, 50 ms",
        "100mbit_50ms": "100 Mbit/s, 50 ms",
    }
    link = next(known for known in links if name.endswith(known))
    who = name.removesuffix(f"_{link}").replace("_send_once", ", rows sent once")
    kind = f"cutlayer {who}" if who[0].isdigit() else f"peer: {who}"
    return f"{kind}, {links[link]}"


def page() -> str:
    """Return the page's text."""
    find = lookup(results())
    found = {goal.figure: find(goal.figure) for goal in GOALS}
    lines = [
        "# Performance",
        "",
        "Written by `benchmarks/report.py` from the committed results; change those, not the page. "
        "Each figure is explained in the README of its benchmark, and a result is named after the "
        "machine. "
        "No device was lent for these runs, so there is no figure of a GPU: none is guessed.",
        "",
        "| | what | goal | measured | |",
        "|---|---|---|---|---|",
        *(row_of(goal, found[goal.figure]) for goal in GOALS),
        "",
    ]
    table = steps_table(find)
    if table:
        lines += [
            "## A step over the link that a clinic has",
            "",
            "`benchmarks/wan`: client and server one core and one thread each, unsplit peft on "
            "both cores, turn by turn in one run. Seconds of a step: C the client computes, S the "
            "trunk computes, U and D what the bytes take at the link's rate. The busiest of the "
            "four is the pipeline's limit; its share of the step is in the last column. Peers are "
            "loops in the form of theirs, written anew; `benchmarks/wan/peers.py` names their "
            "versions.",
            "",
            *table,
            "",
            "![Seconds of a step by contestant](performance/steps.svg)",
            "",
        ]
    if any(found.values()):
        lines += ["![Each figure over its goal](performance/goals.svg)", ""]
    sources = sorted(
        {
            f"- `{each.path.relative_to(ROOT).as_posix()}`: commit {each.run.get('commit', '?')}, "
            f"{str(each.run.get('date', '?'))[:10]}, load "
            f"{_load(each.run)} when it began"
            for each in found.values()
            if each is not None
        }
    )
    lines += ["## Where the figures are from", "", *(sources or [NOT_MEASURED + "."]), ""]
    return "\n".join(lines)


def quick_table(root: Path) -> str:
    """Return the table of goals with what a quick run found beside what was committed."""
    quick, full = lookup(results(root, quick=True)), lookup(results())
    told = lambda found: _number(found.value) if found is not None else NOT_MEASURED
    return "\n".join(
        [
            "A quick run is of a tiny random model and few steps: it says that a figure is still",
            "measured, and nothing of its size. What counts is in the last column.",
            "",
            "| | figure | goal | quick | measured at full size |",
            "|---|---|---|---|---|",
            *(
                f"| {goal.goal} | {goal.figure} | {goal.words()} | {told(quick(goal.figure))} "
                f"| {told(full(goal.figure))} |"
                for goal in GOALS
            ),
        ]
    )


def _load(run: dict[str, Any]) -> str:
    load = run.get("settings", {}).get("load_average")
    return f"{load[0]:g}" if load else "not noted"


# ---------------------------------------------------------------------- pictures


def draw() -> None:
    """Draw the pictures, the same bytes for the same figures."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "cutlayer", "svg.fonttype": "none", "font.size": 9})
    PICTURES.mkdir(exist_ok=True)
    _draw_goals(lookup(results()))
    if _contestants():
        _draw_steps()


def _save(figure: Any, name: str) -> None:
    figure.savefig(PICTURES / name, bbox_inches="tight", metadata={"Date": None})
    # Lines that end in blanks are no change of a picture.
    path = PICTURES / name
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def _draw_goals(find: Callable[[str], Found | None]) -> None:
    from matplotlib import pyplot as plt

    bars = []
    for goal in GOALS:
        found, limit = find(goal.figure), goal.most or goal.least
        if found is not None and limit:
            is_met = goal.is_met(found.value)
            bars.append((f"{goal.goal} {goal.figure}", found.value / limit, is_met))
    if not bars:
        return
    figure, axes = plt.subplots(figsize=(7, 0.32 * len(bars) + 0.8))
    names, values, met = zip(*bars[::-1], strict=True)
    axes.barh(names, values, color=["#4a7" if each else "#c75" for each in met])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("measured over goal; green is within the goal")
    _save(figure, "goals.svg")
    plt.close(figure)


def _draw_steps() -> None:
    from matplotlib import pyplot as plt

    contestants = _contestants()
    figure, axes = plt.subplots(figsize=(7, 0.34 * len(contestants) + 1.2))
    names = [_told(name) for name, _ in contestants][::-1]
    ratios = [run["figures"][f"ratio_{name}"] for name, run in contestants][::-1]
    busiest = [
        ratio * run["figures"][f"utilisation_{name}"]
        for ratio, (name, run) in zip(ratios, contestants[::-1], strict=True)
    ]
    axes.barh(names, ratios, color="#c9c9c9", label="step")
    axes.barh(names, busiest, color="#47a", height=0.45, label="busiest of C, S, U, D")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("seconds over those of unsplit peft on both cores")
    axes.legend(loc="lower right")
    _save(figure, "steps.svg")
    plt.close(figure)


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    parser.add_argument("--quick", type=Path, metavar="FOLDER", help="print what is in there")
    args = parser.parse_args()
    if args.quick:
        print(quick_table(args.quick))
        return
    if args.check:
        is_same = PAGE.is_file() and PAGE.read_text() == page()
        sys.exit(0 if is_same else "docs/performance.md is not of these results: run report.py")
    PAGE.write_text(page())
    draw()


if __name__ == "__main__":
    main()
