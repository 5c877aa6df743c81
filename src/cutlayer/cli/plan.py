"""`cutlayer plan`: what every cut of a model would need, and which one to take. Nothing is run.

A config is enough: no weights are read, and the model is built without memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cutlayer.cli.main import add_format, report, settle
from cutlayer.errors import ConfigError

if TYPE_CHECKING:
    from cutlayer.split.prediction import Prediction, Setup
    from cutlayer.split.trace import Pieces

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
"""Models that are planned for by name, without a file."""

PRIVACY = (
    "No cut is private by itself: activations at any shallow cut can be inverted to the text. This "
    "plan does not weigh it; 'cutlayer audit' measures it on your data."
)

_BUSY = 0.5
"""Load per core above which what is measured is not what the machine can do."""

_UNITS = {
    "memory": {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
    "bandwidth": {"kbit": 125.0, "Mbit": 125e3, "Gbit": 125e6},
    "time": {"ms": 1e-3, "s": 1.0},
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the verb's arguments."""
    parser.add_argument(
        "model", help=f"a folder or a config.json, a hub id, or one of {', '.join(SHAPES)}"
    )
    parser.add_argument("--client_memory", help="what the client has, such as 8GB")
    parser.add_argument("--server_memory", help="what the server has, such as 80GB")
    parser.add_argument("--bandwidth", default="100Mbit", help="each way (default: 100Mbit)")
    parser.add_argument("--upload", help="of the client, if it is not the bandwidth")
    parser.add_argument("--rtt", default="40ms", help="round trip (default: 40ms)")
    parser.add_argument("--batch_size", type=int, default=8, help="samples (default: 8)")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens (default: 1024)")
    parser.add_argument("--examples", type=int, default=1000, help="in the data (default: 1000)")
    parser.add_argument("--epochs", type=float, default=3.0, help="(default: 3)")
    parser.add_argument("--train", default="bottom,trunk,top", help="the parts that are trained")
    parser.add_argument("--lora_r", type=int, default=16, help="the LoRA's rank (default: 16)")
    parser.add_argument("--lora_target_modules", default="all-linear", help="its places")
    parser.add_argument("--dtype", default="float32", help="of the weights (default: float32)")
    parser.add_argument("--optimizer", default="adamw", help="(default: adamw)")
    parser.add_argument("--codec", help="of what crosses (default: the most exact that suffices)")
    parser.add_argument("--chunks", type=int, default=0, help="(default: the best for each cut)")
    parser.add_argument("--lean_head", action="store_true", help="as split_lean_head")
    parser.add_argument(
        "--supervised", type=float, default=1.0, help="share of tokens with a loss (default: 1)"
    )
    parser.add_argument(
        "--send_once", action="store_true", help="as split_send_once; steps are of a later epoch"
    )
    parser.add_argument(
        "--gradient_checkpointing", action="store_true", help="at the server: less memory, slower"
    )
    parser.add_argument(
        "--server_on_gpu", action="store_true", help="the server's memory is that of its GPU"
    )
    parser.add_argument("--client_gflops", type=float, help="(default: measured on this machine)")
    parser.add_argument("--server_gflops", type=float, help="(default: as this machine)")
    parser.add_argument("--threads", type=int, help="CPU threads that are measured")
    parser.add_argument("--task", default="causal-lm", help="(default: causal-lm)")
    parser.add_argument("--show", type=int, default=12, help="cuts in the table (default: 12)")
    parser.add_argument("--plot", type=Path, help="where a picture goes, .svg or .png")
    add_format(parser)


def run(args: argparse.Namespace) -> int:
    """Predict every cut and recommend one.

    Raises:
        ConfigError: If an argument makes no sense.
        ModelError: If there is no such model.
        CannotCut: If it cannot be cut, or not be counted.
    """
    _check(args)
    limits = {
        f"{side}_bytes": _quantity(args, f"{side}_memory", "memory")
        for side in ("client", "server")
        if getattr(args, f"{side}_memory")
    }
    down, rtt_s = _quantity(args, "bandwidth", "bandwidth"), _quantity(args, "rtt", "time")
    up = _quantity(args, "upload", "bandwidth") if args.upload else down
    settle(args.threads)

    from cutlayer.cli.planning import machines, pieces_of
    from cutlayer.split.prediction import MOMENTS, Setup
    from cutlayer.split.schedule import Path as Link

    skeleton, pieces, lora = pieces_of(args)
    client, server, measured = machines(args, skeleton, lora)

    def setup(codec: str) -> Setup:
        from cutlayer.cli.planning import bytes_of_token

        return Setup(
            rows=args.batch_size,
            client=client,
            server=server,
            path=Link(up, down, rtt_s),
            token_bytes=bytes_of_token(codec, pieces.dtype),
            train=tuple(args.train.split(",")),
            moments=MOMENTS[args.optimizer],
            lean_head=args.lean_head,
            supervised=args.supervised,
            chunks=args.chunks,
            gradient_checkpointing=args.gradient_checkpointing,
            rows_are_sent=args.send_once,
            server_on_gpu=args.server_on_gpu,
        )

    codec = args.codec or _codec_that_suffices(pieces, setup, limits)
    facts, found, best = _facts(args, pieces, setup(codec), codec, limits)
    facts["machine"] = {
        "load_per_core": os.getloadavg()[0] / (os.cpu_count() or 1),
        "measured_here": measured,
        "client_gflops": client.layer_flops_per_s / 1e9,
        "server_gflops": server.layer_flops_per_s / 1e9,
        "client_head_gflops": client.head_flops_per_s / 1e9,
    }
    if args.plot:
        from cutlayer.cli.plan_picture import draw

        draw(found, best, args.plot, limit_bytes=limits.get("client_bytes"), title=args.model)
    report(args.format, facts, _text(args, facts))
    return 0


def _check(args: argparse.Namespace) -> None:
    from cutlayer.cli.planning import faults

    found = faults(args)
    if found:
        raise ConfigError("; ".join(found))


def _quantity(args: argparse.Namespace, name: str, kind: str) -> float:
    text, units = str(getattr(args, name)), _UNITS[kind]
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]+)", text.strip())
    value = float(match[1]) * units.get(match[2], math.nan) if match else math.nan
    if not math.isfinite(value) or value < 0 or (value == 0 and kind != "time"):
        raise ConfigError(
            f"--{name} {text}: a number and one of {', '.join(units)} is needed, such as "
            f"{ {'memory': '8GB', 'bandwidth': '100Mbit', 'time': '40ms'}[kind] }"
        )
    return value


def _codec_that_suffices(pieces: Pieces, setup: Any, limits: dict[str, float]) -> str:
    """Return the codec that changes least among those that make the step no more than 5% longer."""
    from cutlayer.cli.planning import codecs
    from cutlayer.split.prediction import cuts_of, predict, recommended

    cuts = cuts_of(len(pieces.layers), at_most=120)
    seconds = {}
    for codec in codecs():
        best = recommended([predict(pieces, cut, setup(codec)) for cut in cuts], **limits)
        if best is not None:
            seconds[codec] = best.step.seconds
    fastest = min(seconds.values(), default=0.0)
    return next((name for name, took_s in seconds.items() if took_s <= 1.05 * fastest), "raw")


def _facts(
    args: argparse.Namespace,
    pieces: Pieces,
    setup: Setup,
    codec: str,
    limits: dict[str, float],
) -> tuple[dict[str, Any], list[Prediction], Prediction | None]:
    from cutlayer.split.prediction import cuts_of, predict, recommended

    found = [predict(pieces, cut, setup) for cut in cuts_of(len(pieces.layers))]
    best = recommended(found, **limits)
    steps = math.ceil(args.examples * args.epochs / args.batch_size)
    in_first = math.ceil(args.examples * min(args.epochs, 1.0) / args.batch_size)
    first = dataclasses.replace(setup, rows_are_sent=False)

    def facts_of(each: Prediction) -> dict[str, Any]:
        later_s = each.step.seconds
        first_s = predict(pieces, each.cut, first).step.seconds if args.send_once else later_s
        total_s = first_s * in_first + later_s * (steps - in_first)
        return _row(each, limits) | {"first_epoch_step_s": first_s, "total_s": total_s}

    rows = [facts_of(each) for each in found]
    rows.sort(key=lambda row: (not row["fits"], row["step_s"]))
    facts: dict[str, Any] = {
        "model": args.model,
        "num_layers": len(pieces.layers),
        "parameters": sum(
            piece.parameters for piece in (pieces.before, *pieces.layers, pieces.behind)
        ),
        "batch": [args.batch_size, args.max_length],
        "train": args.train.split(","),
        "dtype": args.dtype,
        "codec": codec,
        "steps": steps,
        "privacy": PRIVACY,
        "recommended": None,
        "cuts": rows,
    }
    if best is not None:
        facts["recommended"] = facts_of(best) | {
            "codec": codec,
            "reason": _reason(args, best, codec, limits),
        }
    else:
        least = min(rows, key=lambda row: row["client_bytes"])
        facts["nothing_fits"] = (
            f"no cut with a layer at both ends fits: the least client memory is "
            f"{_gib(least['client_bytes'])} GiB, at {least['bottom_layers']}+{least['top_layers']} "
            "layers; take a smaller batch, shorter samples, --lean_head or --dtype bfloat16"
        )
    return facts, found, best


def _row(each: Prediction, limits: dict[str, float]) -> dict[str, Any]:
    fields = (
        "bottom_layers top_layers chunks client_bytes server_bytes client_weight_bytes "
        "server_weight_bytes client_state_bytes server_state_bytes up_bytes down_bytes "
        "up_payload_bytes down_payload_bytes client_flops server_flops"
    )
    fits = each.client_bytes <= limits.get("client_bytes", math.inf)
    return {
        "cut": str(each.cut),
        **{name: getattr(each, name) for name in fields.split()},
        "fits": fits and each.server_bytes <= limits.get("server_bytes", math.inf),
        "step_s": each.step.seconds,
        "binds": each.step.binds,
        "utilisation": each.step.utilisation,
        "busy_s": each.step.busy_s,
        "chain_s": each.step.chain_s,
    }


def _reason(
    args: argparse.Namespace, best: Prediction, codec: str, limits: dict[str, float]
) -> str:
    words = {
        "client": "the client's compute",
        "server": "the server's compute",
        "up": "the upload",
        "down": "the download",
        "rtt": "the round trip",
    }
    share = best.step.chain_s[best.step.binds] / best.step.seconds
    within = "within the given memory, " if limits else ""
    exact = "raw is exact and fast enough" if codec == "raw" else f"{codec} shortens the step most"
    if args.codec:
        exact = f"{codec} was asked for"
    elif codec != "raw":
        exact = f"{codec} is the most exact codec that makes the step no more than 5% longer"
    return (
        f"{within}no cut with a layer at both ends is more than 3% faster, and of those as fast "
        f"this one asks least memory of the client; {words[best.step.binds]} takes {share:.0%} of "
        f"the step; {exact}; {best.chunks} chunk{'s' * (best.chunks > 1)} of "
        f"{math.ceil(args.batch_size / best.chunks)} sample(s) hide what can be hidden"
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def _text(args: argparse.Namespace, facts: dict[str, Any]) -> str:
    machine = facts["machine"]
    here = "measured on this machine" if machine["measured_here"] else "as given"
    if machine["measured_here"] and machine["load_per_core"] > _BUSY:
        here += ", which is busy: plan again when it is idle, or give --client_gflops"
    lines = [
        f"{args.model}: {facts['num_layers']} layers, {facts['parameters'] / 1e9:.2f} billion "
        f"parameters; batch {args.batch_size} x {args.max_length}, {args.bandwidth}, {args.rtt}, "
        f"codec {facts['codec']}, {facts['steps']} steps"
        + ("; a step is one of a later epoch, the total has the first" * args.send_once),
        f"client {machine['client_gflops']:.0f} GFLOP/s, server "
        f"{machine['server_gflops']:.0f} GFLOP/s ({here})",
        "",
        "  layers      memory, GiB       MB a step        client  chunks     step    total  binds",
        "  bottom+top  client   server       up   down    TFLOP                 s        h",
    ]
    best = facts["recommended"]
    shown = facts["cuts"][: args.show]
    if best and best["cut"] not in {row["cut"] for row in shown}:
        shown = [next(row for row in facts["cuts"] if row["cut"] == best["cut"]), *shown[:-1]]
    for row in shown:
        mark = "*" if best and row["cut"] == best["cut"] else " " if row["fits"] else "!"
        lines.append(
            f"{mark} {row['bottom_layers']:>3}+{row['top_layers']:<4}    "
            f"{_gib(row['client_bytes']):>8} {_gib(row['server_bytes']):>8} "
            f"{row['up_bytes'] / 1e6:>8.1f} {row['down_bytes'] / 1e6:>6.1f} "
            f"{row['client_flops'] / 1e12:>8.2f} {row['chunks']:>7} {row['step_s']:>9.2f} "
            f"{row['total_s'] / 3600:>8.2f}  {row['binds']}"
        )
    rest = len(facts["cuts"]) - len(shown)
    lines += [f"  and {rest} more: --show N, or --format json"] if rest > 0 else []
    lines += ["", "* recommended   ! does not fit the given memory", ""]
    if best:
        lines.append(
            f"Take split_bottom_layers={best['bottom_layers']}, "
            f"split_top_layers={best['top_layers']}, split_codec={best['codec']}, "
            f"split_chunks={best['chunks']}: {best['reason']}."
        )
    else:
        lines.append(f"Nothing fits: {facts['nothing_fits']}.")
    return "\n".join([*lines, facts["privacy"]])
