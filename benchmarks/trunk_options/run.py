"""What does each option for the server's trunk save in memory, and cost in time and loss?"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

from benchmarks.common import (  # noqa: E402
    MIB,
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
    Child,
    Server,
    memory_bytes,
    start_worker,
)
from benchmarks.turns import Contestant, take_turns  # noqa: E402
from cutlayer.split.quantized import QUANTIZATIONS  # noqa: E402

CUT = {"bottom_layers": 2, "top_layers": 2}
PACKAGES = Path(sys.prefix) / "quantized"
"""Where `make test` puts torchao and bitsandbytes."""

_SETTLE_S = 6.0  # a server that idles for four seconds gives its free memory back


@dataclass(frozen=True)
class Option:
    """One way to run the trunk: flags of the server, and what the client asks for."""

    serve: Mapping[str, Any]
    connect: Mapping[str, Any]

    @property
    def is_quantized(self) -> bool:
        """Whether its packages stand apart."""
        return "quantization" in self.serve


def _stored(kind: str, **asked: Any) -> Option:
    return Option({"quantization": kind}, {"quantization": kind, **asked})


OPTIONS = {
    "plain": Option({}, {}),
    "gradient_checkpointing": Option({}, {"gradient_checkpointing": True}),
    "int8": _stored("int8"),
    "float8": _stored("float8"),
    "nf4": _stored("nf4"),
    "int8_checkpointing": _stored("int8", gradient_checkpointing=True),
    "nf4_checkpointing": _stored("nf4", gradient_checkpointing=True),
    "torch_compile": Option({"torch_compile": True}, {}),
}


def losses_of(workload: Workload, kinds: list[str], packages: Path) -> dict[str, float]:
    """Return the base model's loss on held-out text over each kind of trunk, a forward each."""
    spec = {"model": workload.model, "tokens": workload.tokens, "cut": CUT, "kinds": ["", *kinds]}
    with Child("benchmarks.trunk_options.losses", spec, threads=1, packages=packages) as child:
        return child.hello


class Field:
    """The servers, one an option, and their clients."""

    def __init__(self, workload: Workload, certificates: Certificates, folder: Path) -> None:
        self._given = (workload, certificates, folder)
        self.loaded: dict[str, dict[str, int]] = {}

    def server(self, name: str, packages: Path | None, **flags: Any) -> Server:
        """Start a server and note what it has taken once it listens and is idle."""
        workload, certificates, folder = self._given
        (folder / name).mkdir()
        given = {"packages": packages, **CUT, **flags}
        server = Server(workload, certificates, folder / name, **given)
        time.sleep(0 if workload.name.startswith("tiny") else 1)
        self.loaded[name] = memory_bytes(server.pid)
        return server

    def contestant(self, stack: ExitStack, name: str, packages: Path) -> Contestant:
        """Start an option's server and its client."""
        option = OPTIONS[name]
        apart = packages if option.is_quantized else None
        server = stack.enter_context(self.server(name, apart, **option.serve))
        workload, certificates, _ = self._given
        given = {"port": server.port, "certificates": certificates, **CUT, **option.connect}
        worker = stack.enter_context(start_worker("split", workload, **given))
        return Contestant(worker, server=server)

    def packages_bytes(self, packages: Path) -> int:
        """Return what a plain server takes more where the packages can be imported."""
        with self.server("with_packages", packages):
            pass
        return self.loaded["with_packages"]["rss"] - self.loaded["plain"]["rss"]


def figures_of(
    found: Mapping[str, Contestant],
    loaded: Mapping[str, Mapping[str, int]],
    memory: Mapping[str, Mapping[str, int]],
) -> dict[str, float]:
    """Return steps and memory of each option, over those of the plain one and by themselves."""
    plain = found["plain"]
    measured = {
        name: {
            "step": each.of("seconds"),
            "trunk": each.of("trunk_s"),
            "cpu": each.of("cpu_s"),
            "peak": memory[name]["peak"],
            "resident": memory[name]["rss"],
            "loaded": loaded[name]["rss"],
        }
        for name, each in found.items()
    }
    figures = {
        f"{what}_ratio_{name}": value / measured["plain"][what]
        for what in measured["plain"]
        for name, of_name in measured.items()
        for value in (of_name[what],)
        if found[name] is not plain
    }
    for name, of_name in measured.items():
        figures |= {f"{w}_s_{name}": of_name[w] for w in ("step", "trunk", "cpu")}
        figures |= {f"{w}_mib_{name}": of_name[w] / MIB for w in ("peak", "resident", "loaded")}
        figures[f"loading_peak_mib_{name}"] = loaded[name]["peak"] / MIB
    return figures


def versions_in(packages: Path) -> dict[str, str]:
    """Return the versions of what stands apart."""
    return {each.name: each.version for each in distributions(path=[str(packages)])}


def main() -> None:
    """Take the losses, then start all servers and have their clients step by turns."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn that count")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--columns", type=int, default=128, help="tokens of a row")
    parser.add_argument(
        "--packages", type=Path, default=PACKAGES, help="folder of torchao and bitsandbytes"
    )
    parser.add_argument(
        "--options", nargs="+", default=[*OPTIONS], choices=OPTIONS, help="plain is one of them"
    )
    args = parser.parse_args()
    versions = versions_in(args.packages)
    if not {"torchao", "bitsandbytes"} <= versions.keys():
        sys.exit(f"'{args.packages}' has no torchao and bitsandbytes: run 'make test' once")
    rounds = 1 if args.quick else args.rounds
    with ExitStack() as stack:
        folder = stack.enter_context(scratch())
        size = {"rows": args.rows, "columns": args.columns}
        workload = make_workload(args, folder, **size)
        settings = settings_of(workload, args, rounds=rounds, steps=args.steps, cut=CUT, threads=1)
        settings["versions"] |= versions
        (folder / "held_out").mkdir()
        unseen = argparse.Namespace(**{**vars(args), "text": args.text.with_name("test.jsonl")})
        held_out = make_workload(unseen, folder / "held_out", rows=8, batches=1)
        kinds = [name for name in args.options if name in QUANTIZATIONS]
        losses = losses_of(held_out, kinds, args.packages)

        field = Field(workload, make_certificates(folder / "certs"), folder)
        found = {name: field.contestant(stack, name, args.packages) for name in args.options}
        packages_bytes = field.packages_bytes(args.packages)
        take_turns(found, rounds=rounds, steps=args.steps)
        time.sleep(0 if args.quick else _SETTLE_S)
        servers = {name: each.server for name, each in found.items() if each.server}
        memory = {name: memory_bytes(server.pid) for name, server in servers.items()}
    figures = figures_of(found, field.loaded, memory)
    figures |= {f"nats_above_plain_{kind}": losses[kind] - losses[""] for kind in kinds}
    figures |= {"held_out_loss_plain": losses[""], "packages_mib": packages_bytes / MIB}
    settings |= {
        "held_out": [held_out.rows, held_out.columns],
        "seconds_by_round": {
            name: [round(turn["seconds"], 4) for turn in each.rounds]
            for name, each in found.items()
        },
        "first_loss": {
            name: round(each.rounds[0]["first_loss"], 6) for name, each in found.items()
        },
    }
    Result({f"trunk_options.{name}": value for name, value in figures.items()}, settings).write(
        args, HOME
    )


if __name__ == "__main__":
    main()
