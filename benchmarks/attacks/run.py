"""What does a server read of real text on real weights?"""

# Shapes:  B batch   T tokens   D model width   N rows

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parents[1]))

from benchmarks.attacks import texts as real  # noqa: E402
from benchmarks.attacks.victim import Victim, rounded, write_gpt2  # noqa: E402
from benchmarks.common import (  # noqa: E402
    Result,
    commit,
    make_workload,
    parser_of,
    scratch,
    settings_of,
)
from cutlayer.audit.finding import Finding  # noqa: E402
from cutlayer.audit.forward_search import SearchSettings  # noqa: E402
from cutlayer.audit.inverter import learned_inversion  # noqa: E402
from cutlayer.privacy.defenses import defense_of  # noqa: E402

PARTIAL = HOME.parents[1] / ".data" / "attacks.partial.jsonl"
Part = Callable[[], dict[str, float]]


def rated(name: str, found: Finding, *, measure: str = "") -> dict[str, float]:
    """Return a rate with its interval and its n."""
    low, high = found.trr_ci
    return {
        f"{name}{measure}": found.trr,
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_prior": found.prior_trr,
        f"{name}_sequences": found.sequences,
        f"{name}_tokens": found.tokens,
    }


def _top_tenth(grad_BTD: Tensor) -> Tensor:
    least = grad_BTD.abs().flatten().kthvalue(int(0.9 * grad_BTD.numel())).values
    return grad_BTD * (grad_BTD.abs() > least)


def _clipped(grad_BTD: Tensor) -> Tensor:
    norms_BT1 = grad_BTD.norm(dim=-1, keepdim=True)
    middle = norms_BT1[norms_BT1 > 0].median()
    return grad_BTD * (middle / norms_BT1.clamp_min(1e-30)).clamp_max(1)


class Parts:
    """The attacks, one after the other: what decides first."""

    def __init__(self, model: str, text: Path, scratch_folder: Path, quick: bool) -> None:
        """Begin with a model and the file of diagnosis wordings."""
        self.quick, self.skipped = quick, {}
        self.smollm, self._text = Victim(model), text
        self._gpt2 = scratch_folder / "gpt2"
        self.many, self.few = (4, 2) if quick else (64, 8)

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Return token ids; of the quick form's tiny model, bytes."""
        if self.quick:
            return [torch.tensor(list(text.encode()[:64])) for text in texts]
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.smollm.model)
        return [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]

    def wordings(self, name: str, count: int) -> list[Tensor]:
        """Return diagnosis wordings of `train.jsonl` or `test.jsonl`, of 3 tokens or more."""
        if self.quick:
            texts = (HOME.parents[1] / "LICENSE").read_text().split("\n\n")[:count]
        else:
            texts = real.wordings(self._text.with_name(name), count)
        return [ids_T for ids_T in self.encode(texts) if len(ids_T) > 2]

    def begun(self, count: int, tokens: int) -> list[Tensor]:
        """Return the beginnings of held-out wordings."""
        longer = [ids_T for ids_T in self.wordings("test.jsonl", 200) if len(ids_T) >= 4]
        return [ids_T[:tokens] for ids_T in longer[:count]]

    def joined(self, count: int, tokens: int) -> list[Tensor]:
        """Return pieces of one length of wordings that are joined to a text."""
        return _cut_up(self.wordings("train.jsonl", 4000), count, tokens)

    def all(self) -> Iterator[tuple[str, Part]]:
        """Yield the name of each part and what makes its figures."""
        tokens, length = (4, 12) if self.quick else (8, 32)
        yield "a1 clean", partial(self._a1_clean, tokens)
        for top in (0, 1, 2):
            yield f"a4 m{top}", partial(self._a4, f"a4_m{top}", self.many, length, top_layers=top)
        yield "a4 answers", partial(self._a4, "a4_answers_m2", self.many, length, answers=6)
        yield "a2 cut 2", partial(self._a2, 2)
        for longer in () if self.quick else (128, 256):
            yield f"a4 {longer}", partial(self._a4, f"a4_length_{longer}_m2", 8, longer)
        for top in () if self.quick else (4, 8):
            yield f"a4 m{top}", partial(self._a4, f"a4_m{top}", 16, length, top_layers=top)
        yield "a1 refused", partial(self._a1_refused, tokens)
        yield "a4 defended", partial(self._a4_defended, length)
        yield "gpt2", self._gpt2_shaped
        if self.quick:
            return
        for name, fetch in (("emails", real.emails), ("reviews", real.reviews)):
            yield name, partial(self._fetched, name, fetch)
        yield "a1 noise", partial(self._a1_noise, 6)
        for bottom in (8, 16):
            yield f"a1 cut {bottom}", partial(self._a1_cut, bottom, 6)
            yield f"a2 cut {bottom}", partial(self._a2, bottom)
        yield "a2 noise", self._a2_noise

    def _a1_clean(self, tokens: int) -> dict[str, float]:
        found = self.smollm.search(self.begun(self.many, tokens))
        return rated("a1_clean", found, measure="_trr") | {
            "a1_exact": found.exact,
            "prior_trr": found.prior_trr,
            "a1_seconds_per_token": found.extra["seconds_per_token"],
            "a1_candidates_median": found.extra["candidates_median"],
        }

    def _a1_cut(self, bottom: int, tokens: int) -> dict[str, float]:
        found = self.smollm.search(self.begun(16, tokens), bottom_layers=bottom)
        return rated(f"a1_cut_{bottom}", found)

    def _a1_refused(self, tokens: int) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)

        def permuted(rows_TD: Tensor) -> Tensor:
            return torch.stack(
                [row_D[torch.randperm(len(row_D), generator=generator)] for row_D in rows_TD]
            )

        def turned(rows_TD: Tensor) -> Tensor:
            width = rows_TD.shape[1]
            secret = torch.Generator().manual_seed(1)
            return rows_TD @ torch.linalg.qr(torch.randn(width, width, generator=secret))[0]

        def half(rows_ND: Tensor) -> Tensor:
            return rows_ND.bfloat16().float()

        known = {"bf16": half, "int8": partial(rounded, bits=8), "int4": partial(rounded, bits=4)}
        kinds = {
            name: (of, SearchSettings(score="quant", release=of)) for name, of in known.items()
        }
        kinds |= {
            "permutation": (permuted, SearchSettings(score="sorted_l1")),
            "rotation": (turned, SearchSettings(score="gram")),
        }
        figures: dict[str, float] = {}
        for name, (change, settings) in kinds.items():
            found = self.smollm.search(
                self.begun(self.few, tokens), change=change, settings=settings
            )
            figures |= rated(f"a1_{name}", found)
        return figures

    def _a1_noise(self, tokens: int) -> dict[str, float]:
        figures: dict[str, float] = {}
        defenses = {f"gaussian_{nsr}": defense_of("gaussian", nsr=nsr) for nsr in (0.5, 2.0)}
        defenses["ldp_8"] = defense_of("ldp_sequence", clip=1.0, epsilon=8.0, delta=1e-6)
        for name, defense in defenses.items():

            def defended(rows_TD: Tensor, of: Any = defense) -> Tensor:
                return of.apply(rows_TD[None])[0]

            settings = SearchSettings(rungs=(256, 2048), eps=0.0)
            found = self.smollm.search(
                self.begun(self.few, tokens), change=defended, settings=settings
            )
            figures |= rated(f"a1_{name}", found)
        return figures

    def _a2(self, bottom: int) -> dict[str, float]:
        victims = self.wordings("test.jsonl", self.many if not self.quick else 8)
        aux = self.wordings("train.jsonl", 2100)
        inverter = self.smollm.taught(aux, bottom_layers=bottom)
        found = self.smollm.learned(inverter, victims, bottom_layers=bottom)
        name = "a2_in_domain" if bottom == 2 else f"a2_cut_{bottom}"
        return rated(name, found, measure="_trr") | {f"{name}_rouge_l": found.rouge["L"]}

    def _a2_noise(self) -> dict[str, float]:
        noise = defense_of("gaussian", nsr=0.5)
        inverter = self.smollm.taught(self.wordings("train.jsonl", 2100), defend=noise.apply)
        public = self.smollm.public(2, 0)
        victims = self.wordings("test.jsonl", self.many)
        with torch.no_grad():
            smashed = [noise.apply(public.bottom(ids_T[None]))[0] for ids_T in victims]
        found = learned_inversion(inverter, smashed, victims)
        name = "a2_gaussian_0.5"
        return rated(name, found, measure="_trr") | {f"{name}_rouge_l": found.rouge["L"]}

    def _a4(self, name: str, count: int, tokens: int, **more: Any) -> dict[str, float]:
        return rated(name, self.smollm.labels(self.joined(count, tokens), **more))

    def _a4_defended(self, length: int) -> dict[str, float]:
        rows = self.joined(self.few, length)
        figures = rated("a4_bf16_m2", self.smollm.labels(rows, codec="bf16"))
        changes = {"int8": partial(rounded, bits=8), "top_tenth": _top_tenth, "clip": _clipped}
        for name, change in changes.items():
            figures |= rated(
                f"a4_{name}_m2", self.smollm.labels(rows, change=change, iterations=40)
            )
        # More iterations than these fit the noise.
        for nsr in (0.3, 1.0, 10.0):
            noise = defense_of("gaussian", nsr=nsr, channel="gradients")
            found = self.smollm.labels(rows, defenses=[noise], iterations=15)
            figures |= rated(f"a4_gaussian_{nsr}_m2", found)
        formal = defense_of("noisy_grad", clip=0.01, epsilon=8.0, delta=1e-6)
        found = self.smollm.labels(rows, defenses=[formal], iterations=15)
        return figures | rated("a4_noisy_grad_8_m2", found)

    def _gpt2_shaped(self) -> dict[str, float]:
        victim = Victim(write_gpt2(self._gpt2))
        rows = [ids_T % 4096 for ids_T in self.joined(self.many, 16)]
        figures: dict[str, float] = {}
        for bottom, top in ((1, 0), (2, 1), (4, 2)):
            found = victim.search([ids_T[:8] for ids_T in rows], bottom_layers=bottom)
            figures |= rated(f"gpt2_a1_cut_{bottom}", found)
            found = victim.labels(rows, bottom_layers=bottom, top_layers=top)
            figures |= rated(f"gpt2_a4_m{top}", found)
        return figures

    def _fetched(self, name: str, fetch: Callable[[Path, int], list[str]]) -> dict[str, float]:
        try:
            ids = self.encode([text[:400] for text in fetch(PARTIAL.parent, 120)])
        except real.Missing as error:
            self.skipped[name] = f"{name} were left out: {error}"
            return {}
        short = [ids_T[:8] for ids_T in ids if len(ids_T) >= 8][:16]
        figures = rated(f"a1_{name}", self.smollm.search(short))
        rows = _cut_up(ids, self.many, 32)
        return figures | rated(f"a4_{name}_m2", self.smollm.labels(rows))


def _cut_up(texts: Sequence[Tensor], count: int, tokens: int) -> list[Tensor]:
    ids = torch.cat([*texts])
    return list(ids[: len(ids) // tokens * tokens].view(-1, tokens)[:count])


def done_before() -> dict[str, dict[str, float]]:
    """Return the figures of the parts that a killed run of this commit finished."""
    if not PARTIAL.exists():
        return {}
    lines = [json.loads(line) for line in PARTIAL.read_text().splitlines()]
    return {line["part"]: line["figures"] for line in lines if line["commit"] == commit()}


def main() -> None:
    """Attack."""
    parser = parser_of(__doc__)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no part after so many")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    left: list[str] = []
    began = time.monotonic()
    done = {} if args.quick else done_before()
    with scratch() as folder:
        workload = make_workload(args, folder, rows=1, columns=1, batches=1)
        parts = Parts(workload.model, args.text, folder, args.quick)
        for name, part in parts.all():
            if name not in done:
                if time.monotonic() - began > 60 * args.minutes:
                    left.append(name)
                    continue
                done[name] = part()
                if not args.quick and name not in parts.skipped:
                    line = {"part": name, "commit": commit(), "figures": done[name]}
                    with PARTIAL.open("a") as file:
                        file.write(json.dumps(line) + "\n")
            print(name, done[name], file=sys.stderr, flush=True)
            figures |= done[name]
        settings = settings_of(
            workload,
            args,
            text="ICD-10-CM wordings; gpt2: the same ids modulo 4096, random weights",
            skipped=list(parts.skipped.values()),
            parts_not_run=left,
        )
    for foreign in ("batch", "lora", "optimizer", "tls"):
        del settings[foreign]
    Result(figures, settings).write(args, HOME)


if __name__ == "__main__":
    main()
