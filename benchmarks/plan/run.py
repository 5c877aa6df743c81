"""How far is what `cutlayer plan` predicts from what is measured?"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

import torch  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoConfig  # noqa: E402

from benchmarks.bytes.run import CountingProxy  # noqa: E402
from benchmarks.common import (  # noqa: E402
    MIB,
    Certificates,
    Result,
    make_certificates,
    make_workload,
    median,
    parser_of,
    scratch,
    settings_of,
)
from benchmarks.processes import Server, memory_bytes, start_worker  # noqa: E402
from cutlayer.split.calibration import measured_speed  # noqa: E402
from cutlayer.split.cut import Cut  # noqa: E402
from cutlayer.split.loading import Skeleton, skeleton_of  # noqa: E402
from cutlayer.split.prediction import Prediction, Setup, Speed, predict  # noqa: E402
from cutlayer.split.schedule import Path as Link  # noqa: E402
from cutlayer.split.trace import Pieces, trace  # noqa: E402

# Bottom, top, rows, columns, chunks. None is among those that the constants were taken from.
CASES = [
    (3, 2, 4, 128, 1),
    (1, 4, 3, 256, 3),
    (5, 3, 6, 192, 3),
    (2, 8, 2, 384, 1),
    (8, 6, 4, 96, 2),
    (3, 3, 2, 320, 2),
]
LOOPBACK = Link(1e9, 1e9, 0.0)


class Planner:
    """Predicts for one model, as the verb does."""

    def __init__(self, model: str, rank: int, process_bytes: tuple[int, int]) -> None:
        self.process_bytes = process_bytes
        self.skeleton: Skeleton = skeleton_of(AutoConfig.from_pretrained(model), "causal-lm")
        self.lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        self._pieces: dict[int, Pieces] = {}

    def speed(self) -> Speed:
        """Measure this machine as `cutlayer plan` does."""
        longest = self.skeleton.model.config.max_position_embeddings
        return measured_speed(self.skeleton, self.lora, tokens=min(256, longest))

    def predict(
        self, bottom: int, top: int, rows: int, columns: int, chunks: int, speed: Speed
    ) -> Prediction:
        """Predict a step over loopback in fp32."""
        if columns not in self._pieces:
            self._pieces[columns] = trace(self.skeleton, self.lora, columns=columns)
        pieces = self._pieces[columns]
        client_bytes, server_bytes = self.process_bytes
        setup = Setup(
            rows,
            speed,
            speed,
            LOOPBACK,
            lambda width: 4.0 * width,
            chunks=chunks,
            client_process_bytes=client_bytes,
            server_process_bytes=server_bytes,
        )
        return predict(pieces, Cut(bottom, len(pieces.layers) - top), setup)


def process_bytes(args: Any, folder: Path, certificates: Certificates) -> tuple[int, int]:
    """Return what a connected client and a server take whose model weighs next to nothing.

    Libraries in memory are the machine's: 15% between two machines with the same packages.
    """
    tiny = make_workload(argparse.Namespace(**{**vars(args), "quick": True}), folder)
    with Server(tiny, certificates, folder / "state") as server:
        ends = {"bottom_layers": 2, "top_layers": 2, "certificates": certificates}
        with start_worker("split", tiny, port=server.port, **ends) as client:
            client.ask("step")
            return client.ask("memory")["peak"], memory_bytes(server.pid)["peak"]


def measure(
    args: Any,
    folder: Path,
    certificates: Certificates,
    planner: Planner,
    case: tuple[int, int, int, int, int],
    steps: int,
) -> dict[str, Any]:
    """Run one case in fresh processes, this machine's speed measured between its steps."""
    bottom, top, rows, columns, chunks = case
    workload = make_workload(args, folder, rows=rows, columns=columns)
    rows, columns = workload.rows, workload.columns
    ends = {"bottom_layers": bottom, "top_layers": top}
    with ExitStack() as stack:
        server = stack.enter_context(Server(workload, certificates, folder / "state", **ends))
        proxy = stack.enter_context(contextlib.closing(CountingProxy(server.port)))
        client = stack.enter_context(
            start_worker(
                "split",
                workload,
                port=proxy.port,
                certificates=certificates,
                chunks=chunks,
                breakdown=True,
                **ends,
            )
        )
        client.ask("step")
        speeds, taken, wire = [planner.speed()], [], []
        for number in range(steps):
            before = (proxy.up_bytes, proxy.down_bytes)
            taken.append(client.ask("step"))
            wire.append((proxy.up_bytes - before[0], proxy.down_bytes - before[1]))
            if not number:
                peaks = (client.ask("memory")["peak"], memory_bytes(server.pid)["peak"])
            speeds.append(planner.speed())
    shape = (bottom, top, rows, columns, chunks)
    expected = [planner.predict(*shape, _between(a, b)) for a, b in zip(speeds, speeds[1:])]  # noqa: B905, RUF007
    of_bytes = planner.predict(*shape, speeds[0])
    return {
        "case": list(shape),
        "client_mib": [of_bytes.client_bytes / MIB, peaks[0] / MIB],
        "server_mib": [of_bytes.server_bytes / MIB, peaks[1] / MIB],
        "up_bytes": [of_bytes.up_bytes, median([up for up, _down in wire])],
        "down_bytes": [of_bytes.down_bytes, median([down for _up, down in wire])],
        "step_s": [
            median([p.step.seconds for p in expected]),
            median([t["seconds"] for t in taken]),
        ],
        "gflops": [round(speed.layer_flops_per_s / 1e9, 2) for speed in speeds],
    }


def _between(a: Speed, b: Speed) -> Speed:
    return Speed(
        2 / (1 / a.layer_flops_per_s + 1 / b.layer_flops_per_s),
        2 / (1 / a.head_flops_per_s + 1 / b.head_flops_per_s),
    )


def from_step_overhead(planner: Planner) -> dict[str, list[float]]:
    """Predict the steps of the committed step_overhead from its unsplit step on one thread."""
    found: dict[str, list[float]] = {}
    for path in sorted(HOME.parent.glob("step_overhead/results/*.json")):
        result = json.loads(path.read_text())
        figures, (rows, columns) = result["figures"], result["settings"]["batch"]
        whole = planner.predict(0, 0, rows, columns, 1, Speed(1e9, 1e9))
        rate = (whole.client_flops + whole.server_flops) / figures["seconds_unsplit_1"]
        for name in ("2+2_1", "2+2_2", "2+2_4", "6+5_4", "7+4_4"):
            cut, _, chunks = name.partition("_")
            bottom, _, top = cut.partition("+")
            shape = (int(bottom), int(top), rows, columns, int(chunks))
            step = planner.predict(*shape, Speed(rate, rate)).step
            found[name] = [step.seconds, figures[f"seconds_{name}"]]
    return found


def client_shares(planner: Planner, *, columns: int) -> dict[str, float]:
    """Count a later epoch's operations of a client that sends once, over the unsplit model's.

    Two layers at either end, or the head alone; with a loss at every position, or at 30% of them.
    """
    speed, one_row = Speed(1e9, 1e9), 1
    pieces = trace(planner.skeleton, planner.lora, columns=columns)

    def share(top: int, **of_client: Any) -> float:
        train = ("trunk", "top") if top else ("trunk",)
        plain = Setup(one_row, speed, speed, LOOPBACK, lambda width: 4.0 * width, train=train)
        cut = Cut(2, len(pieces.layers) - top)
        unsplit = predict(pieces, cut, plain)
        sent = predict(pieces, cut, dataclasses.replace(plain, rows_are_sent=True, **of_client))
        return sent.client_flops / (unsplit.client_flops + unsplit.server_flops)

    few = {"lean_head": True, "supervised": 0.3}
    return {
        "client_flops_share": share(2),
        "client_flops_share_instruct": share(2, **few),
        "client_flops_share_head_only": share(0, **few),
    }


def _error(pairs: list[list[float]]) -> float:
    return max(abs(predicted / measured - 1) for predicted, measured in pairs)


def main() -> None:
    """Measure each case in fresh processes, and compare."""
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = [(2, 3, 4, 16, 1)] if args.quick else CASES
    steps = 1 if args.quick else args.steps
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        workload = make_workload(args, folder)
        settings = settings_of(workload, args, steps=steps)
        del settings["batch"]
        certificates = make_certificates(folder / "certs")
        (folder / "tiny").mkdir()
        processes = process_bytes(args, folder / "tiny", certificates)
        planner = Planner(workload.model, workload.rank, processes)
        for number, case in enumerate(cases):
            mine = folder / str(number)
            mine.mkdir()
            found.append(measure(args, mine, certificates, planner, case, steps))
            print(json.dumps(found[-1]), file=sys.stderr)
        quiet = {} if args.quick else from_step_overhead(planner)
    figures = client_shares(planner, columns=16 if args.quick else 256)
    figures |= {
        "memory_error": _error([c[side] for c in found for side in ("client_mib", "server_mib")]),
        "memory_error_client": _error([c["client_mib"] for c in found]),
        "memory_error_server": _error([c["server_mib"] for c in found]),
        "bytes_error": _error([c[way] for c in found for way in ("up_bytes", "down_bytes")]),
        "time_error_while_busy": _error([c["step_s"] for c in found]),
        "time_error_while_busy_median": median(
            [abs(c["step_s"][0] / c["step_s"][1] - 1) for c in found]
        ),
    }
    if quiet:
        figures["time_error"] = _error(list(quiet.values()))
    settings |= {
        "cases": found,
        "pairs_are": "predicted, measured",
        "process_mib": [round(count / MIB, 1) for count in processes],
        "time_error_is_of": {name: [round(s, 4) for s in pair] for name, pair in quiet.items()},
    }
    Result(figures, settings).write(args, HOME)


if __name__ == "__main__":
    main()
