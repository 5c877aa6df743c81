"""How few bytes can activations and gradients take before the held-out loss shows it?"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

import cutlayer  # noqa: E402
from benchmarks.codecs.deltas import WAYS, held_out_through, ways_summed  # noqa: E402
from benchmarks.codecs.epochs import changes_between_epochs  # noqa: E402
from benchmarks.codecs.errors import causality_violations, errors_of, speeds  # noqa: E402
from benchmarks.common import (  # noqa: E402
    ROOT,
    Result,
    make_certificates,
    make_workload,
    parser_of,
    scratch,
    settings_of,
)
from benchmarks.processes import Server  # noqa: E402
from cutlayer.wire import cutlayer_pb2 as pb  # noqa: E402
from cutlayer.wire.statics import statics_as_tensors  # noqa: E402

PARTIAL = ROOT / ".data" / "codecs.partial.jsonl"
WORSE = 0.005
"""By how much a held-out loss may exceed that of bf16, at every seed, to count as equal."""
DEMO_TOKENS = 3 * 2100 * 36
"""Of the demo's task: three epochs of its samples of 36 tokens, about."""


@dataclass(frozen=True)
class Plan:
    """How much is trained and scored."""

    rows: int
    columns: int
    batch: int
    epochs: int
    scored: int
    seeds: int
    lr: float = 1e-3

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return self.epochs * -(-self.rows // self.batch)


FULL = Plan(rows=120, columns=96, batch=4, epochs=3, scored=48, seeds=3)
SHORT = Plan(rows=24, columns=96, batch=4, epochs=3, scored=24, seeds=3)
"""Of what is measured in the loop of the unsplit model, and not over the wire."""
QUICK = Plan(rows=48, columns=16, batch=8, epochs=2, scored=4, seeds=1)


def by_departure(up: str, down: str, gradient: str) -> dict[str, str]:
    """Return codecs of a run whose bottom trains nothing."""
    return {"activations_up": up, "activations_down": down, "gradients_up": gradient}


CODECS: dict[str, str | dict[str, str]] = {
    "bf16": "bf16",
    "klt1_rotated1": by_departure("klt1", "klt1", "rotated1"),
    "klt2_rotated1": by_departure("klt2", "klt2", "rotated1"),
    "klt2_rotated2": by_departure("klt2", "klt2", "rotated2"),
    "rotated2": by_departure("rotated2", "rotated2", "rotated2"),
    "rotated3": by_departure("rotated3", "rotated3", "rotated3"),
    "rotated4": by_departure("rotated4", "rotated4", "rotated4"),
    "int8": "int8",
}
_ONCE = "once"
CODECS |= {
    "_".join([_ONCE, *names]): by_departure(*names)
    for names in (
        ("rotated4", "rotated3", "rotated3"),
        ("rotated4", "rotated3", "rotated2"),
        ("rotated4", "klt2", "rotated3"),
        ("rotated4", "klt2", "rotated2"),
        ("rotated3", "rotated3", "rotated2"),
        ("rotated3", "klt2", "rotated3"),
        ("klt2", "rotated3", "rotated2"),
        ("klt2", "klt2", "rotated3"),
        ("rotated4", "rotated4", "rotated4"),
        ("rotated4", "rotated6", "rotated4"),
        ("rotated4", "rotated6", "rotated3"),
        ("klt2", "rotated6", "rotated4"),
        ("rotated6", "rotated6", "rotated6"),
        ("rotated4", "rotated4", "waterfill3"),
        ("rotated4", "rotated3", "waterfill3"),
        ("rotated6", "rotated3", "waterfill3"),
        ("rotated6", "rotated4", "waterfill2"),
        ("rotated4", "rotated6", "waterfill3"),
        ("rotated4", "rotated6", "waterfill2"),
        ("rotated4", "rotated4", "waterfill2"),
        ("rotated4", "rotated3", "waterfill2"),
        ("rotated4", "rotated3", "waterfill1"),
        ("rotated4", "rotated2", "waterfill2"),
        ("rotated3", "rotated3", "waterfill2"),
        ("rotated3", "rotated3", "waterfill1"),
        ("klt2", "rotated3", "waterfill2"),
        ("rotated4", "klt2", "waterfill2"),
        ("rotated5", "rotated3", "waterfill3"),
        ("rotated5", "rotated3", "waterfill2.5"),
        ("rotated6", "rotated3", "waterfill2.5"),
        ("rotated5", "rotated6", "waterfill2.5"),
        # One departure at a time.
        ("rotated4", "bf16", "bf16"),
        ("bf16", "klt2", "bf16"),
        ("bf16", "rotated2", "bf16"),
        ("bf16", "rotated3", "bf16"),
        ("bf16", "bf16", "waterfill2"),
    )
}
"""Where a name begins with `once`, a row's activations go up in its first epoch only."""


@dataclass(frozen=True)
class Setting:
    """What is trained: on which positions there is a loss, and what the client keeps."""

    name: str
    top_layers: int
    loss_share: float


SETTINGS = (Setting("equal_loss", 2, 1.0), Setting("instruct", 0, 0.3))


@dataclass(frozen=True)
class Task:
    """Rows to train on and to score."""

    train_RT: Tensor
    held_RT: Tensor

    def batch(self, rows_BT: Tensor, share: float) -> dict[str, Tensor]:
        """Return rows as a model takes them; only the last share of each carries loss."""
        labels_BT = rows_BT.clone()
        labels_BT[:, : round((1 - share) * rows_BT.shape[1])] = -100
        return {
            "input_ids": rows_BT,
            "attention_mask": torch.ones_like(rows_BT),
            "labels": labels_BT,
        }

    def epochs(self, plan: Plan, share: float, seed: int) -> Iterator[dict[str, Tensor]]:
        """Yield the batches of all epochs, each in an order of its own."""
        drawn = random.Random(seed)
        for _ in range(plan.epochs):
            order = list(range(len(self.train_RT)))
            drawn.shuffle(order)
            for start in range(0, len(order), plan.batch):
                yield self.batch(self.train_RT[order[start : start + plan.batch]], share)


class Runs:
    """Everything that a run needs: a server for each setting, the unsplit model, the text."""

    def __init__(self, stack: ExitStack, args: Any, plan: Plan) -> None:
        folder = stack.enter_context(scratch())
        count = -(-(plan.rows + plan.scored) // plan.batch)
        self.workload = make_workload(
            args, folder, rows=plan.batch, columns=plan.columns, batches=count
        )
        from safetensors.torch import load_file

        rows_RT = load_file(self.workload.tokens)["tokens"].flatten(0, 1)
        scored = min(plan.scored, len(rows_RT) // 3)
        self.task = Task(rows_RT[: min(plan.rows, len(rows_RT) - scored)], rows_RT[-scored:])
        self.plan, self.short, self.short_task = plan, plan, self.task
        if not args.quick:
            self.short, last = SHORT, SHORT.rows + SHORT.scored
            self.short_task = Task(rows_RT[: SHORT.rows], rows_RT[SHORT.rows : last])
        self.dtype = "float32" if args.quick else "bfloat16"
        self.certificates = make_certificates(folder / "certs")
        self.servers = {}
        for setting in SETTINGS:
            (folder / setting.name).mkdir()
            self.servers[setting.name] = stack.enter_context(
                Server(
                    self.workload,
                    self.certificates,
                    folder / setting.name,
                    top_layers=setting.top_layers,
                    passive=True,
                    dtype=self.dtype,
                    send_once_ttl_s=86400,
                )
            )
        whole = AutoModelForCausalLM.from_pretrained(
            self.workload.model, dtype=getattr(torch, self.dtype)
        )
        self.unsplit = get_peft_model(whole, self.lora()).eval()

    @staticmethod
    def lora() -> LoraConfig:
        """Return the adapter that all runs train."""
        return LoraConfig(
            r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )

    def connect(self, setting: Setting, name: str, seed: int) -> Any:
        """Return the split model of a run."""
        return cutlayer.connect(
            self.workload.model,
            server=f"127.0.0.1:{self.servers[setting.name].port}",
            ca=self.certificates.ca,
            cert=self.certificates.cert,
            key=self.certificates.key,
            bottom_layers=2,
            top_layers=setting.top_layers,
            dtype=self.dtype,
            codec=CODECS[name],
            send_once=name.startswith(_ONCE),
            peft_config=self.lora(),
            train=("trunk",),
            lean_head=setting.loss_share < 1,
            seed=seed,
        )

    @torch.no_grad()
    def held_out_loss(self, adapter: dict[str, Tensor] | None, share: float) -> float:
        """Return the unsplit model's loss with an adapter, no codec anywhere."""
        if adapter is not None:
            set_peft_model_state_dict(self.unsplit, adapter)
        total = 0.0
        with self.unsplit.disable_adapter() if adapter is None else _nothing():
            for row_T in self.task.held_RT:
                total += float(self.unsplit(**self.task.batch(row_T[None], share)).loss)
        return total / len(self.task.held_RT)

    def train(self, setting: Setting, name: str, seed: int) -> dict[str, float]:
        """Train a run and return its held-out loss and the bytes that crossed the wire."""
        began_s = time.perf_counter()
        with self.connect(setting, name, seed) as split:
            trained = [p for p in split.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW([{"params": trained}], lr=self.plan.lr)
            clip = cutlayer.attach(optimizer, split).clip_grad_norm_
            split.train()
            traffic = split.connection.traffic
            losses, at_step, rows_sent = [], [], []
            for step, batch in enumerate(self.task.epochs(self.plan, setting.loss_share, seed)):
                # Down to nothing in a straight line, which is what a Trainer does.
                optimizer.param_groups[0]["lr"] = self.plan.lr * (1 - step / self.plan.steps)
                loss = split(**batch, use_cache=False).loss
                loss.backward()
                clip(split.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                # Requests keep their order: with this answer all of the step's bytes are there.
                split.connection.request(pb.Head(zero_grad=pb.ZeroGrad())).wait()
                losses.append(float(loss.detach()))
                rows_sent.append(split.by_rows.once.sent_bytes if split.by_rows else 0)
                at_step.append(traffic.sent_bytes + traffic.received_bytes)
            statics = statics_as_tensors(split.connection.statics)
            adapter = split.whole_adapter()
        steps, tokens = len(at_step), self.plan.batch * self.plan.columns
        # At the end of a run statics are learnt; what the others took more is paid once.
        last = at_step[-steps // 3 :]
        steady = statistics.median(b - a for a, b in itertools.pairwise(last))
        # Once statics are learnt, a step of the first epoch takes so much that comes once a row.
        first = steps // self.plan.epochs
        rows = rows_sent[first - 1] - rows_sent[first - 2]
        return {
            "held_out": self.held_out_loss(adapter, setting.loss_share),
            "train_loss_last": statistics.fmean(losses[-steps // 3 :]),
            "bytes_per_token": at_step[-1] / (steps * tokens),
            "steady_bytes_per_token": steady / tokens,
            "rows_bytes_per_token": rows / tokens,
            "once_bytes": at_step[-1] - steps * steady - first * rows,
            "statics_bytes": float(sum(tensor.nbytes for tensor in statics.values())),
            "seconds": time.perf_counter() - began_s,
        }

    def changes(self) -> dict[str, float]:
        """Return what activations do between epochs of the unsplit run."""
        return changes_between_epochs(
            self.workload.model,
            self.short_task.train_RT,
            epochs=self.short.epochs,
            batch=self.short.batch,
            rates=(self.short.lr, self.short.lr / 5)[: self.short.seeds],
            dtype=self.dtype,
        )

    def way(self, name: str, seed: int) -> dict[str, float]:
        """Return the held-out loss of a run whose trunk's output comes down that way."""
        return held_out_through(
            WAYS[name],
            self.workload.model,
            self.short_task.train_RT,
            self.short_task.held_RT,
            epochs=self.short.epochs,
            batch=self.short.batch,
            rate=self.short.lr,
            seed=seed,
            dtype=self.dtype,
        )


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def is_wanted(key: str, args: Any) -> bool:
    """Say whether a run belongs to the result: all do, or what was measured before."""
    return not args.so_far or f'"key": "{key}"' in PARTIAL.read_text()


def measured(key: str, args: Any, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return what was measured before under this key, or measure it now and keep it."""
    if not args.quick and PARTIAL.exists():
        for line in map(json.loads, PARTIAL.read_text().splitlines()):
            if line["key"] == key:
                return line["figures"]
    figures = measure()
    print(key, {name: round(value, 4) for name, value in figures.items()}, flush=True)
    if not args.quick:
        with PARTIAL.open("a") as file:
            file.write(json.dumps({"key": key, "figures": figures}) + "\n")
    return figures


def jobs_of(plan: Plan, quick: bool) -> list[tuple[Setting, str, int]]:
    """Return what is trained, the most telling first."""
    whole, instruct = SETTINGS
    once = [name for name in CODECS if name.startswith(_ONCE)]
    if quick:
        names = ("bf16", "int8", "klt1_rotated1", once[0])
        return [(whole, name, 0) for name in names] + [(instruct, "bf16", 0)]
    order = (
        (whole, ["bf16", "rotated4", "klt2_rotated2", "klt2_rotated1"]),
        (instruct, ["bf16", "klt2_rotated2"]),
        (whole, ["klt1_rotated1", "rotated2", "int8", "rotated3", *once]),
        (instruct, ["rotated3", *once]),
    )
    return [
        (setting, name, seed)
        for seed in range(plan.seeds)
        for setting, names in order
        for name in names
    ]


def summed(
    name: str,
    by_seed: dict[int, dict[str, float]],
    base: dict[int, dict[str, float]],
    *,
    width: int,
    epochs: int,
) -> Any:
    """Return the figures of a codec over its seeds, against those of bf16."""
    plain, runs = 8 * width, list(by_seed.values())
    steady = statistics.fmean(run["steady_bytes_per_token"] for run in runs)
    once = statistics.fmean(run["once_bytes"] for run in runs)
    rows = statistics.fmean(run.get("rows_bytes_per_token", 0.0) for run in runs)
    found = statistics.fmean(run["held_out"] for run in runs)
    pairs = [
        run["held_out"] / base[seed]["held_out"] - 1
        for seed, run in by_seed.items()
        if seed in base
    ]
    return {
        f"{name}_ratio": statistics.fmean(run["bytes_per_token"] for run in runs) / plain,
        f"{name}_ratio_steady": steady / plain,
        f"{name}_ratio_at_demo_size": (steady + rows / epochs + once / DEMO_TOKENS) / plain,
        f"{name}_held_out": found,
        f"{name}_held_out_min": min(run["held_out"] for run in runs),
        f"{name}_held_out_max": max(run["held_out"] for run in runs),
        f"{name}_train_loss": statistics.fmean(run["train_loss_last"] for run in runs),
        f"{name}_over_bf16": statistics.fmean(pairs),
        f"{name}_over_bf16_worst": max(pairs),
        f"{name}_seeds": float(len(runs)),
        f"{name}_statics_bytes": runs[0]["statics_bytes"],
    }


def main() -> None:
    """Train with each codec, and measure each one's error and speed."""
    parser = parser_of(__doc__)
    parser.add_argument("--so-far", action="store_true", help="write what was measured before")
    parser.add_argument("--only", nargs="+", help="measure these, each 'SETTING CODEC SEED'")
    args = parser.parse_args()
    plan = QUICK if args.quick else FULL
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    with ExitStack() as stack:
        runs = Runs(stack, args, plan)
        width = runs.workload.width
        found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
        jobs = {f"{job[0].name} {job[1]} {job[2]}": job for job in jobs_of(plan, args.quick)}
        for key in args.only or jobs:
            setting, name, seed = jobs[key]
            kept = f"{key} {plan.steps} steps"
            if not is_wanted(kept, args):
                continue
            one = measured(kept, args, lambda s=setting, n=name, d=seed: runs.train(s, n, d))
            found.setdefault((setting.name, name), {})[seed] = one
        if args.only:
            return
        for (setting, name), by_seed in found.items():
            base = found[setting, "bf16"]
            figures |= summed(f"{setting}.{name}", by_seed, base, width=width, epochs=plan.epochs)
        for setting in SETTINGS:
            figures[f"{setting.name}.untrained_held_out"] = measured(
                f"{setting.name} untrained {plan.steps} steps",
                args,
                lambda s=setting: {"loss": runs.held_out_loss(None, s.loss_share)},
            )["loss"]
        short = runs.short_task
        figures |= measured(
            "errors",
            args,
            lambda: errors_of(runs.workload.model, short.train_RT[:16], short.held_RT[:12]),
        )
        if is_wanted("epochs", args):
            figures |= measured("epochs", args, runs.changes)
        figures |= ways_summed(
            {
                name: [
                    measured(f"way {name} {seed}", args, lambda n=name, d=seed: runs.way(n, d))
                    for seed in range(plan.seeds)
                    if is_wanted(f"way {name} {seed}", args)
                ]
                for name in (["plain", "delta1"] if args.quick else WAYS)
            }
        )
        settings = settings_of(runs.workload, args, plan=asdict(plan), compute_dtype=runs.dtype)
    figures |= speeds(tokens=256 if args.quick else 4096, width=576)
    figures["gb_per_s"] = figures["speed.rotated4_both_gb_s"]
    figures["causality_violations"] = float(causality_violations())
    best = {}
    for setting in SETTINGS:
        equal = {
            figures[f"{setting.name}.{name}_ratio_at_demo_size"]: name
            for of, name in found
            if of == setting.name
            and figures[f"{of}.{name}_over_bf16_worst"] <= WORSE
            and len(found[of, name]) == len(found[of, "bf16"])
        }
        if equal:  # of a setting that was measured
            figures[f"bytes_ratio_{setting.name}"] = min(equal)
            best[setting.name] = equal[min(equal)]
    settings |= {
        "bytes": "all that crossed the stream both ways: heads, norms, masks, optimizer steps too",
        "cut_1": "uploaded in every epoch, but for codecs whose name begins with 'once'",
        "bytes_ratio_is_of": best,
        "demo_tokens": DEMO_TOKENS,
        "lora": {"rank": 8, "target_modules": ["q_proj", "v_proj"], "parts": ["trunk"]},
        "dtype": runs.dtype,
        "codecs": dict(CODECS),
    }
    Result(figures, settings).write(args, HOME)


if __name__ == "__main__":
    main()
