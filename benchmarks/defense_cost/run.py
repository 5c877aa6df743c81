"""What does the audit take a sequence, and what does each defense add to a training step?"""

from __future__ import annotations

import functools
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

from benchmarks.common import (  # noqa: E402
    Result,
    Workload,
    make_workload,
    parser_of,
    scratch,
    settings_of,
)
from benchmarks.defense_cost.steps import contestants  # noqa: E402
from benchmarks.one_process import Site  # noqa: E402
from cutlayer.audit.candidates import CandidateTable  # noqa: E402
from cutlayer.audit.forward_search import SearchSettings, forward_search  # noqa: E402
from cutlayer.audit.inverter import learned_inversion, train_inverter  # noqa: E402
from cutlayer.audit.labels import label_inversion  # noqa: E402
from cutlayer.audit.public import PublicModel  # noqa: E402
from cutlayer.audit.traffic import made_here, texts_of  # noqa: E402
from cutlayer.split.cut import Trunk  # noqa: E402

NSR = 0.5
"""Noise over the root mean square, for the search through noise."""


def cpu_s(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds, and the result."""
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def overheads(site: Site, batches_KBT: Tensor, rounds: int, folder: Path) -> dict[str, float]:
    """Return each defense's step over the undefended one of the same round, the median."""
    light, heavy = contestants(site, folder)
    every = {**light, **heavy}
    cpus: dict[str, list[float]] = {name: [] for name in every}
    owns: dict[str, list[float]] = {name: [] for name in light}
    draw = random.Random(0)
    for number in range(rounds + 1):
        ids_BT = batches_KBT[number % len(batches_KBT)]
        # Whoever comes first would pay for what the one before left in caches and memory.
        light["none"].step(ids_BT)
        for name in [*draw.sample([*light], len(light)), *heavy]:
            own = every[name].own
            before = own.cpu_s if own else 0.0
            cpu, _ = cpu_s(functools.partial(every[name].step, ids_BT))
            if number:  # the first round allocates
                cpus[name].append(cpu)
                if own:
                    owns[name].append(own.cpu_s - before)
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    bare = statistics.median(cpus["none"])
    figures = {"step_cpu_s_none": bare}
    for name in list(every)[1:]:
        ratios = [one / none for one, none in zip(cpus[name], cpus["none"], strict=True)]
        figures[f"ratio_{name}"] = statistics.median(ratios)
        figures |= {f"ratio_{name}_min": min(ratios), f"ratio_{name}_max": max(ratios)}
    for name in list(light)[1:]:
        figures[f"own_share_{name}"] = statistics.median(owns[name]) / bare
    return figures


def audit(site: Site, workload: Workload, ids: Tensor, *, quick: bool) -> dict[str, float]:
    """Return what each attack takes a sequence."""
    layers = site.anatomy.num_layers
    public = PublicModel.load(
        workload.model, bottom_layers=site.cut.lower, top_layers=layers - site.cut.upper
    )
    length, searched, inverted = (8, 2, 2) if quick else (24, 2, 4)
    rows = [(row, row) for row in ids[: length * max(searched, inverted)].view(-1, length)]
    table = CandidateTable(public)
    clean = texts_of(made_here(public, rows[:searched], gradients=False))
    truth = [text.ids_T for text in clean]
    first, _ = cpu_s(table.learn_all)
    plain, found = cpu_s(
        lambda: forward_search(public, [t.smashed_TD for t in clean], truth, table=table)
    )
    sigma = NSR * float(clean[0].smashed_TD.square().mean().sqrt())
    noisy = [t.smashed_TD + sigma * torch.randn_like(t.smashed_TD) for t in clean]
    settings = SearchSettings(score="map", sigma=sigma, beams=4, rungs=(256, 4096))
    through, _ = cpu_s(lambda: forward_search(public, noisy, truth, settings, table=table))
    texts = list(ids.view(-1, length))[: 64 if quick else 256]
    learning, inverter = cpu_s(lambda: train_inverter(public, texts))
    reading, _ = cpu_s(lambda: learned_inversion(inverter, [t.smashed_TD for t in clean], truth))
    trunk = Trunk(site.shared.model, site.anatomy, site.cut)
    sent = made_here(public, rows[:inverted], batch=inverted, trunk=trunk)
    outs = [d.trunk_out_BTD for d in sent if d.trunk_out_BTD is not None]
    labels, labelled = cpu_s(lambda: label_inversion(public, sent, outs))
    return {
        "a1_cpu_s_per_sequence": plain / searched,
        "a1_noisy_cpu_s_per_sequence": through / searched,
        "a1_table_cpu_s": first,
        "a1_trr": found.trr,
        "a2_training_cpu_s": learning,
        "a2_training_cpu_s_per_text": learning / len(texts),
        "a2_cpu_s_per_sequence": reading / searched,
        "a4_cpu_s_per_sequence": labels / inverted,
        "a4_trr": labelled.trr,
        "tokens_per_sequence": length,
    }


def main() -> None:
    """Measure both."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="counted steps of each contestant")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with scratch() as folder:
        from safetensors.torch import load_file

        workload = make_workload(args, folder, rows=2, columns=128, batches=48)
        rounds = 2 if args.quick else args.rounds
        settings = settings_of(workload, args, rounds=rounds, cut=[2, 2], threads=1)
        del settings["tls"]
        batches_KBT = load_file(workload.tokens)["tokens"]
        site = Site(workload.model, bottom_layers=2, top_layers=2)
        figures = overheads(site, batches_KBT, rounds, folder)
        figures |= audit(site, workload, batches_KBT.flatten(), quick=args.quick)
    Result(figures, settings).write(args, HOME)


if __name__ == "__main__":
    main()
