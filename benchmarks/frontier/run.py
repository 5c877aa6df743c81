"""What does a defense leave of the task, and of the text, when the trunk may adapt to it?"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

from benchmarks.common import (  # noqa: E402
    Result,
    make_workload,
    parser_of,
    scratch,
    settings_of,
)
from benchmarks.frontier.attacks import Attacker  # noqa: E402
from benchmarks.frontier.conditions import Condition, conditions  # noqa: E402
from benchmarks.frontier.plot import draw  # noqa: E402
from benchmarks.frontier.task import Task  # noqa: E402
from benchmarks.one_process import Run, Site  # noqa: E402

PARTIAL = HOME.parents[1] / ".data" / "frontier.partial.jsonl"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is done at each point."""

    steps: int
    batch: int
    lr: float
    scored: int
    """Held-out samples that are scored."""
    searched: int
    """Held-out wordings that are searched token by token."""
    listed: int
    """Held-out wordings that are sought among all known ones."""
    tried: int
    """Held-out batches whose answers are sought by trying each; the first is inverted too."""
    seeds: int


FULL = Plan(steps=12, batch=8, lr=2e-3, scored=75, searched=8, listed=48, tried=4, seeds=3)
QUICK = Plan(steps=2, batch=2, lr=2e-3, scored=6, searched=2, listed=4, tried=2, seeds=1)


def train(run: Run, task: Task, plan: Plan, seed: int) -> None:
    """Train both sides for a few steps: warm up, then a cosine."""
    parameters = run.parameters
    optimizer = torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=0.0)
    run.client.train()
    for step, batch in enumerate(task.batches(plan.steps, plan.batch, seed)):
        share = min(1.0, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / plan.steps))
        optimizer.param_groups[0]["lr"] = plan.lr * share
        logits_BV = run.last_logits(*batch.sent)
        target_B = task.answers_A[batch.answer_B]
        nn.functional.cross_entropy(logits_BV, target_B).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def score(run: Run, task: Task, plan: Plan) -> dict[str, float]:
    """Return accuracy among the answers and the mean loss, of held-out samples.

    They leave through the defense too, as at inference.
    """
    run.client.eval()
    right, loss, count = 0, 0.0, 0
    for batch in task.held_out(plan.scored, 25):
        logits_BV = run.last_logits(*batch.sent)
        target_B = task.answers_A[batch.answer_B]
        loss += float(nn.functional.cross_entropy(logits_BV, target_B, reduction="sum"))
        right += int((logits_BV[:, task.answers_A].argmax(1) == batch.answer_B).sum())
        count += len(target_B)
    return {"accuracy": right / count, "loss": loss / count}


def trained(
    condition: Condition, seed: int, site: Site, task: Task, plan: Plan
) -> dict[str, float]:
    """Return what a model scores that was trained through a defense."""
    began = time.process_time()
    run = site.run(train=condition.train, defenses=condition.defenses(), seed=seed)
    train(run, task, plan, seed)
    return score(run, task, plan) | {"cpu_s": time.process_time() - began}


def attacked(condition: Condition, task: Task, plan: Plan, attacker: Attacker) -> dict[str, float]:
    """Return what is read of what leaves through a defense.

    The bottom is frozen and the top's adapter begins at nothing, so no training changes it.
    """
    began = time.process_time()
    defense = next(iter(condition.defenses()), None)
    found: dict[str, float] = {}
    if condition.channel != "gradients":
        pool = [*task.train, *task.test]
        found |= attacker.read_text(task.test[: plan.listed], defense, pool, searched=plan.searched)
    if condition.channel != "activations" and "trunk" in condition.train:
        batches = [
            task.test[start : start + plan.batch]
            for start in range(0, plan.tried * plan.batch, plan.batch)
        ]
        found |= attacker.read_answers(batches, defense, inverted=1)
    return found | {"cpu_s": time.process_time() - began}


class Kept:
    """What was measured so far, on disk, so that a run that was killed goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        self._rows = {(row["what"], row["settings"]): row["found"] for row in rows}

    def get(
        self, what: str, settings: str, measure: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """Return what is kept under a name with these settings, measured now if it is not."""
        if (what, settings) not in self._rows:
            found = self._rows[what, settings] = measure()
            row = {"what": what, "settings": settings, "found": found}
            with self._path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            numbers = {name: round(value, 3) for name, value in found.items()}
            print(what, numbers, file=sys.stderr, flush=True)
        return self._rows[what, settings]

    def has(self, what: str, settings: str) -> bool:
        """Say whether something is kept under a name with these settings."""
        return (what, settings) in self._rows


def over_seeds(key: str, found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return means over seeds, and the lowest and highest of each."""
    figures: dict[str, float] = {f"{key}_seeds": len(found)}
    for name in ("accuracy", "loss"):
        values = [row[name] for row in found]
        figures[f"{key}_{name}"] = sum(values) / len(values)
        figures |= {f"{key}_{name}_min": min(values), f"{key}_{name}_max": max(values)}
    return figures


def main() -> None:
    """Train and attack at every point."""
    parser = parser_of(__doc__)
    parser.add_argument("--partial", type=Path, default=PARTIAL, help="what is done, to go on from")
    parser.add_argument(
        "--so-far", action="store_true", help="write what is there, measure nothing"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = QUICK if args.quick else FULL
    with scratch() as folder:
        workload = make_workload(args, folder, rows=1, columns=8, batches=1)
        settings = settings_of(workload, args, **dataclasses.asdict(plan), cut=[2, 2])
        for meaningless in ("batch", "tls"):
            del settings[meaningless]
        settings["batch"] = plan.batch
        task = (
            Task.tiny(HOME.parents[1] / "LICENSE")
            if args.quick
            else Task.of_icd10(args.model, args.text.parent)
        )
        site = Site(workload.model, bottom_layers=2, top_layers=2)
        attacker = Attacker(site, task, workload.model, whole=True)
        scales = attacker.scales(task.train[:64], plan.batch)
        listed = conditions(scales)
        if args.quick:
            listed = [c for n, c in enumerate(listed) if n < 2 or n % 5 == 4]
        kept = Kept(folder / "partial.jsonl" if args.quick else args.partial)
        # The commit is not among these: a mended typo must not cost an hour.
        of_training, of_attacks = (
            json.dumps(
                [settings["versions"], settings["model"], *(getattr(plan, n) for n in names)]
            )
            for names in (
                ("steps", "batch", "lr", "scored"),
                ("batch", "searched", "listed", "tried"),
            )
        )
        figures = {
            "guessing_accuracy": task.guessing(plan.scored),
            "guessing_listed": attacker.guessing(
                task.test[: plan.listed], [*task.train, *task.test]
            ),
            "guessing_tried": 1 / len(task.answers_A),
        }
        read: dict[str, dict[str, float]] = {}
        scored: dict[str, list[dict[str, float]]] = {}
        for seed in range(plan.seeds):  # outermost, so that what is there early compares
            for c in listed:
                works = {
                    f"attacks {c.key}": (of_attacks, partial(attacked, c, task, plan, attacker)),
                    f"seed {seed} {c.key}": (
                        of_training,
                        partial(trained, c, seed, site, task, plan),
                    ),
                }
                if args.so_far and not all(kept.has(w, key) for w, (key, _) in works.items()):
                    continue
                read[c.key], of_seed = (kept.get(w, *rest) for w, rest in works.items())
                scored.setdefault(c.key, []).append(of_seed)
        for key, rows in scored.items():
            figures |= over_seeds(key, rows)
            figures |= {f"{key}_{name}": v for name, v in read[key].items() if name != "cpu_s"}
    points = [
        {
            "key": c.key,
            "name": c.name,
            "channel": c.channel,
            "parameter": c.parameter,
            "strength": c.strength,
            "train": list(c.train),
            "defenses": [defense.describe() for defense in c.defenses()],
        }
        for c in listed
        if c.key in scored
    ]
    settings |= {"scales": dataclasses.asdict(scales), "points": points}
    result = Result(figures, settings)
    result.write(args, HOME)
    if not args.quick:
        path = args.output or HOME / "results" / f"{result.machine}-{result.commit}.json"
        draw(dataclasses.asdict(result), path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
